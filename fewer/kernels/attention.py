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

    `mask` bool, broadcast to [B, 1, T, S]: True = visible. `causal`: T = S and query t sees keys 0..t. One query with
    neither sees every key. Rows that see nothing give zeros.
    """
    batch, heads, queries, head_dim = q.shape
    kv_heads = k.shape[1]
    if softcap:
        return attend(q, k, v, scale, _with_causal(mask, causal, queries, q.device), softcap)[0]
    if heads == kv_heads:
        return functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale)
    if queries == 1:  # the queries of a group become the rows of one product: keys are read once
        grouped = q.view(batch, kv_heads, heads // kv_heads, head_dim)
        out = functional.scaled_dot_product_attention(grouped, k, v, mask, scale=scale)
        return out.view(batch, heads, 1, head_dim)
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
    stacked = torch.stack(lses)  # [parts, ..]
    lse = stacked.logsumexp(0)
    weights = (stacked - lse.nan_to_num(neginf=0.0)).exp()[..., None]
    total = torch.zeros_like(outputs[0], dtype=torch.float32)
    for output, weight in zip(outputs, weights, strict=True):
        total += torch.where(weight > 0, output.float() * weight, 0.0)
    return total.to(outputs[0].dtype), lse


def _with_causal(mask: Tensor | None, causal: bool, queries: int, device: torch.device) -> Tensor | None:
    if not causal:
        return mask
    lower = torch.ones(queries, queries, dtype=torch.bool, device=device).tril()
    return lower[None, None] if mask is None else mask & lower
