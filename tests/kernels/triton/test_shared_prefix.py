"""Attention over shared prefixes, in Triton, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fewer.kernels.attention import attend
from fewer.kernels.triton.shared_prefix import Blocks, attend_prefix, blocks_for, launch, splits_for
from tests.kernels.attention_problems import PrefixProblem, assert_equal, prefix_problem

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # the interpreter's log2 of 0
BLOCKS = Blocks(rows=16, keys=16, splits=2, warps=4, stages=2)


def check(
    case: PrefixProblem, device: torch.device, blocks: Blocks | None = BLOCKS, softcap: float | None = None,
    tolerance: float = 2e-5,
) -> None:  # fmt: skip
    found = attend_prefix(*case.arguments(device), 0.3, softcap, blocks)
    assert_equal(found, case.answer(0.3, softcap), tolerance)


@pytest.mark.parametrize("blocks", [BLOCKS, Blocks(16, 32, 1, 4, 2), Blocks(32, 16, 3, 4, 2)])
def test_ragged_groups_of_prefixes(blocks: Blocks, device: torch.device) -> None:
    check(prefix_problem([7, 1, 0, 9], [77, 16, 30, 0], 3), device, blocks)


@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (7, 48), (3, 128)])
def test_groups_of_heads_and_widths(group: int, head_dim: int, device: torch.device) -> None:
    check(prefix_problem([3, 2], [40, 1], group, head_dim), device, softcap=2.0)


def test_a_prefix_in_one_page(device: torch.device) -> None:
    check(prefix_problem([4], [75], page_size=80, pages=1), device)


def test_bfloat16_and_the_chosen_blocks(device: torch.device) -> None:
    case = prefix_problem([5, 2], [80, 33], head_dim=64)
    case = replace(case, **{name: getattr(case, name).bfloat16() for name in ("q", "keys", "values")})
    check(case, device, blocks=None, tolerance=2**-7)
    assert blocks_for(1024, 8, 4, 128, 2, 1, 16384, 132) == Blocks(64, 64, 1, 4, 3)  # 512 programs
    assert blocks_for(256, 8, 4, 128, 2, 1, 16384, 132) == Blocks(128, 64, 4, 4, 2)  # 256 programs
    assert splits_for(8, 64, 132) == 15  # 120 programs


def test_pages_may_overlap(device: torch.device) -> None:
    """Prefixes of 13 and 47 tokens behind one another: a page begins at any token, and reaches over the next ones."""
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(2, 2, 60, 64, generator=generator).to(device)  # keys and values [Hk, tokens, D]
    keys, values = (part.as_strided((14, 2, 47, 64), (64, 60 * 64, 64, 1), part.storage_offset()) for part in flat)
    q = torch.randn(5, 6, 64, generator=generator).to(device)
    table, lengths, pointers = (
        torch.tensor(part, dtype=torch.int32, device=device) for part in ([[0], [13]], [13, 47], [0, 2, 5])
    )
    found = attend_prefix(q, keys, values, table, lengths, pointers, 0.3, None, BLOCKS)
    for rows, tokens in ((slice(2), slice(13)), (slice(2, 5), slice(13, 60))):
        k, v = flat[:, None, :, tokens]
        out, lse = attend(q[rows].transpose(0, 1)[None], k, v, 0.3)  # [1, H, rows, D]
        wanted = out[0].transpose(0, 1).double().cpu(), lse[0].t().double().cpu()
        assert_equal((found[0][rows], found[1][rows]), wanted, 2e-5)


@pytest.mark.parametrize("blocks", [BLOCKS, Blocks(16, 32, 1, 4, 2)])
def test_groups_may_be_made_of_some_rows_in_any_order(blocks: Blocks, device: torch.device) -> None:
    """Rows of no group keep what lies in their place."""
    case = prefix_problem([3, 2], [70, 33], 3)
    members = torch.tensor([5, 0, 2, 6, 3])
    q = torch.zeros(7, *case.q.shape[1:])
    q[members] = case.q
    found = torch.full(q.shape, 7.0, device=device), torch.full(q.shape[:2], 7.0, device=device)
    _, *rest = case.arguments(device)
    launch(q.to(device), *rest, *found, 0.3, None, members.to(device), blocks)
    assert_equal(tuple(part[members.to(device)] for part in found), case.answer(0.3, None), 2e-5)
    assert all(bool((part[[1, 4]] == 7).all()) for part in found)
