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

from fewer.kernels.new_tokens import Workspace, processors
from fewer.kernels.triton.attention import LOG2_E, cap, merge_parts
from fewer.kernels.triton.gemv import wait_for_previous
from fewer.kernels.triton.list_attention import entry_at, load_tile, page_at
from fewer.kernels.triton.matmul import multiply_tiles
from fewer.kernels.triton.running_softmax import fold, normalised, scores_of, stages_for


@triton.jit
def load_whole(storage, place, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    """Keys or values at offsets `place` [N], all of them seen -> [N, DIM]."""
    channel = tl.arange(0, DIM)
    if DIM != HEAD_DIM:
        return tl.load(storage + place[:, None] + channel[None, :], mask=(channel < HEAD_DIM)[None, :], other=0.0)
    else:
        return tl.load(storage + place[:, None] + channel[None, :])


@triton.jit
def fold_whole(
    q, key, value, scale, softcap, top, total, out, SOFTCAP: tl.constexpr, ON_CPU: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """`running_softmax.fold` of a tile that is seen whole. Beside two products it is as little arithmetic as there can
    be, because exponentials take half as long as the products: the scale is part of the exponent's multiply-add."""
    products = multiply_tiles(q, tl.trans(key), tl.zeros([q.shape[0], key.shape[0]], tl.float32), ON_CPU, PRECISION)
    factor = scale * LOG2_E
    if SOFTCAP:
        products = cap(products * scale, softcap, SOFTCAP)
        factor = LOG2_E
    higher = tl.maximum(top, tl.max(products, 1) * factor)
    weights = tl.exp2(products * factor - higher[:, None])
    shrink = tl.exp2(top - higher)
    total = total * shrink + tl.sum(weights, 1)
    return higher, total, multiply_tiles(weights.to(value.dtype), value, out * shrink[:, None], ON_CPU, PRECISION)


@triton.jit
def prefix_attention(
    query, keys, values, table, lengths, pointers, members, out, lse, part_out, part_lse, scale, softcap,
    stride_page, stride_head, stride_table, groups,
    STRIDE_SLOT: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr, GROUPS_P: tl.constexpr, SPLITS: tl.constexpr, PAGE_SIZE: tl.constexpr,
    WITHIN_PAGE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, STAGES: tl.constexpr,
    MEMBERS: tl.constexpr, SOFTCAP: tl.constexpr, ON_CPU: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, KV_HEADS, SPLITS), tiles enough for all groups. query, out [B, HEADS, HEAD_DIM], lse [B, HEADS].

    With MEMBERS the groups are made of rows members [N] of those, else of all in their order (N = B).
    part_out [N, KV_HEADS, SPLITS, GROUP, DIM] float32, part_lse without DIM.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    number = tl.arange(0, GROUPS_P)
    real = number < groups
    begins = tl.load(pointers + number, mask=real, other=0)
    sizes = (tl.load(pointers + number + 1, mask=real, other=0) - begins) * GROUP
    tiles = tl.cdiv(sizes, BLOCK_T)
    group = tl.sum(tl.where(real & (tl.cumsum(tiles, 0) <= tile), 1, 0), 0)
    if group < groups:
        at = (tile - tl.sum(tl.where(number < group, tiles, 0), 0)) * BLOCK_T + tl.arange(0, BLOCK_T)
        mine = number == group
        inside = at < tl.sum(tl.where(mine, sizes, 0), 0)
        member = (tl.sum(tl.where(mine, begins, 0), 0) + at // GROUP).to(tl.int64)  # of N
        row = member  # of B
        if MEMBERS:
            row = tl.load(members + member, mask=inside, other=0).to(tl.int64)
        head = row * HEADS + kv_head * GROUP + at % GROUP  # of [B, HEADS]
        channel = tl.arange(0, DIM)
        stored = inside[:, None] & (channel < HEAD_DIM)[None, :]
        heads = query + head[:, None] * HEAD_DIM + channel[None, :]
        length = tl.load(lengths + group)
        run = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_S) * BLOCK_S
        begin = split * run
        end = tl.minimum(begin + run, length)
        whole = begin + tl.maximum(end - begin, 0) // BLOCK_S * BLOCK_S
        table += group.to(tl.int64) * stride_table
        plane = kv_head.to(tl.int64) * stride_head
        lane = tl.arange(0, BLOCK_S)
        index = begin if WITHIN_PAGE else begin + lane
        page = page_at(table, entry_at(table, index, length, PAGE_SIZE, "all"), length, PAGE_SIZE, "all")
        wait_for_previous(PDL)
        q = tl.load(heads, mask=stored, other=0.0).to(keys.dtype.element_ty)
        top = tl.full([BLOCK_T], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_T], tl.float32)
        result = tl.zeros([BLOCK_T, DIM], tl.float32)
        for start in tl.range(begin, whole, BLOCK_S, num_stages=STAGES):
            index = (start if WITHIN_PAGE else start + lane) + BLOCK_S
            next_page = page_at(table, entry_at(table, index, length, PAGE_SIZE, "all"), length, PAGE_SIZE, "all")
            place = page.to(tl.int64) * stride_page + plane + slots_of(start, PAGE_SIZE, BLOCK_S) * STRIDE_SLOT
            key = load_whole(keys, place, HEAD_DIM, DIM)
            value = load_whole(values, place, HEAD_DIM, DIM)
            top, total, result = fold_whole(
                q, key, value, scale, softcap, top, total, result, SOFTCAP, ON_CPU, PRECISION
            )  # fmt: skip
            page = next_page
        if whole < end:
            seen = whole + lane < end
            place = page.to(tl.int64) * stride_page + plane + slots_of(whole, PAGE_SIZE, BLOCK_S) * STRIDE_SLOT
            key = load_tile(keys, place, seen, HEAD_DIM, DIM)
            value = load_tile(values, place, seen, HEAD_DIM, DIM)
            scores = scores_of(q, key, scale, softcap, SOFTCAP, ON_CPU, PRECISION)
            scores = tl.where(seen[None, :], scores, float("-inf"))
            top, total, result = fold(scores, value, top, total, result, ON_CPU, PRECISION)
        result, logsum = normalised(top, total, result)
        if SPLITS == 1:
            tl.store(out + head[:, None] * HEAD_DIM + channel[None, :], result, mask=stored)
            tl.store(lse + head, logsum / LOG2_E, mask=inside)
        else:
            part = ((member * KV_HEADS + kv_head) * SPLITS + split) * GROUP + at % GROUP
            tl.store(part_out + part[:, None] * DIM + channel[None, :], result, mask=stored)
            tl.store(part_lse + part, logsum, mask=inside)


@triton.jit
def slots_of(start, PAGE_SIZE: tl.constexpr, BLOCK_S: tl.constexpr):
    """Slots in their pages of tokens start..start+BLOCK_S-1: [BLOCK_S] int64."""
    position = start + tl.arange(0, BLOCK_S)
    if PAGE_SIZE > 0:
        position = position % PAGE_SIZE
    return position.to(tl.int64)


@triton.jit
def merge_splits(
    part_out, part_lse, out, lse, members,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, GROUP_P: tl.constexpr,
    SPLITS: tl.constexpr, SPLITS_P: tl.constexpr, CHUNK: tl.constexpr, MEMBERS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (KV_HEADS, N): the merge of one key head's parts in one row."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    kv_head, member = tl.program_id(0), tl.program_id(1)
    row = member
    if MEMBERS:
        row = tl.load(members + member).to(tl.int32)
    wait_for_previous(PDL)
    merge_parts(
        part_out, part_lse, out, lse, (member * KV_HEADS + kv_head) * SPLITS * GROUP, row * HEADS + kv_head * GROUP,
        SPLITS, GROUP, GROUP_P, SPLITS, SPLITS_P, HEAD_DIM, DIM, CHUNK, True,
    )  # fmt: skip


class Blocks(NamedTuple):
    rows: int  # queries times query heads of a key head
    keys: int
    splits: int
    warps: int
    stages: int


def blocks_for(
    batch: int, kv_heads: int, group: int, head_dim: int, element_size: int, groups: int, longest: int,
    multiprocessors: int,
) -> Blocks:  # fmt: skip
    """Tiles of queries as the average group fills, and splits that fill the multiprocessors. With many queries the
    fastest of those timed on an H200 (`benchmarks/h200_lists.py`): small tiles where they are enough for three waves,
    else large ones, and two programs on every multiprocessor."""
    width = max(16, next_power_of_2(head_dim)) * element_size  # bytes of a key
    rows = max(16, min(128, next_power_of_2(-(-batch * group // groups))))
    rows, keys = (rows, 64) if width <= 256 else (min(rows, 64), 32)
    if rows == 128 and kv_heads * _tiles(batch, group, groups, 64) >= 3 * multiprocessors:
        return Blocks(64, 64, 1, 4, 3)
    programs = kv_heads * _tiles(batch, group, groups, rows)
    if rows == 128:
        return Blocks(128, 64, max(1, min(2 * multiprocessors // programs, -(-longest // 256))), 4, 2)
    splits = splits_for(programs, -(-longest // (4 * keys)), multiprocessors)
    return Blocks(rows, keys, splits, 4, stages_for(rows, keys, width))


def splits_for(programs: int, most: int, multiprocessors: int) -> int:
    """The fewest splits whose last wave of programs leaves the multiprocessors nearly as busy as the best number's."""

    def busy(splits: int) -> float:
        waves = programs * splits / multiprocessors
        return waves / -(-programs * splits // multiprocessors)

    candidates = range(1, max(1, min(most, 64)) + 1)
    best = max(busy(splits) for splits in candidates)
    return next(splits for splits in candidates if busy(splits) >= 0.85 * best)


def launch(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor, pointers: Tensor, out: Tensor, lse: Tensor,
    scale: float, softcap: float | None = None, members: Tensor | None = None, blocks: Blocks | None = None,
    workspace: Workspace | None = None, pdl: bool = False,
) -> None:  # fmt: skip
    """`fewer.kernels.shared_prefix.attend_prefix` into out [B, H, D] and lse [B, H], both float32.

    With `members` [N] integers the groups are made of those rows of q, and nothing is written for the others.
    """
    (batch, heads, head_dim), (kv_heads, page_size) = q.shape, keys.shape[1:3]
    count = batch if members is None else len(members)
    groups, group = len(lengths), heads // kv_heads
    if blocks is None:
        sizes = kv_heads, group, head_dim, keys.element_size(), groups, table.shape[1] * page_size
        blocks = blocks_for(count, *sizes, processors(q.device))
    width, splits = max(16, next_power_of_2(head_dim)), blocks.splits
    part_out, part_lse = out, lse
    if splits > 1:
        workspace = workspace or Workspace(q.device)
        part_out = workspace.take("prefix part out", (count, kv_heads, splits, group, width))
        part_lse = workspace.take("prefix part lse", (count, kv_heads, splits, group))
    single, chosen = table.shape[1] == 1, pointers if members is None else members
    options: dict[str, object] = {"launch_pdl": True} if pdl else {}
    prefix_attention[(_tiles(count, group, groups, blocks.rows), kv_heads, splits)](
        q, keys, values, table, lengths, pointers, chosen, out, lse, part_out, part_lse, scale, softcap or 0.0,
        *keys.stride()[:2], table.stride(0), groups, keys.stride(2), heads, kv_heads, head_dim, width,
        next_power_of_2(groups), splits, 0 if single else page_size, single or page_size % blocks.keys == 0,
        blocks.rows, blocks.keys, blocks.stages, members is not None, bool(softcap), q.device.type == "cpu",
        "ieee" if keys.dtype == torch.float32 else "tf32", pdl, num_warps=blocks.warps, **options,
    )  # fmt: skip
    if splits > 1:
        chunk = max(1, 8192 // (width * next_power_of_2(group)))
        merge_splits[(kv_heads, count)](
            part_out, part_lse, out, lse, chosen, heads, kv_heads, head_dim, width, next_power_of_2(group), splits,
            next_power_of_2(splits), chunk, members is not None, pdl, num_warps=2, **options,
        )  # fmt: skip


def attend_prefix(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor, pointers: Tensor, scale: float,
    softcap: float | None = None, blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `fewer.kernels.shared_prefix.attend_prefix`. keys and values share their strides; D is contiguous."""
    if keys.stride() != values.stride() or keys.stride(3) != 1:
        keys, values = keys.contiguous(), values.contiguous()
    out, lse = torch.empty(q.shape, device=q.device), torch.empty(q.shape[:2], device=q.device)
    launch(q.contiguous(), keys, values, table, lengths, pointers, out, lse, scale, softcap, blocks=blocks)
    return out, lse


def _tiles(batch: int, group: int, groups: int, rows: int) -> int:
    """Enough for every group: each may have one tile that is not full."""
    return -(-batch * group // rows) + groups - 1
