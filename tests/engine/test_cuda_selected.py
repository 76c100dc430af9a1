"""Captured steps of caches that select give the general path's logits: within the budget, behind it, and across it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fewer.cache import (
    OracleTopkCache,
    OracleTopkConfig,
    QuestCache,
    QuestConfig,
    TidalDecodeCache,
    TidalDecodeConfig,
)
from fewer.engine.runner import Runner
from fewer.engine.session import Session
from fewer.model.config import ModelConfig
from fewer.model.step import Step
from tests.engine.test_cuda import CPU, SMALL, build, fast_runner, general_runner
from tests.random_model import config_of, random_tokens

CONFIG = config_of(**SMALL | {"heads": 4, "kv_heads": 2, "head_dim": 8, "layers": 3, "attention_softcap": 20.0})
BUDGET = 6


def settings_of(**changes: Any) -> TidalDecodeConfig:
    return TidalDecodeConfig(**{"budget": BUDGET, "start": 1, "reselect": "none", **changes})


class Counted(TidalDecodeCache):
    """Counts the steps that were captured."""

    captures = 0

    def capture(self, step: Any) -> Any:
        found = super().capture(step)
        self.captures += found is not None
        return found


def session(runner: Runner, batch: int, settings: TidalDecodeConfig, config: ModelConfig = CONFIG) -> Session:
    return Session(runner, Counted(config, batch, 8, runner.dtype, runner.device, settings))


def pair(
    batch: int, settings: TidalDecodeConfig, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Session, Session]:
    fast, general = fast_runner(build(CONFIG, "dense", device, dtype)), general_runner(build(CONFIG, "dense", CPU))
    return session(fast, batch, settings), session(general, batch, settings)


def captures(of: Session) -> int:
    assert isinstance(of.cache, Counted)
    return of.cache.captures


def assert_close(found: Tensor, wanted: Tensor, tolerance: float = 1e-4) -> None:
    assert (found.cpu().float() - wanted).norm() <= tolerance * wanted.norm()


def assert_same_steps(ours: Session, theirs: Session, count: int, seed: int = 0, tolerance: float = 1e-4) -> None:
    for step in range(count):
        tokens = random_tokens(len(ours.lengths), seed=seed + step, vocab_size=40)
        assert_close(ours.decode(tokens), theirs.decode(tokens), tolerance)
    assert ours.lengths == theirs.lengths


@pytest.mark.parametrize(("start", "reselect", "batch"), [(0, "2", 2), (1, "none", 1)])
def test_steps_across_the_budget_equal_the_general_paths(
    start: int, reselect: str, batch: int, device: torch.device
) -> None:
    ours, theirs = pair(batch, settings_of(start=start, reselect=reselect), device)
    prompts = [random_tokens(BUDGET - 1, row, 40) for row in range(batch)]
    assert_close(ours.prefill(prompts), theirs.prefill(prompts))
    count = 2 if device.type == "cpu" else 30
    assert_same_steps(ours, theirs, count)
    assert captures(ours) == count


@pytest.mark.parametrize("sets", ["query-head", "key-head"])
def test_rows_of_unequal_length_have_sets_of_their_own(sets: str, device: torch.device) -> None:
    ours, theirs = pair(2, settings_of(sets=sets), device)
    prompts = [random_tokens(14, 1, 40), random_tokens(4, 2, 40)]  # the second is within the budget for a while
    assert_close(ours.prefill(prompts), theirs.prefill(prompts))
    count = 1 if device.type == "cpu" else 30
    assert_same_steps(ours, theirs, count)
    assert captures(ours) == count


def test_the_budget_decides_what_is_read() -> None:
    """Otherwise the tests above compare two ways of reading everything."""
    runner, found = general_runner(build(CONFIG, "dense", CPU)), []
    for budget in (BUDGET, 100):
        ours = session(runner, 1, settings_of(budget=budget))
        ours.prefill([random_tokens(14, 1, 40)])
        found.append(ours.decode([3]))
    assert (found[0] - found[1]).norm() > 1e-2 * found[1].norm()


def test_a_rollback_and_a_row_that_waits_are_possible_in_between(device: torch.device) -> None:
    ours, theirs = pair(2, settings_of(), device)
    for each in (ours, theirs):
        each.prefill([random_tokens(9, 1, 40), random_tokens(7, 2, 40)])
        each.decode([3, 4])
        each.rollback([9, 7])
    assert_close(ours.decode([7, 8], [True, False])[:1], theirs.decode([7, 8], [True, False])[:1])
    assert_same_steps(ours, theirs, 1)
    assert captures(ours) == 2


def test_captured_tokens_are_computed_again_when_they_are_due(device: torch.device) -> None:
    ours, theirs = pair(2, settings_of(correct_every=2), device)
    prompts = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5]]
    assert_close(ours.prefill(prompts), theirs.prefill(prompts))
    due = []
    for tokens in ([7, 6], [8, 7], [9, 8]):
        due.append(ours.cache.due())  # type: ignore[attr-defined]
        assert due[-1] == theirs.cache.due()  # type: ignore[attr-defined]
        assert_close(ours.decode(tokens), theirs.decode(tokens))
    assert due == [None, None, [[7, 8], []]]  # the second row's first token has read all that the budget holds
    assert captures(ours) == 3


def test_running_ahead_gives_the_general_paths_tokens_across_the_budget(device: torch.device) -> None:
    ours, theirs = pair(1, settings_of(), device)
    for each in (ours, theirs):
        each.prefill([random_tokens(BUDGET - 1, 3, 40)])
    count = 2 if device.type == "cpu" else 30
    assert list(ours.greedy(5, count)) == list(theirs.greedy(5, count))
    assert captures(ours) == 0 and ours.lengths == theirs.lengths
    runner = ours.runner
    rooms = [runner.fast_room(each.cache) for each in (ours, session(runner, 1, settings_of()))]
    assert rooms == [None, BUDGET]  # behind the budget any number, before it as many as it holds
    assert not runner.has_fast_path(session(runner, 1, settings_of(correct_every=3)).cache)


def test_pages_with_bounds_are_not_captured_and_bounds_by_the_oracle_while_all_is_read() -> None:
    tokens, sizes = torch.tensor([[1]]), (CONFIG, 1, 8, torch.float32, CPU)
    oracle = OracleTopkCache(*sizes, OracleTopkConfig(budget=6, start=1))
    quest = QuestCache(*sizes, QuestConfig(budget=8, page_size=4, start=1))
    for cache, captured in ((oracle, True), (quest, False)):
        for position in (0, 7):
            cache.everything.counts = cache.committed = [position]
            assert (cache.ahead() is not None) == (captured and position == 0)
            found = cache.capture(Step(tokens, torch.tensor([[position]]), role="generated"))
            assert (found is not None) == (captured and position == 0)


@pytest.mark.gpu
@pytest.mark.parametrize("sets", ["query-head", "key-head"])
def test_replays_in_bfloat16_stay_near_the_cpus_float32(sets: str) -> None:
    """With a budget that holds all but a few tokens: which these are is a matter of rounding, and of little weight."""
    ours, theirs = pair(2, settings_of(budget=60, sets=sets), torch.device("cuda"), torch.bfloat16)
    prompts = [random_tokens(55, 1, 40), random_tokens(33, 2, 40)]
    assert_close(ours.prefill(prompts), theirs.prefill(prompts), 0.05)
    assert_same_steps(ours, theirs, 15, tolerance=0.1)
    assert captures(ours) == 15
