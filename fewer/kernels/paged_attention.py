"""Attention over keys and values that lie in pages: the reference for every paged cache, and its way on the CPU.

keys, values [pages, Hk, page_size, D]; `table` [B, P] names the page of each run of page_size slots of a row, and a
negative number none; `lengths` [B] says how many of the row's slots hold a token. The others are never seen, whatever
lies in them. A contiguous cache [B, Hk, capacity, D] is the case page_size = capacity, table = arange(B)[:, None].
`fewer.kernels.list_attention` has the same layout, for one query a row and chosen keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewer.kernels.attention import attend, attention


def attend_paged(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    lengths: Tensor,
    scale: float,
    mask: Tensor | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The reference: q [B, H, T, D] -> (output [B, H, T, D] in q's dtype, log-sum-exp [B, H, T] float32).

    `mask` bool [B or 1, 1, T, S], S at least the longest row: True = visible, by slot. Without it a query sees its
    whole row. A query that sees nothing gives zeros and -inf.
    """
    k, v, live = gather_pages(keys, values, table, lengths)
    return attend(q, k, v, scale, _both(mask, live, k.shape[2]), softcap)


def paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    lengths: Tensor,
    scale: float,
    mask: Tensor | None = None,
    causal: bool = False,
    softcap: float = 0.0,
) -> Tensor:
    """The output of `attend_paged` alone, by the fastest exact way on this device. `causal`: the T new tokens are the
    last of the S slots that the longest row fills, and query t sees slots 0..S-T+t (0..t where T > S)."""
    k, v, live = gather_pages(keys, values, table, lengths)
    # The triangle already hides a shorter row's end from all of its queries.
    seen = None if causal else _both(mask, live, k.shape[2])
    return attention(q, k, v, scale, seen, causal, softcap)


def gather_pages(keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """The rows side by side: keys and values [B, Hk, S, D], S the longest row, zeros behind a row's end; and which
    slots hold a token [B, 1, 1, S] bool, None where all do."""
    kv_heads, page_size, head_dim = keys.shape[1:]
    longest = max(int(lengths.max()), 0)
    reached = table[:, : -(-longest // page_size)].clamp(min=0).long()  # [B, P]
    heads = torch.arange(kv_heads, device=keys.device)[:, None]
    blocks = (reached[:, None] * kv_heads + heads).flatten()  # [B·Hk·P] (page, head) pairs, each page_size x D numbers
    shape = len(table), kv_heads, reached.shape[1] * page_size, head_dim
    k, v = (part.flatten(0, 1).index_select(0, blocks).view(shape)[:, :, :longest] for part in (keys, values))
    if int(lengths.min()) >= longest:
        return k, v, None
    live = torch.arange(longest, device=keys.device) < lengths[:, None, None, None]  # [B, 1, 1, S]
    dead = ~live[:, 0, :, :, None]  # what a mask hides must be finite all the same: 0·NaN is NaN
    return k.masked_fill(dead, 0.0), v.masked_fill(dead, 0.0), live


def _both(mask: Tensor | None, live: Tensor | None, slots: int) -> Tensor | None:
    if mask is None:
        return live
    return mask[..., :slots] if live is None else mask[..., :slots] & live
