"""Attention of one new token a row over listed keys, split along the lists (split-K, "flash decoding").

Program (split, list head, row) walks a run of its list, for all query heads that share the list. While one block of
keys is multiplied, the page of the next block and the list entry of the one after it are on their way: the chain
list -> table -> key is waited for once a program, not once a block. The last split of a (row, head) to finish merges
the parts, as in `fewer.kernels.triton.attention`.

Storage, tables and lists are those of `fewer.kernels.list_attention`.
"""
# mypy: allow-untyped-defs
# (the arguments of kernels are of Triton's language, not of Python)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from fewer.kernels.list_attention import ListAttention, Unit
from fewer.kernels.new_tokens import NewTokens
from fewer.kernels.new_tokens import processors as processors_of
from fewer.kernels.triton.attention import LOG2_E, merge_parts
from fewer.kernels.triton.attention_decode import Scratch, Tiling
from fewer.kernels.triton.gemv import wait_for_previous
from fewer.kernels.triton.running_softmax import fold_tall, scores_of


@triton.jit
def entry_at(lists, index, count, PAGE_SIZE: tl.constexpr, UNIT: tl.constexpr):
    """Where token `index` of a list comes from: its logical page, or its position with UNIT "token"; -1 beyond."""
    if UNIT == "all":
        return index // PAGE_SIZE if PAGE_SIZE > 0 else index * 0
    else:
        at = index // PAGE_SIZE if UNIT == "page" else index
        return tl.load(lists + at, mask=at < count, other=-1)


@triton.jit
def page_at(table, entry, length, PAGE_SIZE: tl.constexpr, UNIT: tl.constexpr):
    """Physical page of an entry; PAGE_SIZE = 0 stands for a single page a row. Nothing is read for unseen entries."""
    if PAGE_SIZE == 0:
        return tl.load(table)
    else:
        logical = entry // PAGE_SIZE if UNIT == "token" else entry
        first = entry if UNIT == "token" else entry * PAGE_SIZE
        return tl.load(table + logical, mask=(entry >= 0) & (first < length), other=0)


@triton.jit
def position_at(entry, index, length, PAGE_SIZE: tl.constexpr, UNIT: tl.constexpr):
    """Position in the sequence of token `index` of a list, -1 where it is unseen."""
    position = index
    if UNIT == "token":
        position = entry
    elif UNIT == "page":
        position = tl.where(entry < 0, -1, entry * PAGE_SIZE + index % PAGE_SIZE)
    return tl.where(position < length, position, -1)


@triton.jit
def load_tile(storage, place, inside, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    """Keys or values that begin at offsets `place` [N] -> [N, DIM], zeros where not `inside` (and never NaN)."""
    channel = tl.arange(0, DIM)
    mask = inside[:, None]
    if DIM != HEAD_DIM:
        mask = mask & (channel < HEAD_DIM)[None, :]
    return tl.load(storage + place[:, None] + channel[None, :], mask=mask, other=0.0)


@triton.jit
def tokens_in_all(counts, lengths, fresh, pairs, PAIRS_P: tl.constexpr, PAGE_SIZE: tl.constexpr, UNIT: tl.constexpr):
    """Tokens in the lists of all rows and heads; with UNIT "all", of all rows and one head."""
    pair = tl.arange(0, PAIRS_P)
    total = tl.sum(tl.load((lengths if UNIT == "all" else counts) + pair, mask=pair < pairs, other=0), 0)
    if UNIT == "all":
        return total + pairs * fresh
    else:
        return total * PAGE_SIZE if UNIT == "page" else total


@triton.jit
def list_attention(
    query, keys, values, table, lists, counts, lengths, out, lse, scores, part_out, part_lse, tickets,
    scale, softcap, stride_page, stride_head, stride_slot, stride_table, longest, width, fresh, pairs, programs,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, LISTS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
    GROUP_P: tl.constexpr, SPLITS: tl.constexpr, SPLITS_P: tl.constexpr, PAIRS_P: tl.constexpr,
    PAGE_SIZE: tl.constexpr, UNIT: tl.constexpr, WITHIN_PAGE: tl.constexpr, BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr, CHUNK: tl.constexpr, COUNTED: tl.constexpr, SOFTCAP: tl.constexpr, SCORES: tl.constexpr,
    ON_CPU: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (SPLITS, LISTS, B); LISTS is KV_HEADS or HEADS. query, out [B, HEADS, HEAD_DIM], lists [B, LISTS, longest].

    Rows have lengths[b] + fresh tokens. COUNTED: of a list the first counts[b, h] are meant; else all `longest`.
    WITHIN_PAGE: no block crosses a page, so its entry and page are scalars. PAIRS_P > 1: rows or heads differ in
    length, and about `programs` runs of one length are made of all of them. scores [B, HEADS, width] float32.
    part_out [B, LISTS, SPLITS, GROUP, DIM] float32, part_lse without DIM; tickets [B, LISTS] int32, zero before and
    after.
    """
    GROUP: tl.constexpr = HEADS // LISTS
    split, list_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    pair = row * LISTS + list_head
    length = tl.load(lengths + row) + fresh  # no kernel of the pass may write it: all else is read after waiting
    wait_for_previous(PDL)
    tokens = length
    count = longest
    if COUNTED:
        count = tl.load(counts + pair)
    if UNIT != "all":
        tokens = count * PAGE_SIZE if UNIT == "page" else count
    run = tl.cdiv(tokens, SPLITS)
    if PAIRS_P > 1:
        every = tokens_in_all(counts, lengths, fresh, pairs, PAIRS_P, PAGE_SIZE, UNIT)
        run = tl.maximum(run, tl.cdiv(every * (LISTS if UNIT == "all" else 1), programs))
    run = tl.cdiv(run, BLOCK_S) * BLOCK_S
    active = tl.maximum(1, tl.cdiv(tokens, tl.maximum(run, 1)))
    head = tl.arange(0, 16 if GROUP_P < 16 else GROUP_P)  # a tensor-core tile has 16 rows
    lane = tl.arange(0, BLOCK_S)
    scores += (row.to(tl.int64) * HEADS + list_head * GROUP) * width
    score_rows = scores + head[None, :].to(tl.int64) * width
    if SCORES:  # what no run covers
        for start in tl.range(tl.cdiv(tokens, BLOCK_S) * BLOCK_S + split * BLOCK_S, width, SPLITS * BLOCK_S):
            beyond = (start + lane < width)[:, None] & (head < GROUP)[None, :]
            tl.store(score_rows + start + lane[:, None], float("-inf"), mask=beyond)
    if split < active:
        begin = split * run
        end = tl.minimum(begin + run, tokens)
        lists += pair.to(tl.int64) * longest
        table += row.to(tl.int64) * stride_table
        plane = (list_head // (LISTS // KV_HEADS)).to(tl.int64) * stride_head
        index = begin if WITHIN_PAGE else begin + lane
        entry = entry_at(lists, index, count, PAGE_SIZE, UNIT)
        page = page_at(table, entry, length, PAGE_SIZE, UNIT)
        position = position_at(entry, begin + lane, length, PAGE_SIZE, UNIT)
        following = entry_at(lists, index + BLOCK_S, count, PAGE_SIZE, UNIT)
        channel = tl.arange(0, DIM)
        held = channel < HEAD_DIM
        first_head = row * HEADS + list_head * GROUP
        heads = query + (first_head + tl.minimum(head, GROUP - 1))[:, None] * HEAD_DIM
        q = tl.load(heads + channel[None, :], mask=held[None, :], other=0.0).to(keys.dtype.element_ty)
        top = tl.full([head.shape[0]], float("-inf"), tl.float32)
        sums = tl.zeros([BLOCK_S, head.shape[0]], tl.float32)
        result = tl.zeros([DIM, head.shape[0]], tl.float32)
        for start in tl.range(begin, end, BLOCK_S, num_stages=STAGES):
            index = start if WITHIN_PAGE else start + lane
            next_page = page_at(table, following, length, PAGE_SIZE, UNIT)
            next_position = position_at(following, start + BLOCK_S + lane, length, PAGE_SIZE, UNIT)
            following = entry_at(lists, index + 2 * BLOCK_S, count, PAGE_SIZE, UNIT)
            seen = position >= 0
            slot = position % PAGE_SIZE if PAGE_SIZE > 0 else position
            place = page.to(tl.int64) * stride_page + plane + slot.to(tl.int64) * stride_slot
            key = load_tile(keys, place, seen, HEAD_DIM, DIM)
            value = load_tile(values, place, seen, HEAD_DIM, DIM)
            logits = scores_of(key, q, scale, softcap, SOFTCAP, ON_CPU, PRECISION)  # [BLOCK_S, queries]
            logits = tl.where(seen[:, None], logits, float("-inf"))
            if SCORES:
                within = (start + lane < width)[:, None] & (head < GROUP)[None, :]
                tl.store(score_rows + start + lane[:, None], logits / LOG2_E, mask=within)
            top, sums, result = fold_tall(logits, value, top, sums, result, ON_CPU, PRECISION)
            page, position = next_page, next_position
        total = tl.sum(sums, 0)
        result = result / tl.where(total > 0, total, 1.0)[None, :]
        logsum = tl.where(total > 0, top + tl.log2(total), float("-inf"))
        stored = held[:, None] & (head < GROUP)[None, :]
        if active == 1:
            place_out = out + (first_head + head)[None, :] * HEAD_DIM + channel[:, None]
            tl.store(place_out, result.to(out.dtype.element_ty), mask=stored)
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
                    GROUP, GROUP_P, SPLITS, SPLITS_P, HEAD_DIM, DIM, CHUNK, True,
                )  # fmt: skip


TILE_BYTES = 16384  # of keys, and as many of values, in one step of the loop
SHORT_BYTES = 131072  # of keys a multiprocessor, up to which waiting is longer than reading


def tiling_for(pairs: int, longest: int, even: bool, token_bytes: int, page_size: int, processors: int) -> Tiling:
    """`pairs` of rows and list heads, lists of `longest` tokens at most, keys of `token_bytes` when padded.

    The fastest of those in benchmarks/results/h200_lists.json, or 2 % from it: one wave of two programs on every
    multiprocessor, with three steps on their way. Where there is little to read, one program, which takes larger steps:
    fewer parts are merged sooner. Where lists are not `even`, there is room for one of four times the average length.
    """
    short = pairs * longest * token_bytes <= SHORT_BYTES * processors
    slots = max(16, min(128, (2 if short else 1) * TILE_BYTES // token_bytes))
    if page_size == 64 and not short:  # a step that lies in one page has one entry and one address
        slots = min(slots, 64)
    programs = processors * (1 if short else 2)
    splits = min(-(-longest // slots), programs * (1 if even else 4) // pairs)
    return Tiling(max(1, splits), programs, slots, stages=2 if short else 3)


def key_bytes(keys: Tensor) -> int:
    """Of one key in a tile."""
    return max(16, next_power_of_2(keys.shape[-1])) * keys.element_size()


def launch(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lists: Tensor | None, counts: Tensor | None, unit: Unit,
    lengths: Tensor, out: Tensor, lse: Tensor, scores: Tensor | None, scratch: Scratch, tiling: Tiling, scale: float,
    softcap: float | None = None, fresh: int = 0, pdl: bool = False,
) -> None:  # fmt: skip
    """`fewer.kernels.list_attention.attend_list` into `out`, `lse` and `scores`.

    `fresh`: tokens of every row that were stored since `lengths` were counted. `pdl`: `lengths` are no kernel's work.
    """
    batch, heads, head_dim = q.shape
    kv_heads, page_size = keys.shape[1:3]
    kind = "all" if lists is None else unit
    list_heads = kv_heads if lists is None else lists.shape[1]
    group, pairs = heads // list_heads, batch * (1 if lists is None else list_heads)
    single = table.shape[1] == 1 and kind != "page"
    within_page = (single and kind == "all") or (kind != "token" and page_size % tiling.slots == 0)
    uneven = tiling.splits > 1 and (counts is not None or kind == "all")
    width = scratch.out.shape[-1]
    options: dict[str, object] = {"launch_pdl": True} if pdl else {}
    list_attention[(tiling.splits, list_heads, batch)](
        q, keys, values, table, lengths if lists is None else lists, lengths if counts is None else counts, lengths,
        out, lse, lse if scores is None else scores, scratch.out, scratch.lse, scratch.tickets,
        scale, softcap or 0.0, keys.stride(0), keys.stride(1), keys.stride(2), table.stride(0),
        0 if lists is None else lists.shape[2], 0 if scores is None else scores.shape[2], fresh, pairs,
        tiling.programs, heads, kv_heads, list_heads, head_dim, width, next_power_of_2(group), tiling.splits,
        next_power_of_2(tiling.splits), next_power_of_2(pairs) if uneven else 1,
        0 if single else page_size, kind, within_page, tiling.slots, tiling.stages,
        max(1, 8192 // (width * next_power_of_2(group))), counts is not None and kind != "all", bool(softcap),
        scores is not None, q.device.type == "cpu", "ieee" if keys.dtype == torch.float32 else "tf32", pdl,
        num_warps=tiling.warps, **options,
    )  # fmt: skip


def attend_list(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lists: Tensor | None, counts: Tensor | None, unit: Unit,
    lengths: Tensor, scale: float, softcap: float | None = None, want_scores: bool = False,
    tiling: Tiling | None = None,
) -> ListAttention:  # fmt: skip
    """As `fewer.kernels.list_attention.attend_list`. keys and values share their strides; D is contiguous."""
    batch, heads, head_dim = q.shape
    kv_heads, page_size = keys.shape[1:3]
    if keys.stride() != values.stride() or keys.stride(3) != 1:
        keys, values = keys.contiguous(), values.contiguous()
    list_heads, longest = kv_heads, table.shape[1] * page_size
    if lists is not None:
        lists, list_heads = lists.contiguous(), lists.shape[1]
        longest = lists.shape[2] * (page_size if unit == "page" else 1)
    if tiling is None:
        even, token_bytes = batch == 1 if lists is None else counts is None, key_bytes(keys)
        tiling = tiling_for(batch * list_heads, longest, even, token_bytes, page_size, processors_of(q.device))
    scratch = Scratch.allocate(batch, heads, list_heads, head_dim, tiling.splits, q.device)
    out = torch.empty(batch, heads, head_dim, device=q.device)
    lse = torch.empty(batch, heads, device=q.device)
    scores = torch.empty(batch, heads, longest, device=q.device) if want_scores else None
    counts = None if counts is None else counts.contiguous()
    launch(
        q.contiguous(), keys, values, table, lists, counts, unit, lengths, out, lse, scores, scratch, tiling, scale,
        softcap,
    )  # fmt: skip
    return ListAttention(out, lse, scores)


def attend_new(
    new: NewTokens, q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lists: Tensor | None = None,
    scores: Tensor | None = None,
) -> None:  # fmt: skip
    """Queries [B, H, D], turned, over listed tokens [B, H or Hk, n] int32, or over all (with `scores` [B, H, S] float32
    to be filled), of keys [pages, Hk, page_size, D] that have the new ones at their positions -> `new.out`."""
    batch, page_size = len(q), keys.shape[2]
    list_heads, longest = (keys.shape[1], table.shape[1] * page_size) if lists is None else lists.shape[1:]
    even = batch == 1 if lists is None else True
    tiling = tiling_for(batch * list_heads, longest, even, key_bytes(keys), page_size, processors_of(keys.device))
    scratch = Scratch.take(new.workspace, batch, list_heads, tiling.splits, new.heads // list_heads, new.head_dim)
    launch(
        q, keys, values, table, lists, None, "token", new.positions, new.out,
        new.workspace.take("log-sum-exp", (batch, new.heads)), scores, scratch, tiling, new.scale, new.softcap,
        fresh=1, pdl=new.pdl,
    )  # fmt: skip
