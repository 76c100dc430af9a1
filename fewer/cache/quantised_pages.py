"""Keys and values in 16, 8 or 4 bits: how a row of D numbers lies in a page, and attention over such pages.

Source: QServe, arXiv 2405.04532 (KV8 and KV4: asymmetric, a scale and a zero for each token and head, found when the
token comes); LServe, arXiv 2502.14866, section 3.4 (pages of them).

A quantised row is D·bits/8 bytes of codes, then its scale and its lowest number in float16:

    x ≈ low + scale·code      with  low = min x,  scale = (max x - min x) / (2^bits - 1),  code = 0 … 2^bits - 1

Both are rounded before codes are chosen. A row carries its own scale, so whatever keeps rows keeps these: a `PagePool`
of uint8 with D·bits/8 + 4 numbers in place of D grows, copies and shares them as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewer.errors import UsageError
from fewer.kernels.attention import attention
from fewer.kernels.list_attention import attend_list

Bits = Literal[16, 8, 4]
LARGEST = torch.finfo(torch.float16).max
SCALE_BYTES = 4  # a scale and a lowest number, float16


@dataclass(frozen=True)
class RowLayout:
    """D numbers of `dtype` as `width` stored ones: themselves with 16 bits, else bytes of codes and of their scale."""

    head_dim: int
    bits: Bits
    dtype: torch.dtype  # of the numbers; with 16 bits they are stored so (float32, too)

    def __post_init__(self) -> None:
        if self.bits == 4 and self.head_dim % 4:
            raise UsageError(f"4-bit keys and values need a head size that 4 divides, not {self.head_dim}: use 8 bits")

    @property
    def quantised(self) -> bool:
        return self.bits != 16

    @property
    def stored_dtype(self) -> torch.dtype:
        return torch.uint8 if self.quantised else self.dtype

    @property
    def width(self) -> int:
        return self.code_bytes + SCALE_BYTES if self.quantised else self.head_dim

    @property
    def code_bytes(self) -> int:
        return self.head_dim * self.bits // 8

    def pack(self, x: Tensor) -> Tensor:
        """x [.., D] -> rows [.., width] of the stored dtype."""
        if not self.quantised:
            return x.to(self.dtype)
        x, top = x.float(), 2**self.bits - 1
        low, high = x.aminmax(dim=-1, keepdim=True)
        low = low.clamp(-LARGEST, LARGEST).half()
        scale = ((high - low) / top).clamp(max=LARGEST).half()
        steps = (x - low.float()) / scale.float().masked_fill(scale == 0, 1.0)
        codes = steps.round_().clamp_(0, top).to(torch.uint8)
        if self.bits == 4:  # channel c and channel c + D/2 share byte c
            first, second = codes.chunk(2, dim=-1)
            codes = first | (second << 4)
        return torch.cat((codes, torch.cat((scale, low), dim=-1).view(torch.uint8)), dim=-1)

    def unpack(self, rows: Tensor) -> Tensor:
        """rows [.., width] -> the numbers that they stand for [.., D]."""
        if not self.quantised:
            return rows
        codes, scale, low = self.parts(rows)
        return torch.addcmul(low.float(), codes.float(), scale.float()).to(self.dtype)

    def parts(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """rows [.., width] -> codes [.., D] uint8, scale and low [.., 1] float16."""
        codes, tail = rows[..., : self.code_bytes], rows[..., self.code_bytes :]
        if self.bits == 4:
            codes = torch.cat((codes & 15, codes >> 4), dim=-1)
        scale, low = tail.contiguous().view(torch.float16).chunk(2, dim=-1)
        return codes, scale, low

    def round_trip(self, x: Tensor) -> Tensor:
        """What a reader finds of x [.., D]."""
        return self.unpack(self.pack(x))


def attend_whole_rows(
    q: Tensor,
    layout: RowLayout,
    storage: Tensor,
    heads: slice,
    table: Tensor,
    lengths: Tensor,
    scale: float,
    mask: Tensor | None = None,
    causal: bool = False,
    softcap: float = 0.0,
    longest: int | None = None,
) -> Tensor:
    """q [B, H, T, D] over all that rows of `lengths` [B] tokens hold -> [B, H, T, D].

    storage [2 (keys, values), pages, heads of the pool, page_size, width] of this layout, `heads` those to read, table
    [B, P] int32. `mask` bool [B, 1, T, S] says what is seen of a row; without one a query sees all of it. `causal`: the
    T new tokens (or fewer) are a row's last, and query t sees slots 0..S-T+t. `longest`: S, the largest of the lengths,
    where the host knows it.
    """
    if q.is_cuda and not layout.quantised and q.shape[2] == 1 and mask is None and not causal:
        keys, values = storage[:, :, heads]
        whole = attend_list(q[:, :, 0], keys, values, table, None, None, "page", lengths.int(), scale, softcap or None)
        return whole.out.to(q.dtype)[:, :, None]
    if longest is None:
        longest = int(lengths.max())
    if q.is_cuda and layout.head_dim % 2 == 0:
        from fewer.kernels.triton.gather_rows import gather_rows  # Triton is imported only where there is a GPU

        k, v = gather_rows(storage, heads, table, lengths, longest, layout.head_dim, layout.bits, layout.dtype)
        if mask is None and not causal and len(q) > 1:
            mask = (torch.arange(longest, device=q.device) < lengths[:, None])[:, None, None]
        return attention(q, k, v, scale, mask, causal, softcap)
    shortest = int(lengths.min())
    pages = table[:, None, : -(-longest // storage.shape[3])].clamp(min=0).long()
    k, v = (layout.unpack(rows[:, :, :longest]) for rows in _rows(storage, pages, _numbers(heads, q.device)[:, None]))
    if shortest < longest:
        live = torch.arange(longest, device=q.device) < lengths[:, None]  # [B, S]
        k, v = (part.masked_fill(~live[:, None, :, None], 0.0) for part in (k, v))  # 0·NaN is NaN
        if not causal:
            mask = live[:, None, None] if mask is None else mask & live[:, None, None]
    return attention(q, k, v, scale, mask, causal, softcap)


def attend_listed_pages(
    q: Tensor,
    layout: RowLayout,
    storage: Tensor,
    heads: slice,
    table: Tensor,
    lists: Tensor,
    lengths: Tensor,
    scale: float,
    softcap: float = 0.0,
) -> Tensor:
    """One new token a row over listed pages: q [B, H, D] -> [B, H, D] in q's dtype.

    Arguments as above; lists [B, H or Hk, n] int32: logical pages, none twice, the row's newest one last; negative ones
    are ignored. Only listed pages are read and unpacked.
    """
    if q.is_cuda and not layout.quantised:
        keys, values = storage[:, :, heads]
        part = attend_list(q, keys, values, table, lists, None, "page", lengths.int(), scale, softcap or None)
        return part.out.to(q.dtype)
    (batch, list_heads, count), page_size = lists.shape, storage.shape[3]
    rows = torch.arange(batch, device=q.device)[:, None, None]
    pages = table[rows, lists.clamp(min=0).long()].clamp(min=0).long()  # [B, list heads, n]
    numbers = _numbers(heads, q.device)
    k, v = _rows(storage, pages, numbers.repeat_interleave(list_heads // len(numbers))[:, None])
    if batch == 1 and bool((lists >= 0).all()):  # whole pages, and what there is of the newest
        stop = (count - 1) * page_size + (int(lengths[0]) - 1) % page_size + 1
        k, v = (layout.unpack(part[:, :, :stop]) for part in (k, v))
        return attention(q[:, :, None], k, v, scale, softcap=softcap)[:, :, 0]
    position = lists[..., None] * page_size + torch.arange(page_size, device=q.device)  # [B, list heads, n, page_size]
    seen = ((lists[..., None] >= 0) & (position < lengths[:, None, None, None])).flatten(2)
    k, v = (layout.unpack(part).masked_fill(~seen[..., None], 0.0) for part in (k, v))
    return attention(q[:, :, None], k, v, scale, seen[:, :, None], softcap=softcap)[:, :, 0]


def _rows(storage: Tensor, pages: Tensor, heads: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens of physical pages [B, h or 1, n] of heads [h, 1] as they are stored: keys and values
    [B, h, n·page_size, width]. A page of a head is one run of memory, and is copied as one."""
    blocks = pages * storage.shape[2] + heads
    keys, values = (half.flatten(0, 1).index_select(0, blocks.flatten()) for half in storage)
    return (
        keys.view(*blocks.shape[:2], -1, storage.shape[4]),
        values.view(*blocks.shape[:2], -1, storage.shape[4]),
    )


def _numbers(heads: slice, device: torch.device) -> Tensor:
    return torch.arange(heads.start, heads.stop, device=device)
