"""Prefill over kept tiles on the CPU, against float64: sinks and windows, lists, offsets, column sums."""

from __future__ import annotations

import pytest
import torch

from fewer.kernels.attention import merge
from fewer.kernels.tile_attention import EVERYTHING, Lambda, TileLists, attend_tiles, column_sums
from tests.kernels.attention_problems import TileProblem, assert_equal, random_tile_lists, tile_problem


def rule(sinks: list[int], windows: list[int]) -> Lambda:
    return Lambda(torch.tensor(sinks, dtype=torch.int32), torch.tensor(windows, dtype=torch.int32))


def check(case: TileProblem, softcap: float | None = None) -> None:
    arguments = case.start, case.tiles, 0.3, softcap, case.causal
    out, lse = attend_tiles(case.q, case.k, case.v, *arguments)
    sums = column_sums(case.q, case.k, lse, case.weights, *arguments)
    assert_equal((out, lse, sums), case.answer(0.3, softcap))


@pytest.mark.parametrize("group", [1, 3, 7])
def test_every_head_has_its_own_sinks_and_window(group: int) -> None:
    sinks, windows = [0, 4, 4, 130, 2, 4] * 3, [EVERYTHING, 7, 1, 20, 200, 7] * 3
    check(tile_problem(rule(sinks[: 2 * group], windows[: 2 * group]), 150, 190, 40, group))


def test_rows_may_start_at_different_positions() -> None:
    check(tile_problem(rule([4] * 4, [9, 9, 9, 50]), 30, 70, torch.tensor([40, 3])), 2.0)


def test_one_query_with_a_wide_window_sees_everything() -> None:
    check(tile_problem(rule([0] * 4, [EVERYTHING] * 4), 1, 33, 32))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tile_sizes", [(16, 16), (32, 16), (16, 32)])
def test_tile_lists(tile_sizes: tuple[int, int], causal: bool) -> None:
    check(tile_problem(random_tile_lists(45, 90, 2, 6, *tile_sizes), 45, 90, 40, 3, causal=causal))


def test_lists_are_transposed_to_the_tiles_of_keys() -> None:
    lists = torch.tensor([[[0, 2], [1, -1], [2, 1]]], dtype=torch.int32)
    counts = torch.tensor([[2, 2, 1]], dtype=torch.int32)
    found = TileLists(lists, counts, torch.zeros(1, 1, dtype=torch.int32), 16, 32).transposed(4)
    listed = [found.lists[0, tile, : found.counts[0, tile]].tolist() for tile in range(4)]
    assert listed == [[0], [1], [0, 2], []]
    assert (found.query_tile, found.key_tile) == (32, 16)


def test_a_prompt_in_chunks_equals_one_pass() -> None:
    tiles = rule([4] * 4, [11, EVERYTHING, 11, 30])
    case = tile_problem(tiles, 100, 100, 0)
    whole = attend_tiles(case.q, case.k, case.v, 0, tiles, 0.3)
    chunks = [attend_tiles(case.q[:, :, at : at + 32], case.k, case.v, at, tiles, 0.3) for at in range(0, 100, 32)]
    for one, pieces in zip(whole, zip(*chunks, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(pieces, 2), one, rtol=1e-5, atol=1e-5)


def test_the_last_queries_suffice_for_a_fast_forgetting_sum() -> None:
    tiles = rule([0] * 4, [EVERYTHING] * 4)
    case = tile_problem(tiles, 90, 90, 0)
    lse = attend_tiles(case.q, case.k, case.v, 0, tiles, 0.3)[1]
    weights = 0.3 ** torch.arange(89, -1, -1.0)
    whole = column_sums(case.q, case.k, lse, weights, 0, tiles, 0.3)
    last = column_sums(case.q[:, :, -32:], case.k, lse[..., -32:], weights[-32:], 58, tiles, 0.3)
    torch.testing.assert_close(last, whole, rtol=1e-6, atol=1e-9)


def test_tiles_that_divide_the_keys_merge_to_all_of_them() -> None:
    even = torch.tensor([[0, 2, 4]] * 3, dtype=torch.int32)[None]
    kinds = torch.zeros(2, 4, dtype=torch.int32)
    parts = []
    case = tile_problem(TileLists(even, torch.full((1, 3), 3), kinds, 16, 16), 40, 80, 40)
    for lists in (even, even + 1):
        tiles = TileLists(lists, torch.full((1, 3), 3), kinds, 16, 16)
        parts.append(attend_tiles(case.q, case.k, case.v, 40, tiles, 0.3))
    everything = tile_problem(rule([0] * 4, [EVERYTHING] * 4), 40, 80, 40)
    assert_equal(merge(parts), everything.answer(0.3)[:2])


def test_what_cannot_be_meant_is_refused() -> None:
    case = tile_problem(rule([0] * 4, [9] * 4), 20, 20, 0)
    with pytest.raises(ValueError, match="causal rule"):
        attend_tiles(case.q, case.k, case.v, 0, case.tiles, 0.3, causal=False)
    with pytest.raises(ValueError, match="3 lists for 20 queries in tiles of 16"):
        attend_tiles(case.q, case.k, case.v, 0, random_tile_lists(40, 20, 2, 4, 16, 16), 0.3)
