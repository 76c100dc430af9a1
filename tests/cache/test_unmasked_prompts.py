"""Prompts behind cached tokens where the device needs no mask, as on CUDA: the same numbers, and no mask is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fewer.cache import head_pool, retrieval_pages, scored_layer, sink_ring, slot_map
from fewer.cache.a2sf import A2sfCache
from fewer.cache.duo_attention import DuoAttentionCache, DuoAttentionConfig
from fewer.cache.full import FullCache
from fewer.cache.h2o import H2OCache
from fewer.cache.hydragen import HydragenCache
from fewer.cache.lserve import LServeCache, LServeConfig
from fewer.cache.paged import PagedCache
from fewer.cache.quest import QuestCache
from fewer.cache.snapkv import SnapKVCache
from fewer.engine.runner import Runner
from fewer.engine.session import Session
from fewer.model.step import Step
from fewer.slots import KVCache
from fewer.training.adapters import Adapter, Provenance
from tests.random_model import CPU, config_of, random_tokens, random_transformer

CONFIG = config_of(layers=3, heads=4, kv_heads=2, context_length=2000)
MODEL = random_transformer(CONFIG)
GATES = Adapter(
    {"gates": torch.tensor([[1.0, 0.1], [0.2, 0.0], [0.8, 0.9]])}, Provenance("duo-attention", {}, "model", "text", 0)
)
Make = Callable[[int], KVCache]


def plain(kind: type[Any]) -> Make:
    return lambda batch: kind(CONFIG, batch, 8, torch.float32, CPU)


def duo(**settings: Any) -> Make:
    chosen = DuoAttentionConfig(sparsity=0.5, sinks=4, window=12, **settings)
    return lambda batch: DuoAttentionCache(CONFIG, batch, 8, torch.float32, CPU, chosen, adapter=GATES)


def lserve(**settings: Any) -> Make:
    changed = {"sinks": 4, "window": 8, "prefill_window": 20, "page_size": 16, "logical_size": 4, "budget": 48}
    chosen = LServeConfig(**changed | settings)
    return lambda batch: LServeCache(CONFIG, batch, 8, torch.float32, CPU, chosen, adapter=GATES)


CACHES: dict[str, Make] = {
    "full": plain(FullCache),
    "paged": plain(PagedCache),
    "quest": plain(QuestCache),
    "hydragen": plain(HydragenCache),
    "duo-attention": duo(),
    "duo-attention, official": duo(prefill="official", chunk=140),
    "lserve": lserve(),
    "lserve, a wide window": lserve(prefill_window=400),
    "lserve, 4 bits": lserve(bits=4),
    "a2sf": plain(A2sfCache),
    "h2o": plain(H2OCache),
    "snapkv": plain(SnapKVCache),
}


def session_of(make: Make, batch: int = 1, chunk: int = 140) -> Session:
    """Chunks longer than the blocks of streaming heads, and a runner that never leaves the layers."""
    runner = Runner(MODEL)
    runner.single, runner.chunk = None, chunk
    return Session(runner, make(batch))


def without_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (slot_map, head_pool, retrieval_pages, scored_layer, sink_ring):
        monkeypatch.setattr(module, "needs_no_mask", lambda device: True)


def no_masks_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Tensor:
        raise AssertionError("a mask was made")

    without_masks(monkeypatch)
    monkeypatch.setattr(slot_map.SlotMap, "_mask", refuse)
    monkeypatch.setattr(sink_ring.SinkRing, "_triangle", refuse)


@pytest.mark.parametrize("name", CACHES)
def test_chunks_equal_those_behind_masks_and_no_mask_is_made(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, answers = random_tokens(420), []
    for patch in (lambda _: None, no_masks_at_all):
        patch(monkeypatch)
        session = session_of(CACHES[name])
        first = session.prefill([prompt[:280]])  # two chunks
        answers.append(torch.cat((first, session.prefill([prompt[280:]]), session.decode([5]))))
    torch.testing.assert_close(*answers, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["full", "paged", "hydragen", "duo-attention", "lserve"])
def test_chunks_equal_one_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    no_masks_at_all(monkeypatch)
    prompt = random_tokens(417)
    whole = session_of(CACHES[name], chunk=1000).prefill([prompt])
    torch.testing.assert_close(session_of(CACHES[name], chunk=139).prefill([prompt]), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CACHES)
def test_rows_of_unequal_starts_keep_their_masks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without_masks(monkeypatch)
    lengths, more = (150, 170, 150), (160, 9, 140)
    first = [random_tokens(length, seed=row) for row, length in enumerate(lengths)]
    second = [random_tokens(length, seed=10 + row) for row, length in enumerate(more)]
    batch, singles = session_of(CACHES[name], 3), [session_of(CACHES[name]) for _ in lengths]
    batch.prefill(first)
    found = batch.prefill(second)
    for row, session in enumerate(singles):
        session.prefill([first[row]])
        wanted = session.prefill([second[row]])
        # A number halfway between two codes may get either: with 4 bits, that shows.
        near = 0.1 if "bits" in name else 1e-4
        torch.testing.assert_close(found[row : row + 1], wanted, atol=near, rtol=1e-4)


@pytest.mark.parametrize("name", ["a2sf", "h2o", "snapkv"])
def test_caches_that_evict_by_scores_need_no_mask_for_rows_of_unequal_starts(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, more, answers = [random_tokens(80), random_tokens(50)], [random_tokens(30), random_tokens(60)], []
    for patch in (lambda _: None, no_masks_at_all):
        patch(monkeypatch)
        session = session_of(CACHES[name], 2)
        session.prefill(prompts)
        answers.append(torch.cat((session.prefill(more), session.decode([5, 6]))))
    torch.testing.assert_close(*answers, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["full", "paged", "hydragen", "duo-attention"])
def test_tokens_that_skipped_a_layer_stay_unseen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, answers = random_tokens(120), []
    skipping = torch.ones(1, 40, 3, dtype=torch.bool)
    skipping[:, 5:9, 1] = skipping[:, 20:, 2] = False
    for patch in (lambda _: None, without_masks):
        patch(monkeypatch)
        session = session_of(CACHES[name])
        session.cache.reserve(120)
        found = []
        for first in (0, 40, 80):
            positions = torch.arange(first, first + 40)[None]
            plan = skipping if first == 0 else None
            step = Step(torch.tensor([tokens[first : first + 40]]), positions, layer_plan=plan)
            found.append(session.runner.step(step, session.cache).logits)
            session.cache.commit([40])
        answers.append(torch.cat([logits for logits in found if logits is not None]))
    torch.testing.assert_close(*answers, atol=1e-4, rtol=1e-4)
