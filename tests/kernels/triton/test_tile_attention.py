"""Prefill over kept tiles and its column sums, in Triton, against float64."""

from __future__ import annotations

import pytest
import torch

from fewer.kernels.tile_attention import EVERYTHING
from fewer.kernels.triton.tile_attention import Blocks, attend_tiles, blocks_for, column_sums
from tests.kernels.attention_problems import TileProblem, assert_equal, random_tile_lists, tile_problem
from tests.kernels.test_tile_attention import rule

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # the interpreter's log2 of 0
BLOCKS = Blocks(16, 16, warps=4, stages=2)


def check(
    case: TileProblem, device: torch.device, blocks: Blocks | None = BLOCKS, softcap: float | None = None
) -> None:  # fmt: skip
    wanted, case = case.answer(0.3, softcap), case.to(device)
    arguments = case.start, case.tiles, 0.3, softcap, case.causal, blocks
    out, lse = attend_tiles(case.q, case.k, case.v, *arguments)
    sums = column_sums(case.q, case.k, lse, case.weights, *arguments)
    assert_equal((out, lse, sums), wanted)


@pytest.mark.parametrize("blocks", [Blocks(32, 16, 4, 2), Blocks(16, 32, 4, 2)])
def test_every_head_has_its_own_sinks_and_window(blocks: Blocks, device: torch.device) -> None:
    tiles = rule([0, 4, 4, 50, 2, 17], [EVERYTHING, 7, 1, 20, 48, 33])
    check(tile_problem(tiles, 50, 75, 25, 3, batch=1), device, blocks)


def test_rows_may_start_at_different_positions(device: torch.device) -> None:
    check(tile_problem(rule([4, 4], [9, 50]), 20, 64, torch.tensor([40, 3]).int(), 1), device, softcap=2.0)


@pytest.mark.parametrize("head_dim", [48, 128])
def test_one_query_and_one_key(head_dim: int, device: torch.device) -> None:
    check(tile_problem(rule([0, 0], [EVERYTHING, 1]), 1, 1, 0, 1, head_dim), device)
    check(tile_problem(rule([0, 0], [EVERYTHING, 1]), 1, 17, 16, 1, head_dim), device)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tile_sizes", [(16, 16), (32, 16), (16, 32)])
def test_tile_lists(tile_sizes: tuple[int, int], causal: bool, device: torch.device) -> None:
    check(tile_problem(random_tile_lists(45, 60, 2, 2, *tile_sizes), 45, 60, 15, 1, causal=causal), device, None)


def test_bfloat16_and_the_chosen_blocks(device: torch.device) -> None:
    case = tile_problem(rule([4, 4], [9, EVERYTHING]), 40, 40, 0, 1, 64, batch=1)
    q, k, v = (x.bfloat16() for x in (case.q, case.k, case.v))
    half = TileProblem(q, k, v, 0, case.tiles, True, case.weights)
    out, lse = attend_tiles(*(x.to(device) for x in (q, k, v)), 0, half.to(device).tiles, 0.3)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert_equal((out, lse), half.answer(0.3)[:2], tolerance=2**-6)
    assert blocks_for(half.tiles, 128, 2) == Blocks(128, 64, warps=8, stages=3)
