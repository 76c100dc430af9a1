"""Prefill attention over kept tiles: sinks and window per head, or listed tiles; and the weighted column sums.

A program takes one tile of queries of one head (for column sums: one tile of keys) and steps through the tiles that it
keeps; the loops know no others. The interior of a window needs no mask and has a loop of its own.

Source: FlashAttention, arXiv 2205.14135; an iterator over kept tiles as in LServe, arXiv 2502.14866, section 3.2.
"""
# mypy: allow-untyped-defs
# (the arguments of kernels are of Triton's language, not of Python)

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from fewer.kernels.tile_attention import Lambda, TileLists, Tiles
from fewer.kernels.triton.attention import LOG2_E
from fewer.kernels.triton.running_softmax import fold, normalised, scores_of, stages_for


@triton.jit
def rows_at(base, first, stop, stride, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Vectors first..first+BLOCK-1 of a head, zeros from `stop` on: [BLOCK, DIM]."""
    index, channel = first + tl.arange(0, BLOCK), tl.arange(0, DIM)
    inside = (index < stop)[:, None]
    if DIM != HEAD_DIM:
        inside = inside & (channel < HEAD_DIM)[None, :]
    return tl.load(base + index[:, None].to(tl.int64) * stride + channel[None, :], mask=inside, other=0.0)


@triton.jit
def seen_by(i, j, keys, sinks, window, CAUSAL: tl.constexpr, LAMBDA: tl.constexpr):
    """Whether queries at positions i see keys j; i and j [M, 1] and [1, N], or the other way round."""
    seen = j < keys
    if CAUSAL:
        seen = seen & (j <= i)
    if LAMBDA:
        seen = seen & ((j < sinks) | (i - j < window))
    return seen


@triton.jit
def tile_attention(
    query, keys, values, out, lse, starts, first_rule, second_rule, kinds, scale, softcap,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, queries, key_count, tiles, longest,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr, STAGES: tl.constexpr, LAMBDA: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr,
    ON_CPU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (HEADS, tiles of queries, B). LAMBDA: the rules are sinks and windows [HEADS]; otherwise they are the lists
    [kinds, tiles, longest] and counts [kinds, tiles], and kinds [B, HEADS]. out [B, HEADS, T, HEAD_DIM], lse without.
    """
    head, row = tl.program_id(0), tl.program_id(2)
    tile = tiles - 1 - tl.program_id(1)  # late queries see most: they start first
    at = tile * BLOCK_T
    first = tl.load(starts + row) + at  # position of the first query
    count = tl.minimum(BLOCK_T, queries - at)
    stop = key_count
    if CAUSAL:
        stop = tl.minimum(key_count, first + count)
    lane, column, channel = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_S), tl.arange(0, DIM)
    plane = row.to(tl.int64) * stride_kb + (head // (HEADS // KV_HEADS)).to(tl.int64) * stride_kh
    keys += plane
    values += plane
    q_at = query + row.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    q = rows_at(q_at, at, queries, stride_qt, HEAD_DIM, DIM, BLOCK_T).to(keys.dtype.element_ty)
    top = tl.full([BLOCK_T], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    result = tl.zeros([BLOCK_T, DIM], tl.float32)
    sinks, window = 0, 0
    if LAMBDA:
        sinks = tl.load(first_rule + head)
        window = tl.load(second_rule + head)
        behind = tl.cdiv(stop, BLOCK_S)
        low = tl.minimum(behind, tl.maximum(0, first - window + 1) // BLOCK_S)  # first tile of any query's window
        inner = tl.minimum(behind, tl.cdiv(tl.maximum(0, first + count - window), BLOCK_S))  # all see all from here
        outer = tl.maximum(inner, tl.minimum(first + 1, key_count) // BLOCK_S)  # to here
        of_sinks = tl.minimum(low, tl.cdiv(sinks, BLOCK_S))
        edges = of_sinks + inner - low + behind - outer
        for index in tl.range(inner, outer, num_stages=STAGES):
            key = rows_at(keys, index * BLOCK_S, key_count, stride_ks, HEAD_DIM, DIM, BLOCK_S)
            value = rows_at(values, index * BLOCK_S, key_count, stride_ks, HEAD_DIM, DIM, BLOCK_S)
            scores = scores_of(q, key, scale, softcap, SOFTCAP, ON_CPU, PRECISION)
            top, total, result = fold(scores, value, top, total, result, ON_CPU, PRECISION)
    else:
        kind = tl.load(kinds + row * HEADS + head)
        first_rule += (kind * tiles + tile).to(tl.int64) * longest
        edges = tl.load(second_rule + kind * tiles + tile)
    for step in tl.range(0, edges, num_stages=STAGES):
        if LAMBDA:  # the sinks, the left edge of the window, its right edge
            index = low + step - of_sinks
            index += tl.where(index < inner, 0, outer - inner)
            index = tl.where(step < of_sinks, step, index)
        else:
            index = tl.load(first_rule + step)
            index = tl.where(index < 0, tl.cdiv(key_count, BLOCK_S), index)  # behind all keys: nothing is read
        key = rows_at(keys, index * BLOCK_S, stop, stride_ks, HEAD_DIM, DIM, BLOCK_S)
        value = rows_at(values, index * BLOCK_S, stop, stride_ks, HEAD_DIM, DIM, BLOCK_S)
        scores = scores_of(q, key, scale, softcap, SOFTCAP, ON_CPU, PRECISION)
        seen = seen_by(
            (first + lane)[:, None], (index * BLOCK_S + column)[None, :], stop, sinks, window, CAUSAL, LAMBDA
        )
        scores = tl.where(seen, scores, float("-inf"))
        top, total, result = fold(scores, value, top, total, result, ON_CPU, PRECISION)
    result, logsum = normalised(top, total, result)
    line = (row * HEADS + head).to(tl.int64) * queries + at + lane
    inside = at + lane < queries
    stored = inside[:, None] & (channel < HEAD_DIM)[None, :]
    tl.store(out + line[:, None] * HEAD_DIM + channel[None, :], result.to(out.dtype.element_ty), mask=stored)
    tl.store(lse + line, logsum / LOG2_E, mask=inside)


@triton.jit
def sum_columns(
    query, keys, lse, weights, sums, starts, first_rule, second_rule, kinds, scale, softcap,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, queries, key_count, tiles, longest,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr, STAGES: tl.constexpr, LAMBDA: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr,
    ON_CPU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (HEADS, tiles of keys, B): sums [B, HEADS, S] float32. weights [B, T], lse [B, HEADS, T].

    Rules as in `tile_attention`, but the lists are those of `TileLists.transposed`: tiles of queries for each of keys.
    """
    head, tile, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(starts + row)
    lane = tl.arange(0, BLOCK_T)
    j = tile * BLOCK_S + tl.arange(0, BLOCK_S)
    plane = row.to(tl.int64) * stride_kb + (head // (HEADS // KV_HEADS)).to(tl.int64) * stride_kh
    key = rows_at(keys + plane, tile * BLOCK_S, key_count, stride_ks, HEAD_DIM, DIM, BLOCK_S)
    query += row.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    lse += (row * HEADS + head).to(tl.int64) * queries
    weights += row.to(tl.int64) * queries
    total = tl.zeros([BLOCK_S], tl.float32)
    sinks, window, low = 0, 0, 0
    if LAMBDA:
        sinks = tl.load(first_rule + head)
        window = tl.load(second_rule + head)
        low = tl.minimum(queries, tl.maximum(0, tile * BLOCK_S - start)) // BLOCK_T
        behind = tl.minimum(queries, tl.maximum(0, (tile + 1) * BLOCK_S - 1 - start + window))
        behind = tl.where(tile * BLOCK_S < sinks, queries, behind)
        steps = tl.maximum(0, tl.cdiv(behind, BLOCK_T) - low)
    else:
        kind = tl.load(kinds + row * HEADS + head)
        first_rule += (kind * tiles + tile).to(tl.int64) * longest
        steps = tl.load(second_rule + kind * tiles + tile)
    for step in tl.range(0, steps, num_stages=STAGES):
        at = (low + step if LAMBDA else tl.load(first_rule + step)) * BLOCK_T
        q = rows_at(query, at, queries, stride_qt, HEAD_DIM, DIM, BLOCK_T).to(key.dtype)
        inside = at + lane < queries
        weight = tl.load(weights + at + lane, mask=inside, other=0.0)
        base = tl.load(lse + at + lane, mask=inside, other=float("-inf"))
        base = tl.where(base == float("-inf"), 0.0, base)  # a query that saw nothing gives nothing
        scores = scores_of(key, q, scale, softcap, SOFTCAP, ON_CPU, PRECISION)  # [BLOCK_S, BLOCK_T]
        seen = seen_by((start + at + lane)[None, :], j[:, None], key_count, sinks, window, CAUSAL, LAMBDA)
        shares = tl.exp2(scores - base[None, :] * LOG2_E) * weight[None, :]
        total += tl.sum(tl.where(seen, shares, 0.0), 1)
    tl.store(sums + (row * HEADS + head).to(tl.int64) * key_count + j, total, mask=j < key_count)


class Blocks(NamedTuple):
    queries: int  # of a tile; those of `TileLists` are given
    keys: int
    warps: int
    stages: int


def blocks_for(tiles: Tiles, head_dim: int, element_size: int) -> Blocks:
    width = max(16, next_power_of_2(head_dim)) * element_size  # bytes of a key
    queries, keys = (128, 64) if width <= 256 else (64, 32)
    if isinstance(tiles, TileLists):
        queries, keys = tiles.query_tile, tiles.key_tile
    return Blocks(queries, keys, 8 if queries >= 128 else 4, stages_for(queries, keys, width))


def attend_tiles(
    q: Tensor, k: Tensor, v: Tensor, start: int | Tensor, tiles: Tiles, scale: float, softcap: float | None = None,
    causal: bool = True, blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `fewer.kernels.tile_attention.attend_tiles`, for any strides with D contiguous."""
    if k.stride() != v.stride():
        k, v = k.contiguous(), v.contiguous()
    blocks = blocks or blocks_for(tiles, q.shape[3], k.element_size())
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], device=q.device)
    _launch(
        tile_attention,
        -(-q.shape[2] // blocks.queries),
        (q, k, v, out, lse),
        start,
        tiles,
        scale,
        softcap,
        causal,
        blocks,
    )
    return out, lse


def column_sums(
    q: Tensor, k: Tensor, lse: Tensor, weights: Tensor, start: int | Tensor, tiles: Tiles, scale: float,
    softcap: float | None = None, causal: bool = True, blocks: Blocks | None = None,
) -> Tensor:  # fmt: skip
    """As `fewer.kernels.tile_attention.column_sums`, for any strides with D contiguous."""
    blocks = blocks or blocks_for(tiles, q.shape[3], k.element_size())
    key_tiles = -(-k.shape[2] // blocks.keys)
    if isinstance(tiles, TileLists):
        tiles = tiles.transposed(key_tiles)
    weights = weights.float().expand(len(q), -1).contiguous()
    sums = torch.empty(*q.shape[:2], k.shape[2], device=q.device)
    tensors = (q, k, lse.contiguous(), weights, sums)
    _launch(sum_columns, key_tiles, tensors, start, tiles, scale, softcap, causal, blocks)
    return sums


def _launch(
    kernel: Any, count: int, tensors: tuple[Tensor, ...], start: int | Tensor, tiles: Tiles, scale: float,
    softcap: float | None, causal: bool, blocks: Blocks,
) -> None:  # fmt: skip
    """`count` tiles of every head and row; both kernels take the same arguments behind their five tensors."""
    q, k = tensors[:2]
    if q.stride(3) != 1 or k.stride(3) != 1:
        raise ValueError("the channels of queries, keys and values must be contiguous")
    batch, heads, queries, head_dim = q.shape
    if not isinstance(start, Tensor):
        start = torch.full((batch,), start, dtype=torch.int32, device=q.device)
    if isinstance(tiles, Lambda):
        rules, longest = (tiles.sinks, tiles.windows, tiles.sinks), 0
    else:
        rules, longest = (tiles.lists.contiguous(), tiles.counts.contiguous(), tiles.kinds), tiles.lists.shape[2]
    kernel[(heads, count, batch)](
        *tensors, start, *rules, scale, softcap or 0.0, *q.stride()[:3], *k.stride()[:3], queries, k.shape[2], count,
        longest, heads, k.shape[1], head_dim, max(16, next_power_of_2(head_dim)), blocks.queries, blocks.keys,
        blocks.stages, isinstance(tiles, Lambda), causal, bool(softcap), q.device.type == "cpu",
        "ieee" if k.dtype == torch.float32 else "tf32", num_warps=blocks.warps,
    )  # fmt: skip
