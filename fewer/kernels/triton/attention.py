"""Attention of one new token a row over the cached keys, split along the sequence (split-K, "flash decoding").

Program (split, key head, row) reads a run of keys and values once, for all query heads of the group, and keeps a
running softmax. The last split of a (row, head) to finish merges the parts by their log-sum-exp, so no second kernel
runs. With FUSED the program also does what precedes attention: it normalises and rotates the query and the new key,
attends to the new token from registers, and (split 0) writes key and value to the cache.

Source: FlashAttention, arXiv 2205.14135, section 3; the merge is `fewer.kernels.attention.merge`.
"""
# mypy: allow-untyped-defs
# (the arguments of kernels are of Triton's language, not of Python)

from __future__ import annotations

import triton
import triton.language as tl

from fewer.kernels.triton.gemv import wait_for_previous
from fewer.kernels.triton.matmul import multiply_tiles

LOG2_E = tl.constexpr(1.4426950408889634)
SHORTEST_RUN = tl.constexpr(512)  # slots that one program takes of a head with a home


@triton.jit
def angle(table, position, ROTARY_DIM: tl.constexpr, DIM: tl.constexpr):
    """Cosine and sine of every pair of channels at `position`: [DIM / 2] each."""
    pair = tl.arange(0, DIM // 2)
    at = table + position.to(tl.int64) * ROTARY_DIM + 2 * pair
    turned = pair < ROTARY_DIM // 2
    return tl.load(at, mask=turned, other=1.0), tl.load(at + 1, mask=turned, other=0.0)


@triton.jit
def turn(
    vectors, gain, cosine, sine, eps,
    HEAD_DIM: tl.constexpr, ROTATE: tl.constexpr, DIM: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Load heads [n, 1] pointers `vectors` -> [n, DIM] float32, RMS-normalised by `gain`, turned by `angle`.

    Interleaved pairs: channels 2i and 2i + 1 form one complex number.
    """
    channel = tl.arange(0, DIM)
    held = channel < HEAD_DIM
    heads = tl.load(vectors + channel[None, :], mask=held[None, :], other=0.0).to(tl.float32)
    if NORM:
        inverse = tl.rsqrt(tl.sum(heads * heads, 1) / HEAD_DIM + eps)[:, None]
        heads *= inverse * tl.load(gain + channel, mask=held, other=0.0)[None, :]
    if ROTATE:
        real, imaginary = tl.split(tl.reshape(heads, [heads.shape[0], DIM // 2, 2]))
        cosine, sine = cosine[None, :], sine[None, :]
        turned = tl.join(real * cosine - imaginary * sine, imaginary * cosine + real * sine)
        heads = tl.reshape(turned, [heads.shape[0], DIM])
    return heads


@triton.jit
def cap(scores, softcap, SOFTCAP: tl.constexpr):
    """softcap·tanh(scores / softcap), with tanh u = 2·sigmoid(2u) - 1."""
    if SOFTCAP:
        return softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
    return scores


@triton.jit
def block_of(
    base, start, end, stride_slot, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_S: tl.constexpr
):  # fmt: skip
    """Slots start..start+BLOCK_S-1 of one head's keys or values, zeros from `end` on: [BLOCK_S, DIM]."""
    channel = tl.arange(0, DIM)
    slot = start + tl.arange(0, BLOCK_S)
    inside = (slot < end)[:, None]
    if DIM != HEAD_DIM:
        inside = inside & (channel < HEAD_DIM)[None, :]
    return tl.load(base + slot[:, None] * stride_slot + channel[None, :], mask=inside, other=0.0)


@triton.jit
def attend_block(
    query, key, value, start, end, sinks, low, taken, scale, softcap, top, total, out,
    PLACED: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_S: tl.constexpr, ON_CPU: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax of `query` [DIM, HEADS_P] over key and value [BLOCK_S, DIM], in units of log2.

    Slots up to `end` are seen; PLACED: those below `sinks` or from `low` on, but for the slot `taken`.

    Keys are the tall side of both products, so tensor cores read them from shared memory and no head is padded
    further than to eight. top [HEADS_P]; total [BLOCK_S, HEADS_P], summed over its slots by the caller at the end;
    out [DIM, HEADS_P].
    """
    scores = multiply_tiles(key, query, tl.zeros([BLOCK_S, query.shape[1]], tl.float32), ON_CPU, PRECISION)
    scores = cap(scores * scale, softcap, SOFTCAP) * LOG2_E
    slot = start + tl.arange(0, BLOCK_S)
    seen = slot < end
    if PLACED:
        seen = seen & ((slot < sinks) | (slot >= low)) & (slot != taken)
    scores = tl.where(seen[:, None], scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 0))
    base = higher
    if PLACED:  # nothing may be seen in a block
        base = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores - base[None, :])
    shrink = tl.exp2(top - base)[None, :]
    out = multiply_tiles(tl.trans(value), weights.to(value.dtype), out * shrink, ON_CPU, PRECISION)
    return higher, total * shrink + weights, out


@triton.jit
def merge_parts(
    part_out, part_lse, out, lse, first_part, first_head, active,
    GROUP: tl.constexpr, GROUP_P: tl.constexpr, SPLITS: tl.constexpr, SPLITS_P: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """out = Σ_s 2^(lse_s - top)·out_s / Σ_s 2^(lse_s - top) over the active splits of one key head, CHUNK at a time:
    a chunk's parts and their lse are requested together."""
    head = tl.arange(0, GROUP_P)
    channel = tl.arange(0, DIM)
    top = tl.full([GROUP_P], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_P], tl.float32)
    result = tl.zeros([GROUP_P, DIM], tl.float32)
    for start in tl.range(0, active, CHUNK):
        index = start + tl.arange(0, CHUNK)
        some = (index[:, None] < active) & (head[None, :] < GROUP)
        place = first_part + index[:, None] * GROUP + head[None, :]
        parts = tl.load(part_lse + place, mask=some, other=float("-inf"), cache_modifier=".cg")  # [CHUNK, GROUP_P]
        whole = some[:, :, None] & (channel < HEAD_DIM)[None, None, :]
        part = tl.load(part_out + place[:, :, None] * DIM + channel, mask=whole, other=0.0, cache_modifier=".cg")
        higher = tl.maximum(top, tl.max(parts, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # no part has seen a key yet
        weight, shrink = tl.exp2(parts - base[None, :]), tl.exp2(top - base)
        total = total * shrink + tl.sum(weight, 0)
        result = result * shrink[:, None] + tl.sum(part * weight[:, :, None], 0)
        top = higher
    result *= (1.0 / tl.where(total > 0, total, 1.0))[:, None]
    stored = (head < GROUP)[:, None] & (channel < HEAD_DIM)[None, :]
    final = out + (first_head + head)[:, None] * HEAD_DIM + channel[None, :]
    tl.store(final, result.to(out.dtype.element_ty), mask=stored)
    if LSE:
        tl.store(lse + first_head + head, (top + tl.log2(total)) / LOG2_E, mask=head < GROUP)


@triton.jit
def decode_attention(
    query, keys, values, lengths, places, homes, out, lse, part_out, part_lse, tickets, table, q_gain, k_gain,
    scale, softcap, window, eps, stride_row, stride_head, stride_slot, batch, programs, shared,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, DIM: tl.constexpr,
    GROUP_P: tl.constexpr, HEADS_P: tl.constexpr, SPLITS: tl.constexpr, ROWS_P: tl.constexpr, BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr, CHUNK: tl.constexpr, FUSED: tl.constexpr, PLACED: tl.constexpr, HOMES: tl.constexpr,
    QK_NORM: tl.constexpr, SOFTCAP: tl.constexpr, LSE: tl.constexpr, ON_CPU: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (SPLITS, KV_HEADS, B). keys, values [B, KV_HEADS, capacity, HEAD_DIM], lengths [B] int32: cached tokens.

    `query` is [B, HEADS, HEAD_DIM]; FUSED: [B, HEADS + 2·KV_HEADS, HEAD_DIM], before norm and rotation, and the new
    token takes slot lengths[b] and position lengths[b]. window > 0: only the last `window` tokens, the new one counted.
    PLACED (and FUSED): places [kinds, B, 4] int32 has, for each kind of heads and row, how many slots are cached, the
    slot for the new token, which may be one of them, the first slot that is seen behind the sinks, and the sinks.
    HOMES (and PLACED): heads lie in several stores. homes [KV_HEADS, 5] int64, in the order in which programs start:
    key head, elements from `keys` and from `values` to its first slot, from a row to the next, kind. Programs share the
    work on the `shared` first ones, which are long; of the others nobody takes less than SHORTEST_RUN slots.
    part_out [B, KV_HEADS, SPLITS, GROUP, DIM] float32, part_lse without DIM; tickets [B, KV_HEADS] int32, zero before
    and after.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    split, member, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_head = member
    to_keys = row.to(tl.int64) * stride_row + member.to(tl.int64) * stride_head
    to_values = to_keys
    if HOMES:
        home = homes + 5 * member
        kv_head = tl.load(home).to(tl.int32)
        to_row = row * tl.load(home + 3)
        to_keys, to_values = tl.load(home + 1) + to_row, tl.load(home + 2) + to_row
        places += tl.load(home + 4) * (4 * batch)
        if HEAD_DIM % 16 == 0:  # as every row of a store: loads may be wide
            to_keys, to_values = tl.multiple_of(to_keys, 16), tl.multiple_of(to_values, 16)
    position = tl.load(lengths + row)
    length, taken, low, sinks = position, position, 0, 0
    if PLACED:
        length, taken = tl.load(places + 4 * row), tl.load(places + 4 * row + 1)
        low, sinks = tl.load(places + 4 * row + 2), tl.load(places + 4 * row + 3)
    first = 0
    if window > 0:
        first = tl.maximum(0, length + (1 if FUSED else 0) - window)
    run = tl.cdiv(length - first, SPLITS)
    if ROWS_P > 1:  # rows of unequal lengths: about `programs` runs of one length over all rows
        rows = tl.arange(0, ROWS_P)
        cached = tl.load(places + 4 * rows if PLACED else lengths + rows, mask=rows < batch, other=0)
        if window > 0:
            cached = tl.minimum(cached, window)
        run = tl.maximum(run, tl.cdiv(tl.sum(cached, 0) * shared, programs))
    if HOMES:
        run = tl.maximum(run, SHORTEST_RUN)
    run = tl.cdiv(run, BLOCK_S) * BLOCK_S
    active = tl.maximum(1, tl.cdiv(length - first, tl.maximum(run, 1)))
    if split < active:
        TIMES: tl.constexpr = 1 if GROUP_P >= HEADS_P else HEADS_P // GROUP_P
        head = tl.arange(0, TIMES * GROUP_P)
        channel = tl.arange(0, DIM)
        held = channel < HEAD_DIM
        begin = first + split * run
        end = tl.minimum(begin + run, length)
        # What earlier passes cached needs no waiting: only the query and the new token come from the kernel in front.
        AHEAD: tl.constexpr = BLOCK_S if STAGES == 1 else 0  # a loop that fetches ahead gains nothing from it
        if AHEAD:
            key = block_of(keys + to_keys, begin, end, stride_slot, HEAD_DIM, DIM, BLOCK_S)
            value = block_of(values + to_values, begin, end, stride_slot, HEAD_DIM, DIM, BLOCK_S)
        ROTATE: tl.constexpr = FUSED and ROTARY_DIM > 0
        cosine, sine = scale, scale
        if ROTATE:
            cosine, sine = angle(table, position, ROTARY_DIM, DIM)
        wait_for_previous(PDL)
        width: tl.constexpr = (HEADS + 2 * KV_HEADS if FUSED else HEADS) * HEAD_DIM
        base = query + row.to(tl.int64) * width
        real = tl.minimum(tl.arange(0, GROUP_P), GROUP - 1)
        heads = base + (kv_head * GROUP + real)[:, None] * HEAD_DIM
        q = turn(heads, q_gain, cosine, sine, eps, HEAD_DIM, ROTATE, DIM, FUSED and QK_NORM).to(keys.dtype.element_ty)
        k_new, v_new = q, q
        if FUSED:  # every split reads the new token with its query: one wait for memory, not two
            lane = tl.arange(0, 1)[:, None]
            k_at = base + (HEADS + kv_head) * HEAD_DIM + lane
            v_at = base + (HEADS + KV_HEADS + kv_head) * HEAD_DIM + channel
            v_new = tl.load(v_at, mask=held, other=0.0).to(keys.dtype.element_ty)  # [DIM]
            k_new = turn(k_at, k_gain, cosine, sine, eps, HEAD_DIM, ROTATE, DIM, QK_NORM).to(keys.dtype.element_ty)
        copies = tl.broadcast_to(q[None, :, :], [TIMES, GROUP_P, DIM])
        matched = tl.trans(tl.reshape(copies, [TIMES * GROUP_P, DIM]))
        top = tl.full([head.shape[0]], float("-inf"), tl.float32)
        sums = tl.zeros([BLOCK_S, head.shape[0]], tl.float32)
        result = tl.zeros([DIM, head.shape[0]], tl.float32)
        if AHEAD:  # noqa: SIM102 (known when compiled; the other is not)
            if begin < end:
                top, sums, result = attend_block(
                    matched, key, value, begin, end, sinks, low, taken, scale, softcap, top, sums, result,
                    PLACED, SOFTCAP, BLOCK_S, ON_CPU, PRECISION,
                )  # fmt: skip
        for start in tl.range(begin + AHEAD, end, BLOCK_S, num_stages=STAGES):
            following = block_of(keys + to_keys, start, end, stride_slot, HEAD_DIM, DIM, BLOCK_S)
            and_values = block_of(values + to_values, start, end, stride_slot, HEAD_DIM, DIM, BLOCK_S)
            top, sums, result = attend_block(
                matched, following, and_values, start, end, sinks, low, taken, scale, softcap, top, sums, result,
                PLACED, SOFTCAP, BLOCK_S, ON_CPU, PRECISION,
            )  # fmt: skip
        total = tl.sum(sums, 0)
        if FUSED:  # noqa: SIM102 (known when compiled; the other is not)
            if split == 0:
                slot = taken.to(tl.int64) * stride_slot + channel
                tl.store(keys + to_keys + slot[None, :], k_new, mask=held[None, :])
                tl.store(values + to_values + slot, v_new, mask=held)
                score = tl.sum(q.to(tl.float32) * k_new.to(tl.float32), 1)
                score = cap(score * scale, softcap, SOFTCAP) * LOG2_E
                score = tl.reshape(tl.broadcast_to(score[None, :], [TIMES, GROUP_P]), [TIMES * GROUP_P])
                higher = tl.maximum(top, score)
                weight, shrink = tl.exp2(score - higher), tl.exp2(top - higher)
                total = total * shrink + weight
                result = result * shrink[None, :] + weight[None, :] * v_new.to(tl.float32)[:, None]
                top = higher
        result *= (1.0 / tl.where(total > 0, total, 1.0))[None, :]
        logsum = tl.where(total > 0, top + tl.log2(total), float("-inf"))
        first_head = row * HEADS + kv_head * GROUP
        stored = (head < GROUP)[None, :] & held[:, None]
        if active == 1:
            place = out + (first_head + head)[None, :] * HEAD_DIM + channel[:, None]
            tl.store(place, result.to(out.dtype.element_ty), mask=stored)
            if LSE:
                tl.store(lse + first_head + head, logsum / LOG2_E, mask=head < GROUP)
        else:
            pair = row * KV_HEADS + member
            at = (pair * SPLITS + split) * GROUP + head
            tl.store(part_out + at[None, :] * DIM + channel[:, None], result, mask=stored)
            tl.store(part_lse + at, logsum, mask=head < GROUP)
            tl.debug_barrier()  # every thread's part is written before the ticket is drawn
            ticket = tl.atomic_add(tickets + pair, 1, sem="acq_rel")
            if ticket == active - 1:
                tl.store(tickets + pair, 0)
                merge_parts(
                    part_out, part_lse, out, lse, pair * SPLITS * GROUP, first_head, active,
                    GROUP, GROUP_P, SPLITS, SPLITS, HEAD_DIM, DIM, CHUNK, LSE,
                )  # fmt: skip
