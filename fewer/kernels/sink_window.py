"""Causal attention to sinks and a window over many queries, block by block: O(T·(sinks + window)) and no T x S mask.

Query i sees key j where j <= i and (j < sinks or i - j < window). Blocks of queries run through PyTorch's fused
attention over their own keys alone, and gradients flow. On CUDA, where no gradient is asked for, it is
`fewer.kernels.tile_attention`, which takes rules that differ by head.

Source: the streaming heads of DuoAttention, arXiv 2410.10819, section 2.3 (a "Λ-shaped" mask).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewer.kernels.attention import attention, wants_gradient
from fewer.kernels.tile_attention import Lambda, attend_tiles

BLOCK = 128  # queries at a time


def sink_window_attention(
    q: Tensor, k: Tensor, v: Tensor, start: int, sinks: int, window: int, scale: float, softcap: float = 0.0
) -> Tensor:
    """q [B, H, T, D], k and v [B, Hk, start + T, D] -> [B, H, T, D]. Query t stands at start + t, key s at s."""
    width = q.shape[2]
    if q.is_cuda and not wants_gradient(q, k, v):
        of_head = torch.ones(q.shape[1], dtype=torch.int32, device=q.device)
        return attend_tiles(q, k, v, start, Lambda(sinks * of_head, window * of_head), scale, softcap or None)[0]
    parts = []
    for first in range(0, width, BLOCK):
        stop = min(width, first + BLOCK)
        low = max(sinks, start + first - window + 1)  # the first key of this block's windows
        high = start + stop
        keys, values = k[:, :, :high], v[:, :, :high]
        places = torch.arange(high, device=q.device)
        if low > sinks:
            keys, values = (torch.cat((part[:, :, :sinks], part[:, :, low:]), dim=2) for part in (keys, values))
            places = torch.cat((places[:sinks], places[low:]))
        behind = torch.arange(start + first, high, device=q.device)[:, None] - places  # [T, S]
        seen = (behind >= 0) & ((behind < window) | (places < sinks))
        parts.append(attention(q[:, :, first:stop], keys, values, scale, seen[None, None], softcap=softcap))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
