"""New tokens before attention: queries normalised and turned, keys and values put where a cache wants them.

For caches whose attention is a kernel of its own; over contiguous keys `fewer.kernels.triton.attention` does it, too.
"""
# mypy: allow-untyped-defs
# (the arguments of kernels are of Triton's language, not of Python)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from fewer.kernels.new_tokens import NewTokens
from fewer.kernels.triton.attention import angle, turn
from fewer.kernels.triton.gemv import wait_for_previous


@triton.jit
def turn_new(
    projected, positions, queries, keys, values, places, table, q_gain, k_gain, eps,
    stride_row, stride_head, stride_slot,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, DIM: tl.constexpr,
    GROUP_P: tl.constexpr, PLACED: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (KV_HEADS, B): one key head and the queries of its group. projected [B, HEADS + 2·KV_HEADS, HEAD_DIM],
    queries [B, HEADS, HEAD_DIM], places [B, KV_HEADS] int64: elements from `keys` and `values` to the new token's.
    Not PLACED: the new token goes to the slot of its position."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    ROTATE: tl.constexpr = ROTARY_DIM > 0
    kv_head, row = tl.program_id(0), tl.program_id(1)
    channel = tl.arange(0, DIM)
    held = channel < HEAD_DIM
    cosine, sine = eps, eps
    position = tl.load(positions + row)
    if ROTATE:
        cosine, sine = angle(table, position, ROTARY_DIM, DIM)
    wait_for_previous(PDL)
    place = row.to(tl.int64) * stride_row + kv_head.to(tl.int64) * stride_head + position.to(tl.int64) * stride_slot
    if PLACED:
        place = tl.load(places + row * KV_HEADS + kv_head)
    base = projected + row.to(tl.int64) * ((HEADS + 2 * KV_HEADS) * HEAD_DIM)
    member = tl.arange(0, GROUP_P)
    head = kv_head * GROUP + member
    from_head = base + (kv_head * GROUP + tl.minimum(member, GROUP - 1))[:, None] * HEAD_DIM
    q = turn(from_head, q_gain, cosine, sine, eps, HEAD_DIM, ROTATE, DIM, NORM)
    to_head = queries + (row.to(tl.int64) * HEADS + head)[:, None] * HEAD_DIM + channel[None, :]
    tl.store(to_head, q.to(queries.dtype.element_ty), mask=(member < GROUP)[:, None] & held[None, :])
    lane = tl.arange(0, 1)[:, None]
    k = turn(base + (HEADS + kv_head) * HEAD_DIM + lane, k_gain, cosine, sine, eps, HEAD_DIM, ROTATE, DIM, NORM)
    v = tl.load(base + (HEADS + KV_HEADS + kv_head) * HEAD_DIM + channel, mask=held, other=0.0)
    tl.store(keys + place + lane + channel[None, :], k.to(keys.dtype.element_ty), mask=held[None, :])
    tl.store(values + place + channel, v.to(values.dtype.element_ty), mask=held)


def turn_and_store(new: NewTokens, keys: Tensor, values: Tensor, places: Tensor | None = None) -> Tensor:
    """-> queries [B, H, D] in the keys' dtype, turned. Key head h of row b goes to keys + places[b, h] (int64 elements,
    [B, Hk] contiguous), its value to the same distance from `values`; their channels are contiguous. Without places,
    keys and values are [B, Hk, S, D] of equal strides, and slots are positions."""
    head_dim, fusion = new.head_dim, new.fusion
    queries = torch.empty(new.batch, new.heads, head_dim, dtype=keys.dtype, device=keys.device)
    table, q_gain, k_gain = fusion.table, fusion.q_gain, fusion.k_gain
    options: dict[str, object] = {"launch_pdl": True} if new.pdl else {}
    strides = keys.stride()[:3] if places is None else (0, 0, 0)
    turn_new[(new.kv_heads, new.batch)](
        new.projected, new.positions, queries, keys, values, new.positions if places is None else places,
        queries if table is None else table, queries if q_gain is None else q_gain,
        queries if k_gain is None else k_gain, fusion.eps, *strides,
        new.heads, new.kv_heads, head_dim, 0 if table is None else fusion.rotary_dim,
        max(16, next_power_of_2(head_dim)), next_power_of_2(new.heads // new.kv_heads), places is not None,
        q_gain is not None, new.pdl,
        num_warps=2, **options,
    )  # fmt: skip
    return queries
