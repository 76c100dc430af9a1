"""The merge of one new token's attention over disjoint sets of keys, for any number of parts in one pass.

The parts of one launch lie side by side; the sum is that of `fewer.kernels.attention.merge`.
"""
# mypy: allow-untyped-defs
# (the arguments of kernels are of Triton's language, not of Python)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fewer.kernels.triton.attention import LOG2_E
from fewer.kernels.triton.gemv import wait_for_previous

BLOCK_BYTES = 8192  # of one part that a program holds


@triton.jit
def merge_heads(
    parts, lse, out, heads,
    PARTS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_H: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program h: heads h·BLOCK_H.. of parts [PARTS, heads, HEAD_DIM], lse [PARTS, heads] and out [heads, HEAD_DIM]."""
    head = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    channel = tl.arange(0, DIM)
    real = head < heads
    held = real[:, None] & (channel < HEAD_DIM)[None, :]
    place = head.to(tl.int64)[:, None] * HEAD_DIM + channel[None, :]
    wait_for_previous(PDL)
    top = tl.full([BLOCK_H], float("-inf"), tl.float32)
    for part in tl.static_range(PARTS):
        top = tl.maximum(top, tl.load(lse + part * heads + head, mask=real, other=float("-inf")))
    base = tl.where(top == float("-inf"), 0.0, top)  # no part has seen a key
    total = tl.zeros([BLOCK_H], tl.float32)
    result = tl.zeros([BLOCK_H, DIM], tl.float32)
    for part in tl.static_range(PARTS):
        logsum = tl.load(lse + part * heads + head, mask=real, other=float("-inf"))
        weight = tl.exp2((logsum - base) * LOG2_E)
        tile = tl.load(parts + heads * (part * HEAD_DIM) + place, mask=held, other=0.0)
        result += tl.where(weight[:, None] > 0, tile * weight[:, None], 0.0)  # what weighs nothing may hold anything
        total += weight
    result *= (1.0 / tl.where(total > 0, total, 1.0))[:, None]
    tl.store(out + place, result.to(out.dtype.element_ty), mask=held)


def merge_into(out: Tensor, parts: Tensor, lse: Tensor, pdl: bool = False) -> None:
    """parts [n, B, H, D] and their log-sum-exp [n, B, H], natural and float32 -> `out` [B, H·D], of any dtype.

    A part whose log-sum-exp is -inf weighs nothing, whatever it holds; where all are, the output is 0.
    """
    count, batch, heads, head_dim = parts.shape
    width = triton.next_power_of_2(head_dim)
    block = max(1, BLOCK_BYTES // (4 * width))
    options: dict[str, object] = {"launch_pdl": True} if pdl else {}
    merge_heads[(-(-batch * heads // block),)](
        parts, lse, out, batch * heads, count, head_dim, width, block, pdl, num_warps=4, **options
    )
