"""Attention of many rows over a shared prefix: a flash kernel without a mask, split along the prefix.

A program takes BLOCK_T of a group's rows, each one query of one head: the G query heads of a key head are folded into
the rows, so a prefix is multiplied by tiles of queries on the tensor cores and read from memory once. Which group a
tile belongs to is found from the pointers on the device, so groups may change under a CUDA graph.

Arguments are those of `fewer.kernels.shared_prefix`.
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

from fewer.kernels.triton.attention import LOG2_E, merge_parts
from fewer.kernels.triton.list_attention import entry_at, load_tile, page_at
from fewer.kernels.triton.running_softmax import fold, normalised, scores_of, stages_for


@triton.jit
def prefix_attention(
    query, keys, values, table, lengths, pointers, out, lse, part_out, part_lse, scale, softcap,
    stride_page, stride_head, stride_slot, stride_table, groups,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, GROUPS_P: tl.constexpr,
    SPLITS: tl.constexpr, PAGE_SIZE: tl.constexpr, WITHIN_PAGE: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr, STAGES: tl.constexpr, SOFTCAP: tl.constexpr, ON_CPU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, KV_HEADS, SPLITS), tiles enough for all groups. query, out [B, HEADS, HEAD_DIM], lse [B, HEADS].

    part_out [B, KV_HEADS, SPLITS, GROUP, DIM] float32, part_lse without DIM.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    member = tl.arange(0, GROUPS_P)
    real = member < groups
    begins = tl.load(pointers + member, mask=real, other=0)
    sizes = (tl.load(pointers + member + 1, mask=real, other=0) - begins) * GROUP
    tiles = tl.cdiv(sizes, BLOCK_T)
    group = tl.sum(tl.where(real & (tl.cumsum(tiles, 0) <= tile), 1, 0), 0)
    if group < groups:
        at = (tile - tl.sum(tl.where(member < group, tiles, 0), 0)) * BLOCK_T + tl.arange(0, BLOCK_T)
        mine = member == group
        inside = at < tl.sum(tl.where(mine, sizes, 0), 0)
        row = (tl.sum(tl.where(mine, begins, 0), 0) + at // GROUP).to(tl.int64)
        head = row * HEADS + kv_head * GROUP + at % GROUP  # of [B, HEADS]
        channel = tl.arange(0, DIM)
        stored = inside[:, None] & (channel < HEAD_DIM)[None, :]
        heads = query + head[:, None] * HEAD_DIM + channel[None, :]
        q = tl.load(heads, mask=stored, other=0.0).to(keys.dtype.element_ty)
        length = tl.load(lengths + group)
        run = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_S) * BLOCK_S
        begin = split * run
        end = tl.minimum(begin + run, length)
        table += group.to(tl.int64) * stride_table
        plane = kv_head.to(tl.int64) * stride_head
        lane = tl.arange(0, BLOCK_S)
        index = begin if WITHIN_PAGE else begin + lane
        page = page_at(table, entry_at(table, index, length, PAGE_SIZE, "all"), length, PAGE_SIZE, "all")
        top = tl.full([BLOCK_T], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_T], tl.float32)
        result = tl.zeros([BLOCK_T, DIM], tl.float32)
        for start in tl.range(begin, end, BLOCK_S, num_stages=STAGES):
            index = (start if WITHIN_PAGE else start + lane) + BLOCK_S
            next_page = page_at(table, entry_at(table, index, length, PAGE_SIZE, "all"), length, PAGE_SIZE, "all")
            position = start + lane
            slot = position % PAGE_SIZE if PAGE_SIZE > 0 else position
            place = page.to(tl.int64) * stride_page + plane + slot.to(tl.int64) * stride_slot
            seen = position < end
            key = load_tile(keys, place, seen, HEAD_DIM, DIM)
            value = load_tile(values, place, seen, HEAD_DIM, DIM)
            scores = scores_of(q, key, scale, softcap, SOFTCAP, ON_CPU, PRECISION)
            scores = tl.where(seen[None, :], scores, float("-inf"))
            top, total, result = fold(scores, value, top, total, result, ON_CPU, PRECISION)
            page = next_page
        result, logsum = normalised(top, total, result)
        if SPLITS == 1:
            tl.store(out + head[:, None] * HEAD_DIM + channel[None, :], result, mask=stored)
            tl.store(lse + head, logsum / LOG2_E, mask=inside)
        else:
            part = ((row * KV_HEADS + kv_head) * SPLITS + split) * GROUP + at % GROUP
            tl.store(part_out + part[:, None] * DIM + channel[None, :], result, mask=stored)
            tl.store(part_lse + part, logsum, mask=inside)


@triton.jit
def merge_splits(
    part_out, part_lse, out, lse,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, GROUP_P: tl.constexpr,
    SPLITS: tl.constexpr, SPLITS_P: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid (KV_HEADS, B): the merge of one key head's parts in one row."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    kv_head, row = tl.program_id(0), tl.program_id(1)
    merge_parts(
        part_out, part_lse, out, lse, (row * KV_HEADS + kv_head) * SPLITS * GROUP, row * HEADS + kv_head * GROUP,
        SPLITS, GROUP, GROUP_P, SPLITS, SPLITS_P, HEAD_DIM, DIM, CHUNK, True,
    )  # fmt: skip


class Blocks(NamedTuple):
    rows: int  # queries times query heads of a key head
    keys: int
    splits: int
    warps: int
    stages: int


def blocks_for(
    batch: int, kv_heads: int, group: int, head_dim: int, element_size: int, groups: int, longest: int, processors: int
) -> Blocks:
    """Tiles of queries as the average group fills, and splits that fill the multiprocessors."""
    width = max(16, next_power_of_2(head_dim)) * element_size  # bytes of a key
    rows = max(16, min(128, next_power_of_2(-(-batch * group // groups))))
    rows, keys = (rows, 64) if width <= 256 else (min(rows, 64), 32)
    programs = kv_heads * _tiles(batch, group, groups, rows)
    splits = splits_for(programs, -(-longest // (4 * keys)), processors)
    return Blocks(rows, keys, splits, 8 if rows == 128 else 4, stages_for(rows, keys, width))


def splits_for(programs: int, most: int, processors: int) -> int:
    """The fewest splits whose last wave of programs leaves the multiprocessors nearly as busy as the best number's."""

    def busy(splits: int) -> float:
        waves = programs * splits / processors
        return waves / -(-programs * splits // processors)

    candidates = range(1, max(1, min(most, 64)) + 1)
    best = max(busy(splits) for splits in candidates)
    return next(splits for splits in candidates if busy(splits) >= 0.85 * best)


def attend_prefix(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor, pointers: Tensor, scale: float,
    softcap: float | None = None, blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `fewer.kernels.shared_prefix.attend_prefix`. keys and values share their strides; D is contiguous."""
    batch, heads, head_dim = q.shape
    kv_heads, page_size = keys.shape[1:3]
    if keys.stride() != values.stride() or keys.stride(3) != 1:
        keys, values = keys.contiguous(), values.contiguous()
    groups, group = len(lengths), heads // kv_heads
    if blocks is None:
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 4
        sizes = kv_heads, group, head_dim, keys.element_size(), groups, table.shape[1] * page_size
        blocks = blocks_for(batch, *sizes, processors)
    width, splits = max(16, next_power_of_2(head_dim)), blocks.splits
    out = torch.empty(batch, heads, head_dim, device=q.device)
    lse = torch.empty(batch, heads, device=q.device)
    part_out, part_lse = out, lse
    if splits > 1:
        part_out = torch.empty(batch, kv_heads, splits, group, width, device=q.device)
        part_lse = torch.empty(batch, kv_heads, splits, group, device=q.device)
    single = table.shape[1] == 1
    prefix_attention[(_tiles(batch, group, groups, blocks.rows), kv_heads, splits)](
        q.contiguous(), keys, values, table, lengths, pointers, out, lse, part_out, part_lse, scale, softcap or 0.0,
        *keys.stride()[:3], table.stride(0), groups, heads, kv_heads, head_dim, width, next_power_of_2(groups), splits,
        0 if single else page_size, single or page_size % blocks.keys == 0, blocks.rows, blocks.keys, blocks.stages,
        bool(softcap), q.device.type == "cpu", "ieee" if keys.dtype == torch.float32 else "tf32",
        num_warps=blocks.warps,
    )  # fmt: skip
    if splits > 1:
        chunk = max(1, 8192 // (width * next_power_of_2(group)))
        merge_splits[(kv_heads, batch)](
            part_out, part_lse, out, lse, heads, kv_heads, head_dim, width, next_power_of_2(group), splits,
            next_power_of_2(splits), chunk, num_warps=2,
        )  # fmt: skip
    return out, lse


def _tiles(batch: int, group: int, groups: int, rows: int) -> int:
    """Enough for every group: each may have one tile that is not full."""
    return -(-batch * group // rows) + groups - 1
