"""New tokens before attention over packed rows: queries and keys turned, keys and values rounded to 16, 8 or 4 bits and
put in the page or the ring that their head keeps, bounds of the logical page widened.

The rows are those of `fewer.cache.quantised_pages.RowLayout`, bit by bit: both numbers of a scale are rounded to
float16 before codes are chosen. Where a token goes follows from its position, so nothing changes from step to step but
the positions and, when a page begins, the table.
"""
# mypy: allow-untyped-defs
# (the arguments of kernels are of Triton's language, not of Python)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from fewer.kernels.head_stores import HeadStores
from fewer.kernels.new_tokens import NewTokens
from fewer.kernels.triton.gemv import wait_for_previous

LARGEST = tl.constexpr(65504.0)  # float16's
ROUNDER = tl.constexpr(12582912.0)  # 1.5·2^23: added and taken off again, it leaves the nearest integer, even at ties


@triton.jit
def normalised(vector, channel, inside, gain, inverse, NORM: tl.constexpr):
    """Channels of heads at pointers `vector`, float32, RMS-normalised."""
    x = tl.load(vector + channel, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        x *= inverse * tl.load(gain + channel, mask=inside, other=0.0)
    return x


@triton.jit
def turned(vector, channel, inside, gain, inverse, angles, ROTARY_DIM: tl.constexpr, NORM: tl.constexpr):
    """`normalised`, turned: `angles` points at cos and sin of every pair of channels 2i and 2i + 1. Any channels may be
    asked for, half a head as well as a whole one."""
    x = normalised(vector, channel, inside, gain, inverse, NORM)
    if ROTARY_DIM > 0:
        partner = normalised(vector, channel ^ 1, inside, gain, inverse, NORM)
        at, rotates = angles + channel // 2 * 2, inside & (channel < ROTARY_DIM)
        cosine, sine = tl.load(at, mask=rotates, other=1.0), tl.load(at + 1, mask=rotates, other=0.0)
        x = x * cosine + partner * tl.where(channel % 2 == 0, -sine, sine)
    return x


@triton.jit
def inverse_rms(vector, channel, inside, eps, HEAD_DIM: tl.constexpr, NORM: tl.constexpr):
    """Of heads [n, 1] pointers `vector`, over all channels [1, DIM] -> [n, 1]; without NORM nothing is read."""
    if NORM:
        whole = tl.load(vector + channel, mask=inside, other=0.0).to(tl.float32)
        return tl.rsqrt(tl.sum(whole * whole, 1) / HEAD_DIM + eps)[:, None]
    else:
        return tl.zeros([vector.shape[0], 1], tl.float32)


@triton.jit
def pack_row(row, left, right, channel, held, HEAD_DIM: tl.constexpr, BITS: tl.constexpr):
    """Store channels 0..D/2-1 (`left`) and D/2..D-1 (`right`), float32, as one row of RowLayout at `row`."""
    HALF_DIM: tl.constexpr = HEAD_DIM // 2
    if BITS == 16:
        tl.store(row + channel, left.to(row.dtype.element_ty), mask=held)
        tl.store(row + HALF_DIM + channel, right.to(row.dtype.element_ty), mask=held)
    else:
        TOP: tl.constexpr = (1 << BITS) - 1
        infinity = float("inf")
        lowest = tl.min(tl.minimum(tl.where(held, left, infinity), tl.where(held, right, infinity)), 0)
        highest = tl.max(tl.maximum(tl.where(held, left, -infinity), tl.where(held, right, -infinity)), 0)
        low = tl.minimum(tl.maximum(lowest, -LARGEST), LARGEST).to(tl.float16)
        begin = low.to(tl.float32)
        scale = tl.minimum(tl.math.div_rn(highest - begin, TOP * 1.0), LARGEST).to(tl.float16)
        step = scale.to(tl.float32)
        step = tl.where(step == 0.0, 1.0, step)
        first = tl.math.div_rn(left - begin, tl.broadcast_to(step, left.shape))
        second = tl.math.div_rn(right - begin, tl.broadcast_to(step, right.shape))
        first = ((tl.minimum(tl.maximum(first, 0.0), TOP) + ROUNDER) - ROUNDER).to(tl.uint8)
        second = ((tl.minimum(tl.maximum(second, 0.0), TOP) + ROUNDER) - ROUNDER).to(tl.uint8)
        if BITS == 4:  # channel c and channel c + D/2 share byte c
            tl.store(row + channel, first | (second << 4), mask=held)
        else:
            tl.store(row + channel, first, mask=held)
            tl.store(row + HALF_DIM + channel, second, mask=held)
        tail = (row + HEAD_DIM * BITS // 8).to(tl.pointer_type(tl.float16))
        tl.store(tail, scale)
        tl.store(tail + 1, low)


@triton.jit
def widen(bounds, key, channel, held, first, HEAD_DIM: tl.constexpr):
    """Largest and smallest of a logical page, with one more key; its first token is assigned, so that nothing stays of
    what a recycled page held."""
    new = key.to(bounds.dtype.element_ty)
    largest = tl.load(bounds + channel, mask=held, other=0.0)
    smallest = tl.load(bounds + HEAD_DIM + channel, mask=held, other=0.0)
    tl.store(bounds + channel, tl.where(first, new, tl.maximum(largest, new)), mask=held)
    tl.store(bounds + HEAD_DIM + channel, tl.where(first, new, tl.minimum(smallest, new)), mask=held)


@triton.jit
def pack_new(
    projected, positions, queries, homes, pages, table, bounds, ring, rotary, q_gain, k_gain, eps, sinks, window,
    page_values, stride_page, stride_head, stride_table, bounds_page, ring_values, stride_row, stride_ring_head,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, DIM: tl.constexpr,
    HALF: tl.constexpr, GROUP_P: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, PAGE_SIZE: tl.constexpr,
    LOGICAL: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (KV_HEADS, B): one key head and the queries of its group. projected [B, HEADS + 2·KV_HEADS, HEAD_DIM],
    queries [B, HEADS, HEAD_DIM]; `page_values` and `ring_values`: numbers from a key to its value."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    HALF_DIM: tl.constexpr = HEAD_DIM // 2
    kv_head, row = tl.program_id(0), tl.program_id(1)
    home, position = tl.load(homes + kv_head), tl.load(positions + row)
    page = tl.load(table + row.to(tl.int64) * stride_table + position // PAGE_SIZE, mask=home >= 0, other=0)
    angles = rotary + position.to(tl.int64) * ROTARY_DIM
    wait_for_previous(PDL)
    base = projected + row.to(tl.int64) * ((HEADS + 2 * KV_HEADS) * HEAD_DIM)
    every = tl.arange(0, DIM)[None, :]
    member = tl.arange(0, GROUP_P)[:, None]
    inside = (every < HEAD_DIM) & (member < GROUP)
    vector = base + (kv_head * GROUP + member) * HEAD_DIM
    inverse = inverse_rms(vector, every, inside, eps, HEAD_DIM, NORM)
    q = turned(vector, every, inside, q_gain, inverse, angles, ROTARY_DIM, NORM)
    to_query = queries + (row.to(tl.int64) * HEADS + kv_head * GROUP + member) * HEAD_DIM + every
    tl.store(to_query, q.to(queries.dtype.element_ty), mask=inside)

    channel = tl.arange(0, HALF)
    held = channel < HALF_DIM
    vector = base + (HEADS + kv_head) * HEAD_DIM
    inverse = inverse_rms(vector + tl.zeros([1, 1], tl.int32), every, every < HEAD_DIM, eps, HEAD_DIM, NORM)
    inverse = tl.sum(tl.sum(inverse, 1), 0)
    left = turned(vector, channel, held, k_gain, inverse, angles, ROTARY_DIM, NORM)
    right = turned(vector, HALF_DIM + channel, held, k_gain, inverse, angles, ROTARY_DIM, NORM)
    # As the general path does: of the model's own dtype before they are rounded further.
    left = left.to(projected.dtype.element_ty).to(tl.float32)
    right = right.to(projected.dtype.element_ty).to(tl.float32)
    vector += KV_HEADS * HEAD_DIM
    left_value = tl.load(vector + channel, mask=held, other=0.0).to(tl.float32)
    right_value = tl.load(vector + HALF_DIM + channel, mask=held, other=0.0).to(tl.float32)
    if home >= 0:
        offset = position % PAGE_SIZE
        place = pages + page.to(tl.int64) * stride_page + home.to(tl.int64) * stride_head + offset * WIDTH
        pack_row(place, left, right, channel, held, HEAD_DIM, BITS)
        pack_row(place + page_values, left_value, right_value, channel, held, HEAD_DIM, BITS)
        logical = home * ((PAGE_SIZE + LOGICAL - 1) // LOGICAL) + offset // LOGICAL
        bounds += page.to(tl.int64) * bounds_page + logical * (2 * HEAD_DIM)
        widen(bounds, left, channel, held, offset % LOGICAL == 0, HEAD_DIM)
        widen(bounds + HALF_DIM, right, channel, held, offset % LOGICAL == 0, HEAD_DIM)
    else:
        slot = tl.where(position < sinks, position, sinks + (position - sinks) % window)
        place = ring + row.to(tl.int64) * stride_row + (-1 - home).to(tl.int64) * stride_ring_head + slot * WIDTH
        pack_row(place, left, right, channel, held, HEAD_DIM, BITS)
        pack_row(place + ring_values, left_value, right_value, channel, held, HEAD_DIM, BITS)


def pack_and_turn(new: NewTokens, stores: HeadStores) -> Tensor:
    """Store the new token of every row -> its queries [B, H, D], turned, in the dtype of the projections."""
    head_dim, fusion, pages, ring = new.head_dim, new.fusion, stores.pages, stores.ring
    queries = torch.empty(new.batch, new.heads, head_dim, dtype=new.projected.dtype, device=new.projected.device)
    table, q_gain, k_gain = fusion.table, fusion.q_gain, fusion.k_gain
    options: dict[str, object] = {"launch_pdl": True} if new.pdl else {}
    pack_new[(new.kv_heads, new.batch)](
        new.projected, new.positions, queries, stores.homes, pages, stores.table, stores.bounds, ring,
        queries if table is None else table, queries if q_gain is None else q_gain,
        queries if k_gain is None else k_gain, fusion.eps, stores.sinks, stores.window,
        pages.stride(0), pages.stride(1), pages.stride(2), stores.table.stride(0), stores.bounds.stride(0),
        ring.stride(0), ring.stride(1), ring.stride(2),
        new.heads, new.kv_heads, head_dim, 0 if table is None else fusion.rotary_dim, next_power_of_2(head_dim),
        next_power_of_2(head_dim // 2), next_power_of_2(new.heads // new.kv_heads), stores.width, stores.bits,
        stores.page_size, stores.logical_size, q_gain is not None, new.pdl, num_warps=1, **options,
    )  # fmt: skip
    return queries
