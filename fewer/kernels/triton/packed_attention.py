"""Attention of one new token a row over packed rows: listed pages in retrieval heads, the ring in streaming ones, one
launch for all heads of a layer.

Program (split, query head, row) walks a run of its head's tokens. One query meets each key, so nothing is gained from
tensor cores, and nothing is exchanged inside the loop: every lane of a tile has a running softmax of its own, with the
values summed beside it, and lanes are merged once at the end. Codes are multiplied as they are; the numbers that belong
to a whole row of D, its scale and its lowest value, act on sums:

    q·k = scale·Σ q_c code_c + low·Σ q_c,      Σ_s p_s v_s = Σ_s (p_s scale_s) code_s + Σ_s p_s low_s

A row is read in two halves, channels below D/2 and the others: byte c of a 4-bit row holds channels c and c + D/2.
The query heads that share a list read it one by one: the cache between them and memory serves all but the first. The
last split of a (row, head) to finish merges the parts, as in `fewer.kernels.triton.attention`.
"""
# mypy: allow-untyped-defs
# (the arguments of kernels are of Triton's language, not of Python)

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from fewer.kernels.head_stores import HeadStores
from fewer.kernels.new_tokens import NewTokens, processors
from fewer.kernels.triton.attention import LOG2_E, cap, merge_parts
from fewer.kernels.triton.gemv import wait_for_previous


@triton.jit
def spread_nibbles(packed, ON_CPU: tl.constexpr):
    """uint8 -> 128 + its low nibble and 128 + its high one, float32: the nibble under the exponent of 128."""
    if ON_CPU:
        return (packed & 15).to(tl.float32) + 128.0, (packed >> 4).to(tl.float32) + 128.0
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 low, high;
        and.b32 low, $8, 0x0F0F0F0F;
        shr.b32 high, $8, 4;
        and.b32 high, high, 0x0F0F0F0F;
        prmt.b32 $0, low, 0x43000000, 0x7044;
        prmt.b32 $1, low, 0x43000000, 0x7144;
        prmt.b32 $2, low, 0x43000000, 0x7244;
        prmt.b32 $3, low, 0x43000000, 0x7344;
        prmt.b32 $4, high, 0x43000000, 0x7044;
        prmt.b32 $5, high, 0x43000000, 0x7144;
        prmt.b32 $6, high, 0x43000000, 0x7244;
        prmt.b32 $7, high, 0x43000000, 0x7344;
        }""",
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r", [packed], (tl.float32, tl.float32), is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def centred_bytes(packed, ON_CPU: tl.constexpr):
    """uint8 -> its number less 128, float32."""
    if ON_CPU:
        return packed.to(tl.float32) - 128.0
    raised = tl.inline_asm_elementwise(
        """{
        prmt.b32 $0, $4, 0x47000000, 0x7404;
        prmt.b32 $1, $4, 0x47000000, 0x7414;
        prmt.b32 $2, $4, 0x47000000, 0x7424;
        prmt.b32 $3, $4, 0x47000000, 0x7434;
        }""",
        "=&r,=&r,=&r,=&r,r", [packed], tl.float32, is_pure=True, pack=4,
    )  # fmt: skip
    return raised - 32896.0  # 32,768 + code, less 32,896


@triton.jit
def half_rows(rows, seen, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, BITS: tl.constexpr, ON_CPU: tl.constexpr):
    """Packed rows at pointers `rows` [S] -> codes of their two halves [S, HALF] float32, and scale and shift [S], with
    which x = scale·code + shift. Of rows that are not `seen` nothing is read."""
    channel = tl.arange(0, HALF)
    inside = seen[:, None]
    if HALF * 2 != HEAD_DIM:
        inside = inside & (channel < HEAD_DIM // 2)[None, :]
    at = rows[:, None] + channel[None, :]
    if BITS == 4:
        left, right = spread_nibbles(tl.load(at, mask=inside, other=0), ON_CPU)
    else:
        first, second = tl.load(at, mask=inside, other=0), tl.load(at + HEAD_DIM // 2, mask=inside, other=0)
        if BITS == 8:
            left, right = centred_bytes(first, ON_CPU), centred_bytes(second, ON_CPU)
        else:
            left, right = first.to(tl.float32), second.to(tl.float32)
    if BITS == 16:
        scale, shift = tl.full(seen.shape, 1.0, tl.float32), tl.zeros(seen.shape, tl.float32)
    else:
        tail = (rows + HEAD_DIM * BITS // 8).to(tl.pointer_type(tl.float16))
        scale = tl.load(tail, mask=seen, other=0.0).to(tl.float32)
        shift = tl.load(tail + 1, mask=seen, other=0.0).to(tl.float32) + scale * (128.0 if BITS == 8 else -128.0)
    return left, right, scale, shift


@triton.jit
def listed_page(lists, table, index, begins, ends, chosen, PAGE_SIZE: tl.constexpr):
    """Physical page of token `index` of a list, and its logical one; without `chosen`, of a list of all pages."""
    wanted = (index >= begins) & (index < ends)
    at = index // PAGE_SIZE
    logical = tl.load(lists + at, mask=wanted & chosen, other=0)
    logical = tl.where(chosen, logical, at)
    return tl.load(table + logical, mask=wanted & (logical >= 0), other=0), logical


@triton.jit
def packed_attention(
    queries, positions, homes, pages, table, lists, ring, out, part_out, part_lse, tickets, scale, softcap,
    sinks, window, budget, run, page_values, stride_page, stride_head, stride_table, ring_values, stride_row,
    stride_ring_head, longest,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, LISTS: tl.constexpr, SHARED: tl.constexpr, HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, ALIGNED: tl.constexpr, BITS: tl.constexpr,
    PAGE_SIZE: tl.constexpr, BLOCK_S: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr,
    FRESH: tl.constexpr, SOFTCAP: tl.constexpr, ON_CPU: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (SPLITS, HEADS, B). queries [B, HEADS, HEAD_DIM] -> out of the same shape; `run` tokens a program, in tiles
    of BLOCK_S, which divides PAGE_SIZE.

    lists [B, LISTS, longest] int32: the pages of a query head, or SHARED of a group. Rows whose position is beyond
    `budget` read all but the first entry, shorter ones what they have. FRESH: the kernel in front wrote the lists.
    part_out [B, HEADS, SPLITS, DIM] float32, part_lse without DIM; tickets [B, HEADS] int32, zero before and after.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    HALF_DIM: tl.constexpr = HEAD_DIM // 2
    split, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    home, position = tl.load(homes + head // GROUP), tl.load(positions + row)
    streams, chosen = home < 0, position > budget
    length = position + 1
    # Tokens of a list are numbered through all its entries; the last page ends where the row does.
    begins = tl.where((home >= 0) & chosen, PAGE_SIZE, 0)
    ends = tl.where(streams, tl.minimum(length, sinks + window), length)
    if (home >= 0) & chosen:
        ends = (longest - 1) * PAGE_SIZE + position % PAGE_SIZE + 1
    active = tl.maximum(1, tl.cdiv(ends - begins, run))
    if FRESH:
        wait_for_previous(PDL)
    if split < active:
        first = begins + split * run
        last = tl.minimum(first + run, ends)
        own = home if SHARED else home * GROUP + head % GROUP
        lists += (row * LISTS + tl.maximum(own, 0)).to(tl.int64) * longest
        table += row.to(tl.int64) * stride_table
        stop = tl.where(streams, 0, last)
        page, logical = listed_page(lists, table, first, begins, stop, chosen, PAGE_SIZE)
        if not FRESH:
            wait_for_previous(PDL)
        if streams:
            keys = ring + row.to(tl.int64) * stride_row + (-1 - home).to(tl.int64) * stride_ring_head
        else:
            keys = pages + home.to(tl.int64) * stride_head
        to_value = tl.where(streams, ring_values, page_values)
        channel = tl.arange(0, HALF)
        held = channel < HALF_DIM
        vector = queries + (row * HEADS + head).to(tl.int64) * HEAD_DIM + channel
        q_left = tl.load(vector, mask=held, other=0.0).to(tl.float32)
        q_right = tl.load(vector + HALF_DIM, mask=held, other=0.0).to(tl.float32)
        q_sum = tl.sum(q_left + q_right, 0)
        lane = tl.arange(0, BLOCK_S)
        top = tl.full([BLOCK_S], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_S], tl.float32)
        shifts = tl.zeros([BLOCK_S], tl.float32)
        left = tl.zeros([BLOCK_S, HALF], tl.float32)
        right = tl.zeros([BLOCK_S, HALF], tl.float32)
        for start in tl.range(first, last, BLOCK_S, num_stages=1):
            next_page, next_logical = listed_page(lists, table, start + BLOCK_S, begins, stop, chosen, PAGE_SIZE)
            inside = tl.where(streams, start, start % PAGE_SIZE)
            place = tl.where(streams, 0, page.to(tl.int64) * stride_page) + inside * WIDTH
            rows = keys + tl.multiple_of(place, ALIGNED) + lane * WIDTH
            seen = start + lane < tl.where(logical >= 0, last, 0)
            k_left, k_right, k_scale, k_shift = half_rows(rows, seen, HEAD_DIM, HALF, BITS, ON_CPU)
            rows += tl.multiple_of(to_value, ALIGNED)
            v_left, v_right, v_scale, v_shift = half_rows(rows, seen, HEAD_DIM, HALF, BITS, ON_CPU)
            score = tl.sum(k_left * q_left[None, :] + k_right * q_right[None, :], 1)
            if BITS != 16:
                score = score * k_scale + k_shift * q_sum
            score = cap(score * scale, softcap, SOFTCAP) * LOG2_E
            score = tl.where(seen, score, float("-inf"))
            higher = tl.maximum(top, score)
            base = tl.where(higher == float("-inf"), 0.0, higher)
            weight, shrink = tl.exp2(score - base), tl.exp2(top - base)
            total = total * shrink + weight
            if BITS != 16:
                shifts = shifts * shrink + weight * v_shift
                weight *= v_scale
            left = left * shrink[:, None] + v_left * weight[:, None]
            right = right * shrink[:, None] + v_right * weight[:, None]
            top, page, logical = higher, next_page, next_logical
        highest = tl.max(top, 0)
        factor = tl.exp2(top - tl.where(highest == float("-inf"), 0.0, highest))
        whole = tl.sum(total * factor, 0)
        inverse = 1.0 / tl.where(whole > 0, whole, 1.0)
        shift = tl.sum(shifts * factor, 0)
        result_left = (tl.sum(left * factor[:, None], 0) + shift) * inverse
        result_right = (tl.sum(right * factor[:, None], 0) + shift) * inverse
        pair = row * HEADS + head
        if active == 1:
            final = out + pair.to(tl.int64) * HEAD_DIM + channel
            tl.store(final, result_left.to(out.dtype.element_ty), mask=held)
            tl.store(final + HALF_DIM, result_right.to(out.dtype.element_ty), mask=held)
        else:
            part = pair * SPLITS + split
            tl.store(part_out + part * DIM + channel, result_left, mask=held)
            tl.store(part_out + part * DIM + HALF_DIM + channel, result_right, mask=held)
            tl.store(part_lse + part, tl.where(whole > 0, highest + tl.log2(whole), float("-inf")))
            tl.debug_barrier()  # every thread's part is written before the ticket is drawn
            ticket = tl.atomic_add(tickets + pair, 1, sem="acq_rel")
            if ticket == active - 1:
                tl.store(tickets + pair, 0)
                merge_parts(
                    part_out, part_lse, out, part_lse, pair * SPLITS, pair, active, 1, 1, SPLITS, SPLITS, HEAD_DIM, DIM,
                    CHUNK, False,
                )  # fmt: skip


RESIDENT = 3  # programs that share a multiprocessor
TILE_BYTES = 8192  # of keys, and as many of values, that a program has on their way


def attend_packed(
    new: NewTokens, queries: Tensor, stores: HeadStores, lists: Tensor, budget: int, fresh: bool,
    resident: int = RESIDENT,
) -> None:  # fmt: skip
    """queries [B, H, D], turned, over what `stores` has of the row, the new token included -> new.out.

    lists [B, retrieval heads or their query heads, n] int32: logical pages, for rows with more than `budget` tokens
    before the new one: the last n - 1 count, the newest page is last. Other rows have n at most, and read all.
    `fresh`: the launch in front made the lists.
    """
    head_dim, pages, ring = new.head_dim, stores.pages, stores.ring
    page_size, width, retrieval = stores.page_size, stores.width, pages.shape[2]
    group, on_cpu = new.heads // new.kv_heads, queries.device.type == "cpu"
    row_bytes = next_power_of_2(width * pages.element_size() // 2)
    tile = min(page_size, 64, max(16, TILE_BYTES // row_bytes))
    kept, streamed = (lists.shape[2] - 1) * page_size, stores.sinks + stores.window
    tiles = new.batch * group * -(-(retrieval * kept + (new.kv_heads - retrieval) * streamed) // tile)
    run = tile * max(2, -(-tiles // (resident * processors(queries.device))))
    longest = max(kept + page_size if retrieval else 0, streamed if retrieval < new.kv_heads else 0)
    splits = next_power_of_2(-(-longest // run))
    dim, shape = max(16, next_power_of_2(head_dim)), (new.batch, new.heads)
    options: dict[str, object] = {"launch_pdl": True} if new.pdl else {}
    packed_attention[(splits, new.heads, new.batch)](
        queries, new.positions, stores.homes, pages, stores.table, lists, ring, new.out,
        new.workspace.take("packed part out", (*shape, splits, dim)),
        new.workspace.take("packed part lse", (*shape, splits)),
        new.workspace.take("packed tickets", shape, torch.int32), new.scale, new.softcap or 0.0,
        stores.sinks, stores.window, budget, run, pages.stride(0), pages.stride(1), pages.stride(2),
        stores.table.stride(0), ring.stride(0), ring.stride(1), ring.stride(2), lists.shape[2],
        new.heads, new.kv_heads, lists.shape[1], lists.shape[1] == retrieval and group > 1, head_dim, dim,
        next_power_of_2(head_dim // 2), width, math.gcd(width, 16), stores.bits, page_size, tile, splits,
        max(1, min(splits, 4096 // dim)), fresh, bool(new.softcap), on_cpu, new.pdl, num_warps=4, **options,
    )  # fmt: skip
