"""Whole rows out of pages: keys and values side by side, unpacked where they are stored in 8 or 4 bits.

One pass over memory, in front of attention that reads them for many queries: `fewer.cache.quantised_pages` has the
layout of a packed row and the same in PyTorch.
"""
# mypy: allow-untyped-defs
# (the arguments of kernels are of Triton's language, not of Python)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

TILE = 4096  # numbers of a program


@triton.jit
def gather_rows_of_pages(
    storage, table, lengths, out, stride_kind, stride_page, stride_table, first_head, batch, longest,
    KV_HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of tokens, KV_HEADS, 2·B). storage [2, pages, heads, PAGE_SIZE, WIDTH], heads first_head.. of it;
    out [2, B, KV_HEADS, longest, HEAD_DIM], zeros behind a row's end. A row of D is handled in two halves."""
    head, plane = tl.program_id(1), tl.program_id(2)
    kind, row = (plane // batch).to(tl.int64), plane % batch
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = token < tl.load(lengths + row)
    page = tl.load(table + row * stride_table + token // PAGE_SIZE, mask=live, other=0).to(tl.int64)
    slot = (first_head + head) * PAGE_SIZE + token % PAGE_SIZE
    rows = storage + kind * stride_kind + (page * stride_page + slot * WIDTH)
    channel = tl.arange(0, HALF)
    real = (channel < HEAD_DIM // 2)[None, :]
    inside = live[:, None] & real
    at = rows[:, None] + channel[None, :]
    first = tl.load(at, mask=inside, other=0)
    if BITS == 4:  # byte c holds channels c and c + D/2
        first, second = first & 15, first >> 4
    else:
        second = tl.load(at + HEAD_DIM // 2, mask=inside, other=0)
    first, second = first.to(tl.float32), second.to(tl.float32)
    if BITS != 16:
        tail = (rows + HEAD_DIM * BITS // 8).to(tl.pointer_type(tl.float16))
        scale = tl.load(tail, mask=live, other=0.0).to(tl.float32)[:, None]
        low = tl.load(tail + 1, mask=live, other=0.0).to(tl.float32)[:, None]
        first, second = low + scale * first, low + scale * second
    place = ((plane.to(tl.int64) * KV_HEADS + head) * longest + token) * HEAD_DIM
    written = (token < longest)[:, None] & real
    target = out + place[:, None] + channel[None, :]
    tl.store(target, first.to(out.dtype.element_ty), mask=written)
    tl.store(target + HEAD_DIM // 2, second.to(out.dtype.element_ty), mask=written)


def gather_rows(
    storage: Tensor, heads: slice, table: Tensor, lengths: Tensor, longest: int, head_dim: int, bits: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """storage [2 (keys, values), pages, heads of the pool, page_size, width] contiguous, table [B, P] int32, lengths
    [B] -> keys and values [B, Hk, longest, D] of `heads` in `dtype`, zeros behind a row's end. D is even."""
    _, _, pooled, page_size, width = storage.shape
    batch, count = len(table), heads.stop - heads.start
    out = torch.empty(2, batch, count, longest, head_dim, dtype=dtype, device=storage.device)
    half = next_power_of_2(head_dim // 2)
    block = max(1, min(next_power_of_2(max(1, longest)), TILE // half))
    if out.numel():
        gather_rows_of_pages[(triton.cdiv(longest, block), count, 2 * batch)](
            storage, table, lengths, out, storage.stride(0), pooled * page_size * width, table.stride(0), heads.start,
            batch, longest, count, page_size, width, head_dim, half, bits, block,
        )  # fmt: skip
    return out[0], out[1]
