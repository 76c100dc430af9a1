"""Caches: however a text is cut into steps, attention equals one dense pass with the mask the cache promises."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from fewer.cache import FullCache, SinkWindowCache, SinkWindowConfig
from fewer.cache.stored import StoredCache
from fewer.errors import UsageError
from fewer.model.config import ModelConfig
from fewer.model.rope import Rotary
from fewer.model.step import Step
from tests.cache.dense_reference import attention_at

CONFIG = ModelConfig("llama", 10, 32, 64, 2, 4, 2, 8, 4096)
WINDOWED = ModelConfig("mistral", 10, 32, 64, 2, 4, 2, 8, 4096, sliding_window=16)
CPU = torch.device("cpu")
TOTAL = 420  # long enough for a windowed layer to evict twice


def full(batch: int) -> StoredCache:
    return FullCache(CONFIG, batch, 8, torch.float32, CPU)


def windowed(batch: int) -> StoredCache:
    return FullCache(WINDOWED, batch, 8, torch.float32, CPU)


def sinks(batch: int) -> StoredCache:
    return SinkWindowCache(CONFIG, batch, 8, torch.float32, CPU, SinkWindowConfig(4, 12))


class Text:
    """Random queries, keys and values of a text, and their dense attention in float64."""

    def __init__(self, batch: int, window: int | None, sinks: int) -> None:
        self.q, self.k, self.v = (torch.randn(batch, heads, TOTAL, 8) for heads in (4, 2, 2))
        self.rotary = Rotary(8, 8, 1e4, 4096)
        rows = zip(self.q, self.k, self.v, strict=True)
        self.expected = torch.stack(
            [
                torch.stack(
                    [attention_at(q[:, t], k, v, t, window, sinks, False, CONFIG.scale) for t in range(TOTAL)], dim=1
                )
                for q, k, v in rows
            ]
        ).float()

    def feed(self, cache: StoredCache, at: list[int], new: list[int]) -> Tensor:
        width = max(new)

        def part(x: Tensor) -> Tensor:
            rows = [x[b, :, a : a + n] for b, (a, n) in enumerate(zip(at, new, strict=True))]
            return torch.stack([torch.nn.functional.pad(row, (0, 0, 0, width - row.shape[1])) for row in rows])

        step = Step(
            tokens=torch.zeros(len(at), width, dtype=torch.int64),
            positions=torch.tensor(at)[:, None] + torch.arange(width),
            lengths=None if min(new) == width else new,
        )
        cache.reserve(max(cache.physical_lengths) + width)
        return cache.layers[0].attend(part(self.q), part(self.k), part(self.v), torch.empty(0), self.rotary, step)


KINDS = [(full, None, 0), (windowed, 16, 0), (sinks, 12, 4)]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("make", "window", "kept"), KINDS)
def test_any_chunking_of_ragged_rows_equals_dense_attention(make, window, kept, batch) -> None:  # type: ignore[no-untyped-def]
    cache, text, generator = make(batch), Text(batch, window, kept), random.Random(batch)
    at = [0] * batch
    while min(at) < TOTAL:
        new = [min(TOTAL - a, generator.choice((0, 1, 1, 7, 40) if batch > 1 else (1, 1, 40))) for a in at]
        if max(new) == 0:
            continue
        out = text.feed(cache, at, new)
        cache.commit(new)
        for row, n in enumerate(new):
            torch.testing.assert_close(out[row, :, :n], text.expected[row, :, at[row] : at[row] + n])
            at[row] += n
    assert cache.lengths == [TOTAL] * batch


@pytest.mark.parametrize(("make", "window", "kept"), KINDS)
def test_rejected_tokens_and_rollback_leave_no_trace(make, window, kept) -> None:  # type: ignore[no-untyped-def]
    cache, text = make(1), Text(1, window, kept)
    at = 0
    while at < TOTAL - 30:
        text.feed(cache, [at], [12])
        cache.commit([5])  # seven of twelve are rejected
        text.feed(cache, [at + 5], [3])
        cache.commit([3])
        cache.truncate(0, at + 6)
        at += 6
        assert cache.lengths == [at]
    out = text.feed(cache, [at], [20])
    torch.testing.assert_close(out, text.expected[:, :, at : at + 20])


def test_a_chosen_path_is_moved_together() -> None:
    cache, text = full(1), Text(1, None, 0)
    text.feed(cache, [0], [10])
    cache.commit([10])
    text.feed(cache, [10], [5])
    wanted = cache.layers[0].keys[0, :, [10, 12, 14]].clone()
    cache.commit([[0, 2, 4]])
    assert torch.equal(cache.layers[0].keys[0, :, 10:13], wanted)
    assert cache.positions(0).tolist() == [*range(10), 10, 12, 14]


def test_windowed_memory_is_flat_and_counts_allocated_bytes() -> None:
    cache = windowed(1)
    text = Text(1, 16, 0)
    sizes = []
    for at in range(0, TOTAL, 20):
        text.feed(cache, [at], [20])
        cache.commit([20])
        sizes.append(cache.nbytes)
    assert sizes[-1] == sizes[-4]
    assert sizes[-1] == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cache.physical_lengths[0] < TOTAL


def test_renumbered_positions_count_what_the_cache_holds() -> None:
    settings = SinkWindowConfig(4, 12, renumber=True)
    cache = SinkWindowCache(CONFIG, 1, 8, torch.float32, CPU, settings)
    text = Text(1, None, 0)
    out = text.feed(cache, [0], [10])  # nothing is dropped yet: the same as the text's own positions
    torch.testing.assert_close(out, text.expected[:, :, :10])


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(UsageError, match="sinks=-1 is negative"):
        SinkWindowConfig(sinks=-1)
    with pytest.raises(UsageError, match="window=0 keeps nothing"):
        SinkWindowConfig(window=0)
