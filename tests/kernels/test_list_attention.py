"""Attention of one new token over listed pages and tokens, on the CPU, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fewer.kernels.attention import merge
from fewer.kernels.list_attention import Unit, attend_list, probabilities
from tests.kernels.attention_problems import assert_equal, list_problem

LISTS: list[tuple[str, Unit]] = [
    ("all", "page"), ("key head", "page"), ("query head", "page"), ("key head", "token"), ("query head", "token"),
]  # fmt: skip


@pytest.mark.parametrize(("listed", "unit"), LISTS)
@pytest.mark.parametrize("group", [1, 3, 7])
def test_lists_equal_float64_and_touch_nothing_else(listed: str, unit: Unit, group: int) -> None:
    case = list_problem([37, 80, 1], listed, unit, group)  # 37 leaves a page partially filled
    found = attend_list(*case.arguments(), 0.3, want_scores=True)
    assert_equal(found, case.answer(0.3))
    assert torch.isfinite(found.out).all()


@pytest.mark.parametrize("head_dim", [64, 128])
def test_scores_are_capped(head_dim: int) -> None:
    case = list_problem([50, 3], "key head", head_dim=head_dim)
    assert_equal(attend_list(*case.arguments(), 0.3, 1.5, want_scores=True), case.answer(0.3, 1.5))


def test_a_contiguous_cache_is_one_page_a_row() -> None:
    case = list_problem([30, 64], "key head", "token", page_size=64, pages=1, poison=False)
    case = replace(case, table=torch.arange(2, dtype=torch.int32)[:, None])
    for one in (case.poisoned(), replace(case, lists=None, counts=None).poisoned()):
        assert_equal(attend_list(*one.arguments(), 0.3), one.answer(0.3)[:2])


def test_lists_of_very_unequal_length_are_each_read_to_their_end() -> None:
    case = list_problem([80, 80], "query head", "token", group=3, poison=False)
    counts = torch.tensor([[1, 79, 2, 40, 0, 3], [5, 5, 5, 64, 1, 9]], dtype=torch.int32)
    lists = torch.stack([torch.randperm(80)[:79] for _ in range(12)]).view(2, 6, 79).int()
    case = replace(case, lists=lists, counts=counts).poisoned()
    assert_equal(attend_list(*case.arguments(), 0.3, want_scores=True), case.answer(0.3))


def test_a_row_without_tokens_and_a_head_without_entries_are_empty_parts() -> None:
    case = list_problem([20, 0], "key head", group=1)
    out, lse, scores = attend_list(*case.arguments(), 0.3, want_scores=True)
    assert scores is not None
    for empty in ((1, slice(None)), (0, 0)):  # no token; a list of no pages
        assert torch.equal(out[empty], torch.zeros_like(out[empty]))
        assert (lse[empty] == -torch.inf).all() and (scores[empty] == -torch.inf).all()
    assert not probabilities(scores, lse)[1].any()


def test_without_counts_negative_entries_end_a_list() -> None:
    case = list_problem([70, 44], "key head")
    assert_equal(attend_list(*replace(case, counts=None).arguments(), 0.3), case.answer(0.3)[:2])


def test_probabilities_sum_to_one_and_give_the_output() -> None:
    case = list_problem([60], "query head", "token")
    out, lse, scores = attend_list(*case.arguments(), 0.3, want_scores=True)
    assert scores is not None
    shares = probabilities(scores, lse)
    torch.testing.assert_close(shares.sum(-1)[0, 1:], torch.ones(3))
    at = case.positions(0, 3)
    values = case.values[case.table[0], 1].reshape(-1, 32)[at].masked_fill(at[:, None] < 0, 0)
    torch.testing.assert_close(shares[0, 3] @ values, out[0, 3])


def test_lists_that_divide_the_tokens_merge_to_all_of_them() -> None:
    whole = list_problem([77, 40], "all")
    order = torch.stack([torch.randperm(5) for _ in range(4)]).view(2, 2, 5).int()
    parts = [
        attend_list(*replace(whole, lists=pages.contiguous()).arguments(), 0.3)[:2] for pages in order.split([2, 3], -1)
    ]
    assert_equal(merge(parts), whole.answer(0.3)[:2])


def test_bfloat16_storage_gives_float32_parts() -> None:
    case = list_problem([37, 80], "key head")
    case = replace(case, **{name: getattr(case, name).bfloat16() for name in ("q", "keys", "values")})
    found = attend_list(*case.arguments(), 0.3)
    assert found.out.dtype == torch.float32
    assert_equal(found, case.answer(0.3)[:2])
