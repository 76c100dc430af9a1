"""The fast path of decoding on a CPU: one new token of one sequence, everything hoisted that can be.

A small model's step is a few hundred operations of a microsecond each, so what counts is how many there are. This is
the network of `fewer.model.transformer` for the shape B = T = 1 with a contiguous cache, written as one flat loop:

- the residual stream stays float32 and is updated in place;
- RMSNorm is a dot product, a scalar in Python and one fused multiply, cast while it is copied to the product's input;
- q, k and v turn in one complex product (v by 1, q also by the attention scale) and k, v enter the cache in one copy;
- queries of one group are rows of one attention product, so keys are read once and nothing is masked.

It gives the same numbers as the general path up to rounding; `supports` says for which models.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fewer.model.experts import Experts
from fewer.model.feed_forward import FeedForward
from fewer.model.linear import Linear
from fewer.model.transformer import Layer, Transformer
from fewer.slots import ContiguousCache

Product = Callable[[Tensor], Tensor]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch._C._nn.silu_,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


def supports(model: Transformer) -> bool:
    """Dense decoders with norms before their blocks, full attention, and q, k, v of one format."""
    config = model.config
    return (
        model.device.type == "cpu"
        and config.experts is None
        and config.norm_placement == "pre"
        and config.qk_norm == "none"
        and config.sliding_window is None
        and config.attention_softcap is None
        and config.clip_qkv is None
        and config.residual_scale == 1.0
        and config.rotary_dim in (0, config.head_dim)
        and config.head_dim % 2 == 0
        and all(layer.attention.qkv.is_fused and _is_fused(layer.feed_forward) for layer in model.layers)
    )


def _is_fused(block: FeedForward | Experts) -> bool:
    return isinstance(block, FeedForward) and block.gate_up.is_fused


class _Norm:
    """RMSNorm of the residual [1, d] into a reused buffer of the next product's dtype."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, residual: Tensor, eps: float):
        self.flat = residual.view(-1)
        self.residual, self.weight, self.eps = residual, weight.view(1, -1), eps
        self.size = weight.numel()
        self.zero = torch.zeros_like(residual)
        self.out = torch.empty(1, self.size, dtype=dtype)

    def __call__(self) -> Tensor:
        inverse = 1.0 / math.sqrt(torch.dot(self.flat, self.flat).item() / self.size + self.eps)
        return self.out.copy_(torch.addcmul(self.zero, self.residual, self.weight, value=inverse))


class _Linear:
    """A product with its bias, and the dtype that its input must have."""

    def __init__(self, linear: Linear) -> None:
        self.dtype: torch.dtype = linear.format.compute_dtype
        self.product: Product = linear.format.product()
        self.bias: Tensor | None = linear.bias


class _Layer(NamedTuple):
    """What one layer runs, in this order."""

    attention_norm: _Norm
    qkv: _Linear
    turn: int  # row of `turns`: 0 rotates, 1 does not
    o: _Linear
    feed_forward_norm: _Norm
    gate_up: _Linear
    down: _Linear


class SingleToken:
    """Runs one token through `model`, storing its keys and values in a contiguous cache of batch 1."""

    def __init__(self, model: Transformer):
        config = model.config
        self.model, self.config = model, config
        self.residual = torch.empty(1, config.hidden_size)
        self.query = config.heads * config.head_dim
        width = self.query + 2 * config.kv_heads * config.head_dim
        self.qkv = torch.empty(1, width)
        self.pairs = self.qkv.view(torch.complex64)  # [1, width / 2]
        group = config.heads // config.kv_heads
        self.q = self.qkv[:, : self.query].view(1, config.kv_heads, group, config.head_dim)
        self.kv = self.qkv[:, self.query :].view(2, config.kv_heads, config.head_dim)
        self.q_out = torch.empty_like(self.q, dtype=model.dtype)
        self.turns = torch.ones(2, width // 2, dtype=torch.complex64)  # row 0: this position; row 1: no rotation
        self.turns[:, : self.query // 2] = config.scale
        self.layers = [self._prepare(layer) for layer in model.layers]
        self.norm = _Norm(model.norm, model.head.compute_dtype, self.residual, config.norm_eps)
        self.head = model.head.product()

    def _prepare(self, layer: Layer) -> _Layer:
        attention, feed_forward = layer.attention, layer.feed_forward
        assert isinstance(feed_forward, FeedForward)
        qkv, o = _Linear(attention.qkv), _Linear(attention.o)
        gate_up, down = _Linear(feed_forward.gate_up), _Linear(feed_forward.down)
        assert layer.attention_norm is not None and layer.feed_forward_norm is not None
        return _Layer(
            _Norm(layer.attention_norm, qkv.dtype, self.residual, self.config.norm_eps),
            qkv,
            0 if attention.rotary is not None else 1,
            o,
            _Norm(layer.feed_forward_norm, gate_up.dtype, self.residual, self.config.norm_eps),
            gate_up,
            down,
        )

    def run(self, token: int, position: int, cache: ContiguousCache) -> Tensor:
        """-> logits [1, V] float32; the token is committed to the cache."""
        model, residual, activation = self.model, self.residual, ACTIVATIONS[self.config.activation]
        residual.copy_(model.embed.rows(torch.tensor([token])))
        if self.config.embedding_scale is not None:
            residual.mul_(self.config.embedding_scale)
        self._turn(position)
        slot = cache.advance_one(position)
        pool = cache.pools[0]  # [L, 2, 1, Hk, capacity, D]
        written = pool[:, :, 0, :, slot].unbind(0)  # L × [2, Hk, D]
        live = pool[:, :, :, :, : slot + 1].flatten(0, 1).unbind(0)  # 2L × [1, Hk, slot + 1, D]
        qkv_row, pairs, turns, q, q_out, kv = self.qkv, self.pairs, self.turns, self.q, self.q_out, self.kv
        attend = functional.scaled_dot_product_attention
        for index, (norm, qkv, turn, o, norm2, gate_up, down) in enumerate(self.layers):
            qkv_row.copy_(qkv.product(norm()))
            if qkv.bias is not None:
                qkv_row.add_(qkv.bias)
            pairs.mul_(turns[turn])
            written[index].copy_(kv)
            out = attend(q_out.copy_(q), live[2 * index], live[2 * index + 1], scale=1.0)
            out = o.product(out.view(1, -1).to(o.dtype))
            residual.add_(out if o.bias is None else out + o.bias)
            both = gate_up.product(norm2())
            if gate_up.bias is not None:
                both = both + gate_up.bias
            gate, up = both.chunk(2, 1)
            out = down.product(activation(gate).mul_(up).to(down.dtype))
            residual.add_(out if down.bias is None else out + down.bias)
        return self.logits(self.norm())

    def _turn(self, position: int) -> None:
        """Fill row 0 of `turns` with this position's rotation: scaled for q, plain for k, 1 for v."""
        rotary = next((layer.attention.rotary for layer in self.model.layers if layer.attention.rotary), None)
        if rotary is None:
            return
        factors = rotary.table(position + 1, torch.device("cpu"))[position]
        half = self.config.head_dim // 2
        rows = self.turns[0].view(-1, half)
        rows[: self.config.heads] = factors * self.config.scale
        rows[self.config.heads : self.config.heads + self.config.kv_heads] = factors

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [1, d] -> [1, V] float32."""
        logits = self.head(hidden).float()
        config = self.config
        if config.logit_scale != 1.0:
            logits = logits * config.logit_scale
        if config.logit_softcap is not None:
            logits = torch.tanh(logits / config.logit_softcap) * config.logit_softcap
        return logits
