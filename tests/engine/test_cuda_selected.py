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
from tests.engine.test_cuda import CPU, SMALL, build, fast_runner, general_runner
from tests.random_model import config_of, random_tokens

CONFIG = config_of(**SMALL | {"heads": 4, "kv_heads": 2, "layers": 4, "qk_norm": "head", "attention_softcap": 20.0})
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


@pytest.mark.parametrize(
    ("start", "reselect"), [(0, "none"), (1, "3"), (2, "none"), (1, "every")], ids=str
)
def test_steps_across_the_budget_equal_the_general_paths(start: int, reselect: str, device: torch.device) -> None:
    ours, theirs = pair(1, settings_of(start=start, reselect=reselect), device)
    assert_close(ours.prefill([[1, 2, 3, 4]]), theirs.prefill([[1, 2, 3, 4]]))
    assert_same_steps(ours, theirs, 5)
    assert captures(ours) == 5


@pytest.mark.parametrize("sets", ["query-head", "key-head"])
def test_rows_of_unequal_length_have_sets_of_their_own(sets: str, device: torch.device) -> None:
    ours, theirs = pair(2, settings_of(sets=sets, reselect="3"), device)
    prompts = [random_tokens(14, 1, 40), random_tokens(4, 2, 40)]  # the second is within the budget for a while
    assert_close(ours.prefill(prompts), theirs.prefill(prompts))
    assert_same_steps(ours, theirs, 4)
    assert captures(ours) == 4


def test_the_budget_and_the_context_change_what_is_read(device: torch.device) -> None:
    """Otherwise the tests above compare two ways of reading everything."""
    runner, prompt = fast_runner(build(CONFIG, "dense", device)), random_tokens(14, 1, 40)
    found = []
    for budget in (BUDGET, 100):
        ours = session(runner, 1, settings_of(budget=budget))
        ours.prefill([prompt])
        found.append(ours.decode([3]).cpu())
    assert (found[0] - found[1]).norm() > 1e-2 * found[1].norm()


def test_a_rollback_and_a_row_that_waits_are_possible_in_between(device: torch.device) -> None:
    ours, theirs = pair(2, settings_of(), device)
    for each in (ours, theirs):
        each.prefill([random_tokens(9, 1, 40), random_tokens(7, 2, 40)])
        each.decode([3, 4])
        each.decode([5, 6])
        each.rollback([9, 8])
    assert_close(ours.decode([7, 8], [True, False])[:1], theirs.decode([7, 8], [True, False])[:1])
    assert_same_steps(ours, theirs, 2)
    assert captures(ours) == 4


@pytest.mark.parametrize("batch", [1, 2])
def test_captured_tokens_are_computed_again_when_they_are_due(batch: int, device: torch.device) -> None:
    ours, theirs = pair(batch, settings_of(correct_every=3), device)
    prompts = [random_tokens(5 + 3 * row, row, 40) for row in range(batch)]
    assert_close(ours.prefill(prompts), theirs.prefill(prompts))
    for step in range(6):
        tokens = random_tokens(batch, seed=step, vocab_size=40)
        assert ours.cache.due() == theirs.cache.due()  # type: ignore[attr-defined]
        assert_close(ours.decode(tokens), theirs.decode(tokens))
    assert captures(ours) == 6


@pytest.mark.parametrize(
    ("make", "settings", "captured"),
    [(OracleTopkCache, OracleTopkConfig(budget=6, start=1), 2), (QuestCache, QuestConfig(8, 4, 1), 0)],
)
def test_what_is_not_captured_takes_the_general_path(make: Any, settings: Any, captured: int) -> None:
    """Oracle's steps are captured while they read everything, those of Quest never: it keeps bounds of pages, too."""
    fast, general = fast_runner(build(CONFIG, "dense", CPU)), general_runner(build(CONFIG, "dense", CPU))
    ours, theirs = (Session(runner, make(CONFIG, 1, 8, torch.float32, CPU, settings)) for runner in (fast, general))
    found = []
    for each in (ours, theirs):
        each.prefill([[1, 2, 3, 4]])
        passes = [each.cache.capture(step) for step in ()]
        found.append([each.decode([token]) for token in range(5)] + passes)
    for one, other in zip(*found, strict=True):
        assert_close(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("sets", ["query-head", "key-head"])
def test_replays_in_bfloat16_stay_near_the_cpus_float32(sets: str) -> None:
    """With a budget that holds all but a few tokens: which ones these are is a matter of rounding, and of little weight."""
    settings = settings_of(budget=60, sets=sets, reselect="3")
    ours, theirs = pair(2, settings, torch.device("cuda"), torch.bfloat16)
    prompts = [random_tokens(50, 1, 40), random_tokens(33, 2, 40)]
    assert_close(ours.prefill(prompts), theirs.prefill(prompts), 0.05)
    assert_same_steps(ours, theirs, 15, tolerance=0.1)
    assert captures(ours) == 15
