"""LServe's captured steps give the general path's logits: over pages and choices that begin, the budget and the window,
for unequal rows, in 16, 8 and 4 bits, and back again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewer.cache.lserve import LServeCache, LServeConfig
from fewer.engine.runner import Runner
from fewer.engine.session import Session
from fewer.model.step import Step
from fewer.training.adapters import Adapter, Provenance
from tests.engine.test_cuda import CPU, SMALL, build, fast_runner, general_runner
from tests.random_model import config_of, random_tokens

CONFIG = config_of(**SMALL | {"heads": 4, "kv_heads": 2})
BOTH = [[0.9, 0.1], [0.2, 0.8]]  # each layer has heads of both kinds …
APART = [[0.9, 0.8], [0.1, 0.2]]  # … or of one
SETTINGS = LServeConfig(
    sparsity=0.5, sinks=3, window=6, prefill_window=20, page_size=16, logical_size=4, budget=48, interval=4
)
TOLERANCE = {16: 1e-4, 8: 0.01, 4: 0.05}  # a number halfway between two codes may get either


class Counting(LServeCache):
    captures, choices = 0, 0

    def capture(self, step: Step) -> Any:
        found = super().capture(step)
        self.captures += found is not None
        self.choices += found is not None and found.key[1]  # type: ignore[index]
        return found


def session(runner: Runner, batch: int, settings: LServeConfig, gates: list[list[float]] = BOTH) -> Session:
    adapter = Adapter({"gates": torch.tensor(gates)}, Provenance("duo-attention", {}, "model", "data", 0))
    device, dtype = runner.model.device, runner.model.dtype
    return Session(runner, Counting(CONFIG, batch, 8, dtype, device, settings, adapter=adapter))


def pair(
    batch: int,
    settings: LServeConfig,
    device: torch.device,
    gates: list[list[float]] = BOTH,
    dtype: torch.dtype = torch.float32,
) -> tuple[Session, Session]:
    ours = session(fast_runner(build(CONFIG, "dense", device, dtype)), batch, settings, gates)
    return ours, session(general_runner(build(CONFIG, "dense", CPU)), batch, settings, gates)


def counts(of: Session) -> tuple[int, int]:
    assert isinstance(of.cache, Counting)
    return of.cache.captures, of.cache.choices


def assert_close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert (found.cpu().float() - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("bits, sets", [(16, "query-head"), (8, "key-head"), (4, "query-head")])
def test_steps_equal_the_general_paths_where_a_page_and_a_choice_begin(
    bits: Any, sets: Any, device: torch.device
) -> None:
    ours, theirs = pair(1, replace(SETTINGS, bits=bits, sets=sets), device)
    prompt = random_tokens(79, 1, 40)
    assert_close(ours.prefill([prompt]), theirs.prefill([prompt]), TOLERANCE[bits])
    for step in range(3):
        tokens = random_tokens(1, seed=step, vocab_size=40)
        assert_close(ours.decode(tokens), theirs.decode(tokens), TOLERANCE[bits])
    assert counts(ours) == (3, 2)  # the first choice at 79, the next where a page begins, at 80
    mine, reference = ours.cache, theirs.cache
    assert isinstance(mine, LServeCache) and isinstance(reference, LServeCache)
    for found, wanted in zip(mine.pages.lists, reference.pages.lists, strict=True):
        if wanted is not None:
            assert found is not None
            assert torch.equal(found.cpu().sort(-1).values, wanted.sort(-1).values)


def test_every_row_goes_by_its_own_length(device: torch.device) -> None:
    """One is long, one passes the budget, and their choices fall due in different steps."""
    ours, theirs = pair(2, SETTINGS, device, APART)
    prompts = [random_tokens(64, 1, 40), random_tokens(48, 2, 40)]
    assert_close(ours.prefill(prompts), theirs.prefill(prompts), 1e-4)
    for step in range(3):
        tokens = random_tokens(2, seed=step, vocab_size=40)
        assert_close(ours.decode(tokens), theirs.decode(tokens), 1e-4)
    assert counts(ours) == (3, 2)  # the first row chooses at 64, the second at 49 while the first keeps its lists


def test_a_text_within_the_budget_grows_into_its_ring(device: torch.device) -> None:
    ours, theirs = pair(1, replace(SETTINGS, bits=8), device)
    prompt = random_tokens(7, 1, 40)
    assert_close(ours.prefill([prompt]), theirs.prefill([prompt]), TOLERANCE[8])
    for step in range(3):  # nine slots: the tenth token goes round
        assert_close(ours.decode([step]), theirs.decode([step]), TOLERANCE[8])
    assert counts(ours) == (3, 0)


def test_a_row_that_waits_and_a_prompt_are_possible_in_between(device: torch.device) -> None:
    ours, theirs = pair(2, SETTINGS, device)
    found: list[Tensor] = []
    wanted: list[Tensor] = []
    for each, logits in ((ours, found), (theirs, wanted)):
        logits.append(each.prefill([random_tokens(52, 1, 40), random_tokens(9, 2, 40)]))
        logits.append(each.decode([3, 4]))
        logits.append(each.decode([5, 6], [True, False])[:1])
        logits.append(each.decode([7, 8]))
        logits.append(each.prefill([[1, 2, 3], [4]]))
        logits.append(each.decode([9, 10]))
    for mine, reference in zip(found, wanted, strict=True):
        assert_close(mine, reference, 1e-4)
    assert counts(ours)[0] == 3
    assert ours.lengths == theirs.lengths


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_replays_equal_the_cpus_general_path(bits: Any) -> None:
    """All pages are on the lists: near ties would be decided otherwise on another device."""
    settings = replace(SETTINGS, bits=bits, budget=128)
    ours, theirs = pair(1, settings, torch.device("cuda"))
    prompt = random_tokens(90, 1, 40)
    assert_close(ours.prefill([prompt]), theirs.prefill([prompt]), 2 * TOLERANCE[bits])
    for step in range(30):
        assert_close(ours.decode([step]), theirs.decode([step]), 2 * TOLERANCE[bits])


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_graphs_give_the_logits_of_single_launches(bits: Any) -> None:
    runner = fast_runner(build(CONFIG, "dense", torch.device("cuda"), torch.bfloat16))
    decoder = runner.cuda
    assert decoder is not None
    replayed, launched = (session(runner, 2, replace(SETTINGS, bits=bits)) for _ in range(2))
    prompts = [random_tokens(70, 1, 40), random_tokens(40, 2, 40)]
    for each in (replayed, launched):
        each.prefill(prompts)
    for step in range(40):
        found = replayed.decode([step % 40, 3])
        decoder.graphs.clear()  # every pass is launched one by one, as if it were the first of its kind
        assert torch.equal(found, launched.decode([step % 40, 3]))
