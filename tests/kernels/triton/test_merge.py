"""Merging parts in Triton, against the plain merge."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fewer.kernels.attention import merge as plain
from fewer.kernels.triton.merge import merge

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # the interpreter's log of 0


def parts_of(count: int, queries: int, head_dim: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    parts = []
    for index in range(count):
        out = torch.randn(2, queries, 3, head_dim, generator=generator)
        out = out.transpose(1, 2) if index % 2 else out.transpose(1, 2).contiguous()
        parts.append((out, 5 * torch.randn(2, 3, queries, generator=generator)))
    return parts


@pytest.mark.parametrize(("count", "queries", "head_dim"), [(2, 1, 16), (2, 70, 48), (3, 5, 128), (5, 33, 64)])
def test_parts_merge_as_they_do_plainly(count: int, queries: int, head_dim: int, device: torch.device) -> None:
    parts = parts_of(count, queries, head_dim)
    found = merge([(out.to(device), lse.to(device)) for out, lse in parts])
    for one, other in zip(found, plain(parts), strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-5, atol=1e-5)


def test_a_part_that_saw_nothing_weighs_nothing(device: torch.device) -> None:
    (out, lse), (other, _) = parts_of(2, 4, 32)
    blind = torch.full_like(other, math.nan), torch.full_like(lse, -math.inf)
    lse[0, 0, 0] = -math.inf
    parts = [(one.to(device), two.to(device)) for one, two in ((out, lse), blind)]
    for order in (parts, parts[::-1]):
        merged, total = (x.cpu() for x in merge(order))
        assert torch.equal(total, lse) and torch.equal(merged[0, 0, 0], torch.zeros(32))
        torch.testing.assert_close(merged[0, 0, 1:], out[0, 0, 1:])
        torch.testing.assert_close(merged[1], out[1])


def test_many_parts_of_sixteen_bits_are_rounded_once(device: torch.device) -> None:
    parts = [(out.bfloat16().to(device), lse.to(device)) for out, lse in parts_of(6, 9, 64)]
    merged = merge(parts)[0]
    assert merged.dtype == torch.bfloat16
    exact = plain([(out.float().cpu(), lse.cpu()) for out, lse in parts])[0]
    torch.testing.assert_close(merged.float().cpu(), exact, rtol=2**-7, atol=1e-6)  # the interpreter cuts bits off
