"""Attention over shared prefixes on the CPU: every row as if it had its own copy, in float64."""

from __future__ import annotations

import pytest
import torch

from fewer.kernels.attention import merge
from fewer.kernels.list_attention import attend_list
from fewer.kernels.shared_prefix import attend_prefix
from tests.kernels.attention_problems import assert_equal, list_problem, prefix_problem


@pytest.mark.parametrize("group", [1, 3, 7])
@pytest.mark.parametrize(("page_size", "pages"), [(16, 5), (80, 1)])
def test_ragged_groups_of_prefixes(group: int, page_size: int, pages: int) -> None:
    case = prefix_problem([5, 1, 0, 9], [77, 16, 30, 1], group, page_size=page_size, pages=pages)
    assert_equal(attend_prefix(*case.arguments(), 0.3), case.answer(0.3))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_scores_are_capped(head_dim: int) -> None:
    case = prefix_problem([6], [80], head_dim=head_dim)
    assert_equal(attend_prefix(*case.arguments(), 0.3, 2.0), case.answer(0.3, 2.0))


def test_rows_that_share_nothing_are_empty_parts() -> None:
    case = prefix_problem([2, 3], [0, 40])
    out, lse = attend_prefix(*case.arguments(), 0.3)
    assert torch.equal(out[:2], torch.zeros_like(out[:2])) and (lse[:2] == -torch.inf).all()
    assert_equal((out, lse), case.answer(0.3))


def test_prefix_and_suffix_merge_to_the_whole() -> None:
    """Rows 0 and 1 share two pages and have two more of their own; row 2 has no shared ones."""
    whole = list_problem([60, 50, 20], "all", pages=4, poison=False)
    whole.table[1, :2] = whole.table[0, :2]
    q, keys, values, table, *_, lengths = whole.arguments()
    pointers = torch.tensor([0, 2, 3], dtype=torch.int32)
    prefix = attend_prefix(q, keys, values, table[[0, 2], :2], torch.tensor([32, 0]), pointers, 0.3)
    shared = torch.tensor([32, 32, 0])
    own = torch.stack([table[0].roll(-2), table[1].roll(-2), table[2]])
    suffix = attend_list(q, keys, values, own, None, None, "page", lengths - shared, 0.3)[:2]
    assert_equal(merge([prefix, suffix]), whole.answer(0.3)[:2])
