"""Attention over stored keys and values: output, log-sum-exp, and the associative merge of parts.

Queries are grouped: H query heads share Hk key heads, H = Hk·G, and query head h reads key head h // G.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None = None,
    causal: bool = False,
    softcap: float = 0.0,
) -> Tensor:
    """q [B, H, T, D], k and v [B, Hk, S, D] -> [B, H, T, D], by the fastest exact way on this device.

    `mask` bool, broadcast to [B, 1, T, S]: True = visible. `causal`: the queries are the last of the S keys, and query
    t sees keys 0..S-T+t (0..t where T > S: the last queries are padding). One query with neither sees every key. Rows
    that see nothing give zeros.
    """
    batch, heads, queries, head_dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    if causal and mask is None and q.is_cuda and keys >= queries and not wants_gradient(q, k, v):
        from fewer.kernels.causal import causal_attention  # which is made of this module's functions

        if keys > queries or softcap or q.element_size() == 2:
            return causal_attention(q, k, v, scale, softcap)[0]
    if softcap or (causal and keys > queries):  # PyTorch's triangle begins at the top left
        mask, causal = with_causal(mask, causal, queries, keys, q.device), False
    if softcap:
        return attend(q, k, v, scale, mask, softcap)[0]
    if heads == kv_heads:
        return functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale)
    if queries == 1:  # the queries of a group become the rows of one product: keys are read once
        grouped = q.reshape(batch, kv_heads, heads // kv_heads, head_dim)
        out = functional.scaled_dot_product_attention(grouped, k, v, mask, scale=scale)
        return out.reshape(batch, heads, 1, head_dim)
    return functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=True)


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The reference: (output [B, H, T, D] in q's dtype, log-sum-exp [B, H, T] float32); float32 inside."""
    batch, heads, queries, head_dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    grouped = q.float().view(batch, kv_heads, heads // kv_heads, queries, head_dim)
    scores = torch.einsum("bkgtd,bksd->bkgts", grouped, k.float()) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        visible = mask.expand(batch, -1, queries, keys)[:, :, None]
        scores = scores.masked_fill(~visible, float("-inf"))
    weights, total, lse = exponentials(scores)  # [B, Hk, G, T, S], twice [B, Hk, G, T]
    out = torch.einsum("bkgts,bksd->bkgtd", weights, v.float()) / total[..., None]
    return out.reshape(batch, heads, queries, head_dim).to(q.dtype), lse.reshape(batch, heads, queries)


def exponentials(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """scores [.., S] -> exp(scores - max) [.., S], their sum [..] (1 where nothing is visible) and the log-sum-exp [..]
    (-inf there). Overwrites the scores: few passes over memory are what this is for."""
    if not scores.shape[-1]:
        nothing = scores.new_zeros(scores.shape[:-1])
        return scores, nothing + 1.0, nothing - float("inf")
    top = scores.detach().amax(-1, keepdim=True)  # the same for the results, so also for their gradients
    top = top.masked_fill(top == float("-inf"), 0.0)
    weights = scores.sub_(top).exp_()
    total = weights.sum(-1)
    lse = total.log() + top[..., 0]
    return weights, total.masked_fill(total == 0, 1.0), lse


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Join attention over disjoint sets of keys: [(output [.., D], lse [..])] -> the same over their union.

    out = Σ exp(lse_i - lse)·out_i with lse = log Σ exp(lse_i): associative and commutative, so trees of parts nest.
    Summed in float32, returned in the first output's dtype. A part that saw no key has lse = -inf and weighs nothing,
    whatever its output holds; where no part saw a key the output is 0.
    """
    outputs, lses = zip(*parts, strict=True)
    if outputs[0].is_cuda and outputs[0].dim() == 4 and len(parts) > 1 and not wants_gradient(*outputs, *lses):
        from fewer.kernels.triton.merge import merge as fused  # Triton is imported only where there is a GPU

        return fused(parts)
    stacked = torch.stack(lses)  # [parts, ..]
    lse = stacked.logsumexp(0)
    weights = (stacked - lse.nan_to_num(neginf=0.0)).exp()[..., None]
    total = torch.zeros_like(outputs[0], dtype=torch.float32)
    for output, weight in zip(outputs, weights, strict=True):
        total += torch.where(weight > 0, output.float() * weight, 0.0)
    return total.to(outputs[0].dtype), lse


def with_causal(mask: Tensor | None, causal: bool, queries: int, keys: int, device: torch.device) -> Tensor | None:
    """The mask with the triangle of `causal` in it: [.., T, S] bool."""
    if not causal:
        return mask
    lower = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(max(0, keys - queries))
    return lower[None, None] if mask is None else mask & lower


def wants_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
