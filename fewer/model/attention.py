"""The attention block: projections, norms of queries and keys, and what the cache makes of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fewer.model.config import ModelConfig
from fewer.model.linear import Linear
from fewer.model.norm import rms_norm
from fewer.model.rope import Rotary
from fewer.model.step import LayerCache, Step


@dataclass(slots=True)
class Attention:
    config: ModelConfig
    qkv: Linear
    o: Linear
    q_norm: Tensor | None  # [D] for "head", [H·D] for "all"
    k_norm: Tensor | None
    rotary: Rotary | None  # None: this layer has no positions (NoPE)
    window: int | None

    def __call__(self, x: Tensor, step: Step, cache: LayerCache) -> Tensor:
        """x [B, T, d], normed -> [B, T, d]."""
        config = self.config
        batch, width = x.shape[:2]
        projected = self.qkv(x)
        query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
        q, k, v = projected.split((query, key, key), dim=-1)
        if config.qk_norm == "all":
            q, k = self._norm(q, self.q_norm), self._norm(k, self.k_norm)
        if config.clip_qkv is not None:
            q, k, v = (part.clamp(-config.clip_qkv, config.clip_qkv) for part in (q, k, v))
        q = q.unflatten(-1, (config.heads, config.head_dim))
        k = k.unflatten(-1, (config.kv_heads, config.head_dim))
        v = v.unflatten(-1, (config.kv_heads, config.head_dim))
        if config.qk_norm == "head":
            q, k = self._norm(q, self.q_norm), self._norm(k, self.k_norm)
        out = cache.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), x, self.rotary, step)
        return self.o(out.transpose(1, 2).reshape(batch, width, query))

    def _norm(self, x: Tensor, weight: Tensor | None) -> Tensor:
        assert weight is not None
        return rms_norm(x, weight, self.config.norm_eps, x.dtype)
