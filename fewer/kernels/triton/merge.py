"""Two parts of the attention over disjoint keys become one, in one pass over memory.

out = Σ exp(lse_i - lse)·out_i with lse = log Σ exp(lse_i), as in `fewer.kernels.attention.merge`.
"""
# mypy: allow-untyped-defs
# (the arguments of kernels are of Triton's language, not of Python)

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

TILE = 4096  # numbers of a program


@triton.jit
def merge_two(
    left, left_lse, right, right_lse, out, lse,
    left_b, left_h, left_t, right_b, right_h, right_t, out_b, out_h, out_t, queries,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of queries, HEADS, B). left, right and out [B, HEADS, T, HEAD_DIM] of these strides, lse
    [B, HEADS, T]."""
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    query = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, DIM)
    live = query < queries
    inside = live[:, None] & (channel < HEAD_DIM)[None, :]
    line = (row * HEADS + head) * queries + query
    first = tl.load(left_lse + line, mask=live, other=0.0)
    second = tl.load(right_lse + line, mask=live, other=0.0)
    top = tl.maximum(first, second)
    base = tl.where(top == float("-inf"), 0.0, top)  # neither part saw a key
    of_first, of_second = tl.exp(first - base), tl.exp(second - base)
    total = of_first + of_second
    tl.store(lse + line, tl.where(total > 0, base + tl.log(total), float("-inf")), mask=live)
    total = tl.where(total > 0, total, 1.0)
    at, place = query.to(tl.int64)[:, None], channel[None, :]
    one = tl.load(left + row * left_b + head * left_h + at * left_t + place, mask=inside, other=0.0).to(tl.float32)
    two = tl.load(right + row * right_b + head * right_h + at * right_t + place, mask=inside, other=0.0).to(tl.float32)
    # What a part without keys holds may not be finite: it weighs nothing.
    one = tl.where((of_first > 0)[:, None], one * (of_first / total)[:, None], 0.0)
    two = tl.where((of_second > 0)[:, None], two * (of_second / total)[:, None], 0.0)
    tl.store(out + row * out_b + head * out_h + at * out_t + place, (one + two).to(out.dtype.element_ty), mask=inside)


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """[(output [B, H, T, D], log-sum-exp [B, H, T] float32)], two or more -> the same over their union, in the first
    one's dtype and order of memory; float32 in between."""
    (out, lse), *others = [(out if out.stride(3) == 1 else out.contiguous(), lse) for out, lse in parts]
    dtype = out.dtype
    for index, (right, right_lse) in enumerate(others, 1):
        out, lse = _merge_two(out, lse, right, right_lse, dtype if index == len(others) else torch.float32)
    return out, lse


def _merge_two(
    left: Tensor, left_lse: Tensor, right: Tensor, right_lse: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(left, dtype=dtype)
    lse = torch.empty(left.shape[:3], device=left.device)
    batch, heads, queries, head_dim = left.shape
    if not out.numel():
        return out, lse
    dim = next_power_of_2(head_dim)
    block = min(next_power_of_2(queries), max(1, TILE // dim))
    merge_two[(triton.cdiv(queries, block), heads, batch)](
        left, left_lse.contiguous(), right, right_lse.contiguous(), out, lse, *left.stride()[:3], *right.stride()[:3],
        *out.stride()[:3], queries, heads, head_dim, dim, block,
    )  # fmt: skip
    return out, lse
