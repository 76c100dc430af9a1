"""DuoAttention's captured steps give the general path's logits: across compaction, for unequal rows, and back again."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

from fewer.cache.slot_map import SlotMap
from fewer.cache.split_heads import SplitHeadCache
from fewer.engine.runner import Runner
from fewer.engine.session import Session
from fewer.errors import NumericalError
from fewer.model.config import ModelConfig
from tests.engine.test_cuda import CPU, SMALL, build, fast_runner, general_runner
from tests.random_model import config_of, random_tokens

CONFIG = config_of(**SMALL | {"heads": 6, "kv_heads": 3, "layers": 3, "attention_bias": True})
RETRIEVAL = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1]]).bool()  # both kinds in one layer, and one alone in others


class Halves(SplitHeadCache):
    """Retrieval heads by a mask of the test's, without gates."""

    def __init__(self, config: ModelConfig, batch: int, device: torch.device, dtype: torch.dtype = torch.float32):
        streaming = SlotMap(batch, 8, device, window=5, sinks=2, slack=3)
        rules = [(SlotMap(batch, 8, device), RETRIEVAL), (streaming, ~RETRIEVAL)]
        super().__init__(config, batch, dtype, device, rules)
        self.captures = 0

    def capture(self, step: Any) -> Any:
        found = super().capture(step)
        self.captures += found is not None
        return found


def session(runner: Runner, batch: int) -> Session:
    return Session(runner, Halves(CONFIG, batch, runner.device, runner.dtype))  # type: ignore[arg-type]


def pair(batch: int, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Session, Session]:
    fast = fast_runner(build(CONFIG, "dense", device, dtype))
    return session(fast, batch), session(general_runner(build(CONFIG, "dense", CPU)), batch)


def assert_close(found: Tensor, wanted: Tensor, tolerance: float = 1e-4) -> None:
    assert (found.cpu().float() - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("batch", [1, 2])
def test_steps_equal_the_general_paths_across_compactions(batch: int, device: torch.device) -> None:
    ours, theirs = pair(batch, device)
    prompts = [random_tokens(6 + 3 * row, row, 40) for row in range(batch)]
    assert_close(ours.prefill(prompts), theirs.prefill(prompts))
    for step in range(10):
        tokens = random_tokens(batch, seed=step, vocab_size=40)
        assert_close(ours.decode(tokens), theirs.decode(tokens))
    assert ours.cache.captures == 10  # type: ignore[attr-defined]
    for row in range(batch):
        assert torch.equal(ours.cache.positions(row, 1).cpu(), theirs.cache.positions(row, 1))
        assert len(theirs.cache.positions(row, 1)) < theirs.lengths[row]  # some were dropped


def test_a_rollback_and_a_row_that_waits_are_possible_in_between(device: torch.device) -> None:
    ours, theirs = pair(2, device)
    for each in (ours, theirs):
        each.prefill([[1, 2, 3, 4, 5, 6, 7], [8, 9]])
        each.decode([3, 4])
        each.decode([5, 6])
        each.rollback([8, 3])
    assert_close(ours.decode([7, 8], [True, False])[:1], theirs.decode([7, 8], [True, False])[:1])
    assert_close(ours.decode([9, 10]), theirs.decode([9, 10]))
    assert ours.lengths == theirs.lengths == [10, 4]


@pytest.mark.gpu
def test_replays_equal_the_cpus_general_path() -> None:
    ours, theirs = pair(1, torch.device("cuda"))
    prompt = random_tokens(30, 1, 40)
    assert_close(ours.prefill([prompt]), theirs.prefill([prompt]), 1e-3)
    for step in range(40):
        assert_close(ours.decode([step]), theirs.decode([step]), 1e-3)


def test_greedy_decoding_goes_along_with_the_host(device: torch.device) -> None:
    """The host commits and places while a pass runs; who stops early leaves a session that can go on."""
    ours, single = (session(fast_runner(build(CONFIG, "dense", device)), 1) for _ in range(2))
    for each in (ours, single):
        each.prefill([[1, 2, 3, 4, 5]])
    token, wanted = 6, []
    for _ in range(9):
        token = int(single.decode([token])[0].argmax())
        wanted.append(token)
    found = list(islice(ours.greedy(6, 100), 4))
    assert ours.lengths == [9]
    found += list(ours.greedy(found[-1], 5))
    assert found == wanted
    assert ours.lengths == single.lengths == [14]


def test_greedy_decoding_names_the_layer_that_is_not_finite(device: torch.device) -> None:
    model = build(CONFIG, "dense", device)
    damaged = model.layers[1].feed_forward_norm
    assert damaged is not None
    damaged[0] = float("nan")
    with pytest.raises(NumericalError, match="first in layer 1"):
        list(session(fast_runner(model), 1).greedy(5, 3))
