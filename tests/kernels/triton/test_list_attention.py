"""Attention of one new token over listed pages and tokens, in Triton, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fewer.kernels.list_attention import Unit
from fewer.kernels.triton.attention_decode import Tiling
from fewer.kernels.triton.list_attention import attend_list, tiling_for
from tests.kernels.attention_problems import ListProblem, assert_equal, list_problem
from tests.kernels.test_list_attention import LISTS

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # the interpreter's log2 of 0
TILING = Tiling(splits=3, programs=8, slots=16, stages=2)  # small enough that the lists below have one to three parts


def check(
    case: ListProblem, device: torch.device, tiling: Tiling | None = TILING, softcap: float | None = None,
    tolerance: float = 2e-5,
) -> None:  # fmt: skip
    found = attend_list(*case.arguments(device), 0.3, softcap, want_scores=True, tiling=tiling)
    assert_equal(found, case.answer(0.3, softcap), tolerance)


@pytest.mark.parametrize(("listed", "unit"), LISTS)
def test_lists_equal_float64_and_touch_nothing_else(listed: str, unit: Unit, device: torch.device) -> None:
    check(list_problem([37, 80, 0], listed, unit, 3), device)


@pytest.mark.parametrize("slots", [16, 32])  # within one page, and across pages
@pytest.mark.parametrize("splits", [1, 5])
def test_any_tiling_gives_the_same(slots: int, splits: int, device: torch.device) -> None:
    for listed in ("all", "key head"):
        check(list_problem([70, 33], listed), device, Tiling(splits, 100, slots, stages=2))


@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (7, 48), (4, 128)])
def test_groups_and_widths(group: int, head_dim: int, device: torch.device) -> None:
    check(list_problem([45], "key head", group=group, head_dim=head_dim), device, softcap=1.5)


@pytest.mark.parametrize(("listed", "unit"), [("all", "page"), ("query head", "token")])
def test_a_contiguous_cache_is_one_page_a_row(listed: str, unit: Unit, device: torch.device) -> None:
    case = list_problem([30, 64], listed, unit, page_size=64, pages=1, poison=False)
    check(replace(case, table=torch.arange(2, dtype=torch.int32)[:, None]).poisoned(), device)


def test_lists_of_very_unequal_length_share_the_programs(device: torch.device) -> None:
    case = list_problem([80, 80], "key head", "token", poison=False)
    lists = torch.stack([torch.randperm(80) for _ in range(4)]).view(2, 2, 80).int()
    counts = torch.tensor([[1, 80], [0, 17]], dtype=torch.int32)
    check(replace(case, lists=lists, counts=counts).poisoned(), device, Tiling(5, 4, 16, stages=2))


def test_without_counts_negative_entries_end_a_list(device: torch.device) -> None:
    case = list_problem([70, 44], "key head")
    found = attend_list(*replace(case, counts=None).arguments(device), 0.3, tiling=TILING)
    assert_equal(found[:2], case.answer(0.3)[:2])


def test_bfloat16_storage(device: torch.device) -> None:
    case = list_problem([37, 80], "key head", head_dim=64)
    case = replace(case, **{name: getattr(case, name).bfloat16() for name in ("q", "keys", "values")})
    check(case, device, tolerance=2**-7)


def test_the_chosen_tiling_fills_the_gpu_and_covers_the_lists(device: torch.device) -> None:
    check(list_problem([70, 33], "key head"), device, tiling=None)
    assert tiling_for(8, 262144, True, 256, 262144, 132) == Tiling(33, 264, 64, stages=3)  # one wave of two programs
    assert tiling_for(8, 262144, False, 256, 64, 132) == Tiling(132, 264, 64, stages=3)
    assert tiling_for(8, 4096, True, 256, 262144, 132) == Tiling(16, 132, 128, stages=2)  # one program
    assert tiling_for(8, 64, False, 256, 64, 132).splits == 1  # none shorter than a step
