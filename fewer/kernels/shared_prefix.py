"""Attention of many sequences over a prefix that they share: a matrix product where each alone has matrix-vector ones.

Rows of the batch that share a prefix are adjacent and form a group. Their queries, and the H / Hk query heads of a key
head with them, become the rows of one product, so the prefix is read once a group. The result is one part of the
attention: `fewer.kernels.attention.merge` joins it with the parts over what each sequence has of its own, and with
those of other levels of a tree of prefixes. Exact up to rounding.

Paper: Hydragen, arXiv 2402.05099, section 3 (attention decomposition and inter-sequence batching).
Differs from the official code: groups may be of any size, and a prefix lies in pages as every other run of keys.
CUDA tensors go to `fewer.kernels.triton.shared_prefix`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewer.kernels.attention_part import attention_part
from fewer.kernels.list_attention import stretch


def attend_prefix(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    lengths: Tensor,
    pointers: Tensor,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """q [B, H, D] -> (output [B, H, D], log-sum-exp [B, H]), both float32.

    Rows pointers[g] .. pointers[g + 1] - 1 see tokens 0 .. lengths[g] - 1 of prefix g, and every row is in a group:
    pointers [groups + 1] int32 from 0 to B, lengths [groups] int32. keys, values [pages, Hk, page_size, D] and table
    [groups, P] int32 as in `fewer.kernels.list_attention`; a prefix [Hk, length, D] of its own is one page. A row of a
    group without a prefix gets zeros and -inf. Several new tokens a sequence are several rows.
    """
    if q.is_cuda:
        from fewer.kernels.triton import shared_prefix as fused

        return fused.attend_prefix(q, keys, values, table, lengths, pointers, scale, softcap)
    _, heads, head_dim = q.shape
    kv_heads = keys.shape[1]
    out, lse = torch.zeros(q.shape), torch.full(q.shape[:2], -torch.inf)
    ends = pointers.tolist()
    for group, (first, stop, length) in enumerate(zip(ends, ends[1:], lengths.tolist(), strict=False)):
        if not length or first == stop:
            continue
        folded = q[first:stop].view(-1, kv_heads, heads // kv_heads, head_dim)  # [rows, Hk, G, D]
        folded = folded.transpose(0, 1).flatten(1, 2)[None]  # [1, Hk, rows·G, D]
        k, v = (stretch(part, table[group], length)[None] for part in (keys, values))
        part, total = attention_part(folded, k, v, scale, softcap=softcap or 0.0)
        out[first:stop] = part.view(kv_heads, stop - first, -1, head_dim).transpose(0, 1).flatten(1, 2)
        lse[first:stop] = total.view(kv_heads, stop - first, -1).transpose(0, 1).flatten(1, 2)
    return out, lse
