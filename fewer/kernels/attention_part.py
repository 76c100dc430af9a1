"""One part of the attention, output and log-sum-exp, by the fastest exact way on this device.

`fewer.kernels.attention.attention` is as fast and does not tell the log-sum-exp; `attend` tells it and is the
reference, whose scores exist all at once. On the CPU the flash kernel behind PyTorch's own
`scaled_dot_product_attention` tells both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewer.kernels.attention import attend, wants_gradient, with_causal
from fewer.kernels.causal import causal_attention

FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
MOST_SCORES = 1 << 26  # that the reference may hold at once


def attention_part(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None = None,
    causal: bool = False,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """q [B, H, T, D], k and v [B, Hk, S, D] -> (output [B, H, T, D] in q's dtype, log-sum-exp [B, H, T] float32).

    `mask` bool [B or 1, 1, T or 1, S]: True = visible. `causal`: S >= T and query t sees keys 0..S-T+t.
    Queries that see nothing give zeros and -inf.
    """
    if causal and mask is None and q.is_cuda and q.dtype == k.dtype and not wants_gradient(q, k, v):
        return causal_attention(q, k, v, scale, softcap)
    mask = with_causal(mask, causal, q.shape[2], k.shape[2], q.device)
    if q.is_cuda or softcap or FLASH is None or q.dtype != k.dtype or not k.shape[2]:
        return _by_reference(q, k, v, scale, mask, softcap)
    return _by_flash(q, k, v, scale, mask)


def _by_flash(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The query heads of a key head become further queries of it, so that keys are read once and not repeated."""
    assert FLASH is not None
    batch, heads, queries, head_dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    folded = q.reshape(batch, kv_heads, group * queries, head_dim)
    if mask is None:
        out, lse = FLASH(folded, k, v, 0.0, False, scale=scale)
        return out.reshape(q.shape), lse.reshape(batch, heads, queries)
    visible = mask.expand(-1, -1, queries, -1)
    added = torch.zeros(visible.shape, dtype=q.dtype).masked_fill_(~visible, -torch.inf).repeat(1, 1, group, 1)
    out, lse = FLASH(folded, k, v, 0.0, False, attn_mask=added, scale=scale)
    blind = ~visible.any(-1)  # [B, 1, T]: the kernel gives them a sum of its own, and zeros
    return out.reshape(q.shape), lse.reshape(batch, heads, queries).masked_fill(blind, -torch.inf)


def _by_reference(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, softcap: float
) -> tuple[Tensor, Tensor]:
    """Some queries at a time, so that their scores fit."""
    batch, heads, queries, _ = q.shape
    most = max(1, MOST_SCORES // max(1, batch * heads * k.shape[2]))
    parts = []
    for first in range(0, queries, most):
        some = slice(first, first + most)
        seen = mask if mask is None or mask.shape[2] == 1 else mask[:, :, some]
        parts.append(attend(q[:, :, some], k, v, scale, seen, softcap))
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, 2), torch.cat(lses, 2)
