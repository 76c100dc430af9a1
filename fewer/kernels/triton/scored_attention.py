"""One new token a row over keys that are scored by the attention they receive: who goes for it, and what it sees.

A pass begins with one small kernel for all layers. It adds what the token before received to the scores,

    A[k] <- α·A[k] + Σ_h exp(z[h, k] - lse[h]),   h over the query heads of a key head,

and gives the new token the slot of the lowest key, or the next free one where a row is within its budget. Then every
layer is one kernel, as over keys that all stay: [rotation · cache write · attention · merge], which leaves its logits z
and their log-sum-exp for the next pass. So a pass that is given up has changed no score that it is not sure of.

Sources: A2SF, arXiv 2407.20485, equation 5; H2O, arXiv 2306.14048; split-K as in `fewer.kernels.triton.attention`.
"""
# mypy: allow-untyped-defs
# (the arguments of kernels are of Triton's language, not of Python)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from fewer.kernels.new_tokens import NewTokens, processors
from fewer.kernels.triton.attention import LOG2_E, angle, block_of, cap, merge_parts, turn
from fewer.kernels.triton.attention_decode import SHORT, Scratch, Tiling
from fewer.kernels.triton.gemv import wait_for_previous
from fewer.kernels.triton.matmul import multiply_tiles
from fewer.kernels.triton.running_softmax import fold_tall

RANKED = 1024  # slots that a program of `rank_and_place` looks at together


class ScoredKeys(NamedTuple):
    """What the passes over one pool share: L layers, B rows, H query heads, Hk key heads, S slots."""

    scores: Tensor  # [L, B, Hk, S] float32: A
    held: Tensor  # [L, B, Hk, S] int32: position of the token in each slot
    logits: Tensor  # [L, B, H, S] float32: z of the newest token; S = 0 where nothing is scored
    lse: Tensor  # [L, B, H] float32, natural
    taken: Tensor  # [L, B, Hk] int32: the newest token's slot
    rows: Tensor  # [B, 4] int32: slots in use with the new token, score?, does a key go?, newest that stay


@triton.jit
def shares_of(logits, lse, first_head, at, inside, capacity, HEADS: tl.constexpr):
    """Σ exp(z - lse) over HEADS query heads from `first_head` on, at slots `at`."""
    total = tl.zeros([at.shape[0]], tl.float32)
    for member in tl.static_range(HEADS):  # unrolled: all heads are requested together
        head = first_head + member
        z = tl.load(logits + head.to(tl.int64) * capacity + at, mask=inside, other=float("-inf"))
        total += tl.exp2((z - tl.load(lse + head)) * LOG2_E)
    return total


@triton.jit
def rank_and_place(
    scores, held, logits, lse, taken, rows, positions, decay, capacity,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, TOGETHER: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (KV_HEADS, B, L), tensors as in `ScoredKeys`; positions [B] int32 of the new tokens.

    TOGETHER: the heads of a layer rank by the sum over all of them, which forgets at once (decay = 0): each program
    makes that sum from the logits, and reads no score that another writes.
    """
    kv_head, row, layer = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    stop, scored = tl.load(rows + 4 * row), tl.load(rows + 4 * row + 1)
    evicts, recent = tl.load(rows + 4 * row + 2), tl.load(rows + 4 * row + 3)
    position = tl.load(positions + row)
    line = layer * tl.num_programs(1) + row
    plane = (line * KV_HEADS + kv_head).to(tl.int64) * capacity
    before = stop - 1 + evicts  # slots in use before the new token
    place = stop - 1
    if scored != 0:
        lowest = tl.full([], float("inf"), tl.float32)
        for start in tl.range(0, before, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < before
            first_head = line * (KV_HEADS * GROUP)
            old = tl.load(scores + plane + at, mask=inside, other=0.0)
            age = position - tl.load(held + plane + at, mask=inside, other=0)  # queries that have seen the key
            score = decay * old + shares_of(logits, lse, first_head + kv_head * GROUP, at, inside, capacity, GROUP)
            tl.store(scores + plane + at, score, mask=inside)
            ranking = score
            if TOGETHER:
                ranking = shares_of(logits, lse, first_head, at, inside, capacity, KV_HEADS * GROUP)
            ranking = tl.where(inside & (age > recent), ranking, float("inf"))
            least = tl.min(ranking, 0)
            first = tl.min(tl.where(ranking == least, at, 0x7FFFFFFF), 0)
            place = tl.where((evicts != 0) & (least < lowest), first, place)
            lowest = tl.minimum(lowest, least)
        tl.debug_barrier()  # every thread's scores are written before one of them is reset
    tl.store(scores + plane + place, 0.0)
    tl.store(held + plane + place, position)
    tl.store(taken + line * KV_HEADS + kv_head, place)
    # All this is of the pass before. The kernel behind, which waits for this one, needs what the one in front writes.
    wait_for_previous(PDL)


@triton.jit
def attend_scored_block(
    query, key, value, logits, start, end, taken, capacity, scale, softcap, top, sums, out,
    GROUP: tl.constexpr, SCORED: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_S: tl.constexpr, ON_CPU: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax of `query` [DIM, HEADS_P] over key and value [BLOCK_S, DIM]: slots before `end`,
    but for `taken`, which is the new token's. SCORED: their logits are left in `logits` [GROUP, capacity]."""
    z = multiply_tiles(key, query, tl.zeros([BLOCK_S, query.shape[1]], tl.float32), ON_CPU, PRECISION)
    z = cap(z * scale, softcap, SOFTCAP)
    slot = start + tl.arange(0, BLOCK_S)
    seen = (slot < end) & (slot != taken)
    if SCORED:
        head = tl.arange(0, query.shape[1])
        to = logits + head[None, :].to(tl.int64) * capacity + slot[:, None]
        tl.store(to, z, mask=seen[:, None] & (head < GROUP)[None, :])
    z = tl.where(seen[:, None], z * LOG2_E, float("-inf"))
    return fold_tall(z, value, top, sums, out, ON_CPU, PRECISION)


@triton.jit
def scored_attention(
    projected, keys, values, logits, lse, taken, rows, positions, out, part_out, part_lse, tickets, table, q_gain,
    k_gain, scale, softcap, eps, stride_row, stride_head, stride_slot, capacity,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, DIM: tl.constexpr,
    GROUP_P: tl.constexpr, HEADS_P: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, STAGES: tl.constexpr,
    CHUNK: tl.constexpr, SCORED: tl.constexpr, QK_NORM: tl.constexpr, SOFTCAP: tl.constexpr, ON_CPU: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (SPLITS, KV_HEADS, B): one layer. projected [B, HEADS + 2·KV_HEADS, HEAD_DIM] before norm and rotation, keys
    and values [B, KV_HEADS, capacity, HEAD_DIM], out [B, HEADS, HEAD_DIM]; logits, lse, taken of the layer, and rows,
    as in `ScoredKeys`. part_out [B, KV_HEADS, SPLITS, GROUP, DIM] float32, part_lse without DIM; tickets
    [B, KV_HEADS] int32, zero before and after.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    split, kv_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    pair = row * KV_HEADS + kv_head
    stop = tl.load(rows + 4 * row)
    run = tl.cdiv(tl.cdiv(stop, SPLITS), BLOCK_S) * BLOCK_S
    active = tl.cdiv(stop, run)
    if split < active:
        TIMES: tl.constexpr = 1 if GROUP_P >= HEADS_P else HEADS_P // GROUP_P
        head = tl.arange(0, TIMES * GROUP_P)
        channel = tl.arange(0, DIM)
        held = channel < HEAD_DIM
        plane = row.to(tl.int64) * stride_row + kv_head.to(tl.int64) * stride_head
        begin = split * run
        end = tl.minimum(begin + run, stop)
        first_head = pair * GROUP
        logits += first_head.to(tl.int64) * capacity
        # Keys of earlier passes need no waiting. The new token's slot still holds another key, and is not seen there.
        AHEAD: tl.constexpr = BLOCK_S if STAGES == 1 else 0  # a loop that fetches ahead gains nothing from it
        if AHEAD:
            key = block_of(keys + plane, begin, end, stride_slot, HEAD_DIM, DIM, BLOCK_S)
            value = block_of(values + plane, begin, end, stride_slot, HEAD_DIM, DIM, BLOCK_S)
        ROTATE: tl.constexpr = ROTARY_DIM > 0
        cosine, sine = scale, scale
        if ROTATE:
            cosine, sine = angle(table, tl.load(positions + row), ROTARY_DIM, DIM)
        wait_for_previous(PDL)
        slot = tl.load(taken + pair, cache_modifier=".cg")
        base = projected + row.to(tl.int64) * ((HEADS + 2 * KV_HEADS) * HEAD_DIM)
        lane = tl.arange(0, 1)[:, None]
        from_heads = base + (kv_head * GROUP + tl.minimum(tl.arange(0, GROUP_P), GROUP - 1))[:, None] * HEAD_DIM
        q = turn(from_heads, q_gain, cosine, sine, eps, HEAD_DIM, ROTATE, DIM, QK_NORM).to(keys.dtype.element_ty)
        k_at = base + (HEADS + kv_head) * HEAD_DIM + lane
        v_at = base + (HEADS + KV_HEADS + kv_head) * HEAD_DIM + channel
        v_new = tl.load(v_at, mask=held, other=0.0).to(keys.dtype.element_ty)  # [DIM]
        k_new = turn(k_at, k_gain, cosine, sine, eps, HEAD_DIM, ROTATE, DIM, QK_NORM).to(keys.dtype.element_ty)
        copies = tl.broadcast_to(q[None, :, :], [TIMES, GROUP_P, DIM])
        matched = tl.trans(tl.reshape(copies, [TIMES * GROUP_P, DIM]))
        top = tl.full([head.shape[0]], float("-inf"), tl.float32)
        sums = tl.zeros([BLOCK_S, head.shape[0]], tl.float32)
        result = tl.zeros([DIM, head.shape[0]], tl.float32)
        if AHEAD:
            top, sums, result = attend_scored_block(
                matched, key, value, logits, begin, end, slot, capacity, scale, softcap, top, sums, result,
                GROUP, SCORED, SOFTCAP, BLOCK_S, ON_CPU, PRECISION,
            )  # fmt: skip
        for start in tl.range(begin + AHEAD, end, BLOCK_S, num_stages=STAGES):
            following = block_of(keys + plane, start, end, stride_slot, HEAD_DIM, DIM, BLOCK_S)
            and_values = block_of(values + plane, start, end, stride_slot, HEAD_DIM, DIM, BLOCK_S)
            top, sums, result = attend_scored_block(
                matched, following, and_values, logits, start, end, slot, capacity, scale, softcap, top, sums, result,
                GROUP, SCORED, SOFTCAP, BLOCK_S, ON_CPU, PRECISION,
            )  # fmt: skip
        total = tl.sum(sums, 0)
        if split == 0:
            place = plane + slot.to(tl.int64) * stride_slot + channel
            tl.store(keys + place[None, :], k_new, mask=held[None, :])
            tl.store(values + place, v_new, mask=held)
            z = cap(tl.sum(q.to(tl.float32) * k_new.to(tl.float32), 1) * scale, softcap, SOFTCAP)
            z = tl.reshape(tl.broadcast_to(z[None, :], [TIMES, GROUP_P]), [TIMES * GROUP_P])
            if SCORED:
                tl.store(logits + head.to(tl.int64) * capacity + slot, z, mask=head < GROUP)
            z *= LOG2_E
            higher = tl.maximum(top, z)
            weight, shrink = tl.exp2(z - higher), tl.exp2(top - higher)
            total = total * shrink + weight
            result = result * shrink[None, :] + weight[None, :] * v_new.to(tl.float32)[:, None]
            top = higher
        result *= (1.0 / tl.where(total > 0, total, 1.0))[None, :]
        logsum = tl.where(total > 0, top + tl.log2(total), float("-inf"))
        stored = (head < GROUP)[None, :] & held[:, None]
        if active == 1:
            to = out + (first_head + head)[None, :] * HEAD_DIM + channel[:, None]
            tl.store(to, result.to(out.dtype.element_ty), mask=stored)
            if SCORED:
                tl.store(lse + first_head + head, logsum / LOG2_E, mask=head < GROUP)
        else:
            at = (pair * SPLITS + split) * GROUP + head
            tl.store(part_out + at[None, :] * DIM + channel[:, None], result, mask=stored)
            tl.store(part_lse + at, logsum, mask=head < GROUP)
            tl.debug_barrier()  # every thread's part is written before the ticket is drawn
            ticket = tl.atomic_add(tickets + pair, 1, sem="acq_rel")
            if ticket == active - 1:
                tl.store(tickets + pair, 0)
                merge_parts(
                    part_out, part_lse, out, lse, pair * SPLITS * GROUP, first_head, active,
                    GROUP, GROUP_P, SPLITS, SPLITS, HEAD_DIM, DIM, CHUNK, SCORED,
                )  # fmt: skip


def tiling_for(pairs: int, capacity: int, multiprocessors: int) -> Tiling:
    """`pairs` of rows and key heads: rows are about as long as one another, so each is cut alike. One part for each of
    the GPU's multiprocessors, for several rows four, and none shorter than a block; a part of one block is fetched
    before the kernel in front is over, and leaves room for that one."""
    programs = multiprocessors * (1 if pairs <= multiprocessors else 4)
    splits = max(1, min(programs // pairs, -(-capacity // 64)))
    if -(-capacity // splits) <= 128 or capacity <= SHORT:
        return Tiling(splits, programs, 64, warps=2, stages=1, heads=8)
    return Tiling(splits, programs, 64, stages=3)


def place_new(new: NewTokens, scored: ScoredKeys, decay: float, together: bool) -> None:
    """Score, rank, and a slot for the new token of every row and key head: once a pass, for all layers."""
    layers, batch, kv_heads, capacity = scored.scores.shape
    options: dict[str, object] = {"launch_pdl": True} if new.pdl else {}
    rank_and_place[(kv_heads, batch, layers)](
        scored.scores, scored.held, scored.logits, scored.lse, scored.taken, scored.rows, new.positions, decay,
        capacity, kv_heads, new.heads // kv_heads, together, min(RANKED, next_power_of_2(capacity)), new.pdl,
        **options,
    )  # fmt: skip


def attend_scored(new: NewTokens, keys: Tensor, values: Tensor, scored: ScoredKeys, layer: int) -> None:
    """Store and attend: keys, values [B, Hk, S, D] of a layer, D contiguous, of equal strides."""
    batch, kv_heads, capacity, head_dim = keys.shape
    group, width, fusion = new.heads // kv_heads, max(16, next_power_of_2(head_dim)), new.fusion
    tiling = tiling_for(batch * kv_heads, capacity, processors(keys.device))
    scratch = Scratch.take(new.workspace, batch, kv_heads, tiling.splits, group, head_dim)
    table, q_gain, k_gain = fusion.table, fusion.q_gain, fusion.k_gain
    options: dict[str, object] = {"launch_pdl": True} if new.pdl else {}
    scored_attention[(tiling.splits, kv_heads, batch)](
        new.projected, keys, values, scored.logits[layer], scored.lse[layer], scored.taken[layer], scored.rows,
        new.positions, new.out, scratch.out, scratch.lse, scratch.tickets, scratch.lse if table is None else table,
        scratch.lse if q_gain is None else q_gain, scratch.lse if k_gain is None else k_gain, new.scale,
        new.softcap or 0.0, fusion.eps, keys.stride(0), keys.stride(1), keys.stride(2), capacity,
        new.heads, kv_heads, head_dim, 0 if table is None else fusion.rotary_dim, width, next_power_of_2(group),
        tiling.heads, tiling.splits, tiling.slots, tiling.stages, max(1, 8192 // (width * next_power_of_2(group))),
        scored.logits.shape[3] > 0, q_gain is not None, bool(new.softcap), keys.device.type == "cpu",
        "ieee" if keys.dtype == torch.float32 else "tf32", new.pdl, num_warps=tiling.warps, **options,
    )  # fmt: skip
