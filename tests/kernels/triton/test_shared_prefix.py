"""Attention over shared prefixes, in Triton, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fewer.kernels.triton.shared_prefix import Blocks, attend_prefix, blocks_for, splits_for
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
    assert blocks_for(1024, 8, 4, 128, 2, 1, 16384, 132) == Blocks(128, 64, 1, 8, 3)  # 256 programs: 1.94 waves
    assert splits_for(8, 64, 132) == 15  # 120 programs
