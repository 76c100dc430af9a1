"""Hydragen's captured steps give the general path's logits: for any layout of prefixes, as rows grow and leave."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fewer.cache import HydragenCache, HydragenConfig
from fewer.engine.session import Session
from fewer.model.step import Step
from fewer.slots import Capture
from tests.engine.test_cuda import CPU, SMALL, build, fast_runner, general_runner
from tests.random_model import config_of, random_tokens

CONFIG = config_of(**SMALL | {"heads": 6, "kv_heads": 2, "qk_norm": "head", "attention_bias": True})
ROOT, LEFT, RIGHT = random_tokens(37, 1, 40), random_tokens(20, 2, 40), random_tokens(11, 3, 40)
LAYOUTS = {
    "one level": [ROOT + random_tokens(2 + row, row, 40) for row in range(3)],
    "one prompt": [ROOT] * 2,
    "two ragged levels and a row apart": [ROOT + LEFT + [1], ROOT + RIGHT + [2, 3], ROOT + LEFT + [4] * 3]
    + [[5, 6], ROOT + RIGHT + [7], ROOT + [8]],
}


class Counted(HydragenCache):
    """Keeps the keys of its captures."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.keys: list[Any] = []

    def capture(self, step: Step) -> Capture | None:
        found = super().capture(step)
        self.keys += [] if found is None else [found.key]
        return found


def pair(
    batch: int, device: torch.device, changes: dict[str, Any] | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Session, Session]:
    config = CONFIG if changes is None else config_of(**SMALL | changes)
    runners = fast_runner(build(config, "dense", device, dtype)), general_runner(build(config, "dense", CPU))
    ours, theirs = (
        Session(
            runner, Counted(config, batch, 8, runner.dtype, runner.device, HydragenConfig(shortest=4, split="always"))
        )
        for runner in runners
    )
    return ours, theirs


def assert_close(found: Tensor, wanted: Tensor, tolerance: float = 1e-4) -> None:
    assert (found.cpu().float() - wanted).norm() <= tolerance * wanted.norm()


def keys_of(session: Session) -> list[Any]:
    assert isinstance(session.cache, Counted)
    return session.cache.keys


@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_equal_the_general_paths(layout: str, device: torch.device) -> None:
    prompts = LAYOUTS[layout]
    ours, theirs = pair(len(prompts), device)
    assert_close(ours.prefill(prompts), theirs.prefill(prompts))
    ours.cache.reserve(20)
    keys_of(ours).clear()
    for step in range(3):
        tokens = random_tokens(len(prompts), step, 40)
        assert_close(ours.decode(tokens), theirs.decode(tokens))
    assert len(keys_of(ours)) == 3 and len(set(keys_of(ours))) == 1  # lengths are no part of a graph
    assert ours.lengths == theirs.lengths


def test_waiting_rows_growth_and_a_row_that_leaves_its_prefix(device: torch.device) -> None:
    prompts = LAYOUTS["one level"]
    ours, theirs = pair(3, device)
    for each in (ours, theirs):
        each.prefill(prompts)
    for step in range(4):
        active = [True, step % 2 == 0, True]
        found, wanted = ours.decode([step, 1, 2], active), theirs.decode([step, 1, 2], active)
        assert_close(found[active], wanted[active])
    for each in (ours, theirs):
        each.rollback([20, 100, 100])  # into the prefix
    assert_close(ours.decode([1, 2, 3]), theirs.decode([1, 2, 3]))
    assert ours.lengths == theirs.lengths
    assert len(keys_of(ours)) == 5


@pytest.mark.parametrize(
    "changes", [{"attention_softcap": 1.5, "kv_heads": 2}, {"rope_layers": (True, False), "rotary_dim": 8}]
)
def test_caps_and_layers_without_positions(changes: dict[str, Any], device: torch.device) -> None:
    ours, theirs = pair(2, device, changes)
    for each in (ours, theirs):
        each.prefill(LAYOUTS["one prompt"])
    assert_close(ours.decode([1, 2]), theirs.decode([1, 2]))
    assert keys_of(ours)


def test_without_prefixes_the_layers_are_those_of_full(device: torch.device) -> None:
    ours, theirs = pair(2, device)
    for each in (ours, theirs):
        each.prefill([[1, 2, 3], [4, 5]])
    assert_close(ours.decode([1, 2]), theirs.decode([1, 2]))
    assert keys_of(ours)


@pytest.mark.gpu
def test_replays_in_bfloat16_stay_near_the_cpus_float32() -> None:
    prompts = LAYOUTS["two ragged levels and a row apart"] * 30  # more rows than the narrow products take
    ours, theirs = pair(len(prompts), torch.device("cuda"), None, torch.bfloat16)
    assert_close(ours.prefill(prompts), theirs.prefill(prompts), 0.05)
    for step in range(10):
        tokens = random_tokens(len(prompts), step, 40)
        assert_close(ours.decode(tokens), theirs.decode(tokens), 0.05)
