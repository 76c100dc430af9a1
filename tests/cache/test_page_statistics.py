"""Bounds of pages: never too low, the same however the keys arrive, and blind to what a recycled page held."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewer.cache.page_statistics import PageStatistics, choose_pages, physical_scores
from tests.random_model import CPU

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 8


def random_keys(length: int, seed: int = 0) -> Tensor:
    return torch.randn(length, KV_HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(seed))


def statistics(page_size: int, logical_size: int, pages: int = 8) -> PageStatistics:
    return PageStatistics(1, pages, KV_HEADS, HEAD_DIM, page_size, logical_size, torch.float32, CPU)


def fill(into: PageStatistics, keys: Tensor, table: list[int], chunk: int) -> None:
    """Keys of one row, `chunk` tokens at a time, in the pages of its table."""
    pages = torch.tensor(table)
    for start in range(0, len(keys), chunk):
        slots = torch.arange(start, min(start + chunk, len(keys)))
        into.add(0, keys[slots], into.place(pages[slots // into.page_size], slots % into.page_size))


def paged(keys: Tensor, table: list[int], page_size: int, pages: int = 8) -> Tensor:
    """The same keys as storage [1, pages, Hk, page_size, D], with junk where there is no token."""
    storage = torch.full((1, pages, KV_HEADS, page_size, HEAD_DIM), torch.nan)
    slots = torch.arange(len(keys))
    storage[0, torch.tensor(table)[slots // page_size], :, slots % page_size] = keys
    return storage


def scores_of(of: PageStatistics, q: Tensor, table: list[int], length: int) -> Tensor:
    return of.upper_bounds(0, q, torch.tensor([table], dtype=torch.int32), torch.tensor([length]))


@pytest.mark.parametrize(("page_size", "logical_size"), [(16, 16), (16, 4), (64, 16), (256, 16), (100, 16)])
@pytest.mark.parametrize("length", [1, 16, 77, 100])
def test_no_key_of_a_page_scores_above_its_bound(page_size: int, logical_size: int, length: int) -> None:
    keys, q, table = random_keys(length), torch.randn(1, HEADS, HEAD_DIM), [5, 0, 3, 7, 1, 2, 6]
    bounds = statistics(page_size, logical_size)
    fill(bounds, keys, table, 7)
    scores = scores_of(bounds, q, table, length)[0]  # [H, P·g]
    products = torch.einsum("hd,shd->hs", q[0], keys.repeat_interleave(HEADS // KV_HEADS, 1))
    for slot in range(length):
        page, offset = divmod(slot, page_size)
        logical = page * bounds.parts + offset // logical_size
        assert (products[:, slot] <= scores[:, logical] + 1e-5).all()


def test_the_bound_is_the_sum_over_channels_of_the_larger_product() -> None:
    keys, q = random_keys(16), torch.randn(1, HEADS, HEAD_DIM)
    bounds = statistics(16, 16)
    fill(bounds, keys, [2], 16)
    largest, smallest = (part.repeat_interleave(HEADS // KV_HEADS, 0) for part in (keys.amax(0), keys.amin(0)))
    expected = torch.maximum(q[0] * largest, q[0] * smallest).sum(-1)
    torch.testing.assert_close(scores_of(bounds, q, [2], 16)[0, :, 0], expected)


def test_small_logical_pages_bound_a_physical_page_more_tightly_than_the_whole() -> None:
    keys, q, table = random_keys(256), torch.randn(1, HEADS, HEAD_DIM), [0, 1, 2, 3]
    small, whole = statistics(64, 16), statistics(64, 64)
    for each in (small, whole):
        fill(each, keys, table, 64)
    tighter = physical_scores(scores_of(small, q, table, 256), small.parts)
    looser = scores_of(whole, q, table, 256)
    assert (tighter <= looser + 1e-5).all() and (tighter < looser - 1e-3).any()


@pytest.mark.parametrize("chunk", [1, 5, 16, 33, 90])
@pytest.mark.parametrize(("page_size", "logical_size"), [(16, 16), (32, 8), (100, 16)])
def test_any_chunking_gives_the_bounds_of_the_whole_text(chunk: int, page_size: int, logical_size: int) -> None:
    keys, table = random_keys(90), [4, 1, 6, 0, 2, 3]
    bounds, whole = statistics(page_size, logical_size), statistics(page_size, logical_size)
    fill(bounds, keys, table, chunk)
    at, places = torch.arange(0, 90, 1), torch.tensor(table)
    first = at[(at % page_size) % logical_size == 0]
    counts = torch.minimum(torch.minimum(90 - first, page_size - first % page_size), torch.tensor(logical_size))
    whole.rebuild(paged(keys, table, page_size), places[first // page_size], first % page_size // logical_size, counts)
    assert torch.equal(bounds.bounds, whole.bounds)


def test_a_recycled_page_forgets_what_it_held() -> None:
    bounds, fresh = statistics(16, 4), statistics(16, 4)
    fill(bounds, 100 * random_keys(16, seed=1), [3], 16)
    fill(bounds, random_keys(10), [3], 3)
    fill(fresh, random_keys(10), [3], 10)
    q = torch.randn(1, HEADS, HEAD_DIM)
    assert torch.equal(scores_of(bounds, q, [3], 10), scores_of(fresh, q, [3], 10))


def test_empty_logical_pages_never_win() -> None:
    bounds = statistics(64, 16)
    fill(bounds, 100 * random_keys(64, seed=1), [3], 16)
    scores = scores_of(bounds, torch.randn(1, HEADS, HEAD_DIM), [3, -1], 17)[0]
    assert scores[:, :2].isfinite().all() and (scores[:, 2:] == -torch.inf).all()


def test_pages_that_lost_tokens_are_read_again() -> None:
    keys, bounds, expected = random_keys(40), statistics(64, 16), statistics(64, 16)
    fill(bounds, keys, [2], 40)
    one = torch.tensor
    bounds.rebuild(paged(keys, [2], 64), one([2, 2]), one([0, 1]), one([16, 3]))
    fill(expected, keys[:19], [2], 19)
    assert torch.equal(bounds.bounds[0, 2, :, :2], expected.bounds[0, 2, :, :2])


def test_growing_keeps_what_is_known() -> None:
    bounds, q = statistics(48, 16), torch.randn(1, HEADS, HEAD_DIM)
    fill(bounds, random_keys(40), [2], 40)
    before = scores_of(bounds, q, [2], 40)
    bounds.grow(12, 70)
    after = scores_of(bounds, q, [2], 40)
    assert bounds.bounds.shape[1:4] == (12, KV_HEADS, 5)
    assert torch.equal(after[..., :3], before) and (after[..., 3:] == -torch.inf).all()


def test_the_newest_page_is_always_chosen_and_comes_last() -> None:
    scores = torch.randn(2, HEADS, 9)
    chosen = choose_pages(scores, torch.tensor([9 * 16 - 3, 3 * 16]), 16, 4)
    assert chosen.shape == (2, HEADS, 4) and chosen.dtype == torch.int32
    assert (chosen[0, :, -1] == 8).all() and (chosen[1, :, -1] == 2).all()
    for head in range(HEADS):
        assert set(chosen[0, head, :3].tolist()) == set(scores[0, head, :8].topk(3).indices.tolist())
        assert sorted(chosen[1, head].tolist()) == [-1, 0, 1, 2]  # a row with fewer pages has them all
