"""Attention of many rows over one shared prefix by cuDNN, whose kernel is faster on Hopper than ours with many queries.

All queries of a key head are the rows of one matrix, as in `fewer.kernels.shared_prefix`; the part is rounded to the
queries' type before it is merged. cuDNN takes half a second to make its plan for a length that it has not met.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewer.kernels.causal import is_sound

FEWEST_QUERIES = 2048  # of a key head: below, ours is as fast, because it is split along the prefix
SHORTEST = 4096  # keys


def suits(q: Tensor, keys: Tensor, softcap: float | None) -> bool:
    """q [B, H, D] over all of keys [Hk, P, D]."""
    if not q.is_cuda or softcap or q.dtype not in (torch.bfloat16, torch.float16) or keys.dtype != q.dtype:
        return False
    batch, heads, head_dim = q.shape
    group, long_enough = heads // keys.shape[0], keys.shape[1] >= SHORTEST
    if not long_enough or batch * group < FEWEST_QUERIES or head_dim > 128 or head_dim % 8:
        return False
    on_hopper = torch.cuda.get_device_capability(q.device) >= (9, 0)
    return on_hopper and is_sound("cudnn", q.device, q.dtype, head_dim, group)


def attend_all(q: Tensor, keys: Tensor, values: Tensor, scale: float, out: Tensor, lse: Tensor) -> None:
    """q [B, H, D], keys and values [Hk, P, D] -> out [B, H, D] and lse [B, H], natural, both float32."""
    (batch, heads, head_dim), kv_heads = q.shape, len(keys)
    by_head = batch, kv_heads, heads // kv_heads
    folded = q.view(*by_head, head_dim).transpose(0, 1).reshape(1, kv_heads, -1, head_dim)
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(
        folded, keys[None], values[None], None, True, 0.0, False, False, scale=scale
    )
    part, sums = found[0].view(kv_heads, batch, -1, head_dim), found[1].view(kv_heads, batch, -1)
    out.view(*by_head, head_dim).copy_(part.transpose(0, 1))
    lse.view(by_head).copy_(sums.transpose(0, 1))
