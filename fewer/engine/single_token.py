"""The fast path of decoding on a CPU: one new token of one sequence, everything hoisted that can be.

A small model's step is a few hundred operations of a microsecond each, so what counts is how many there are and what
stands between them. This is the network of `fewer.model.transformer` for the shape B = T = 1 with a contiguous cache:

- all layers are one flat TorchScript function (no compiler is needed; it also runs as plain Python, some 15 % slower);
- the residual stream stays float32 and is updated in place;
- RMSNorm is a dot product, a scalar and one fused multiply, cast while it is copied to the product's input;
- q, k and v turn in one complex product (v by 1, q also by the attention scale) and k, v enter the cache in one copy;
- queries of one group are rows of one attention product, so keys are read once and nothing is masked.

It gives the same numbers as the general path up to rounding; `supports` says for which models.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor

from fewer.formats.base import WeightFormat
from fewer.kernels.packed_product import Packed, packed_product
from fewer.kernels.scripted import scripted
from fewer.model.feed_forward import FeedForward
from fewer.model.linear import Linear
from fewer.model.transformer import Layer, Transformer
from fewer.slots import ContiguousCache, KVCache

ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}


def supports(model: Transformer) -> bool:
    """Dense decoders with norms before their blocks, full attention, and matrices that PyTorch's CPU kernels take."""
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
        and model.head.operands() is not None
        and all(_is_packed(linear) for layer in model.layers for linear in _linears(layer))
    )


def _linears(layer: Layer) -> tuple[Linear, ...]:
    block = layer.feed_forward
    assert isinstance(block, FeedForward)
    return layer.attention.qkv, layer.attention.o, block.gate_up, block.down


def _is_packed(linear: Linear) -> bool:
    return all(part.operands() is not None for part in linear.parts)


def _norm(residual: Tensor, gain: Tensor, zero: Tensor, eps: float, out: Tensor) -> Tensor:
    """RMSNorm of residual [1, d] float32 into `out`, in the next product's dtype."""
    flat = residual.view(-1)
    inverse = 1.0 / math.sqrt(torch.dot(flat, flat).item() / flat.size(0) + eps)
    return out.copy_(torch.addcmul(zero, residual, gain, value=inverse))


def _product(x: Tensor, numbers: list[int], tensors: list[Tensor]) -> Tensor:
    """x [1, K] in the matrix's dtype -> x Wᵀ + b; numbers and tensors are those of a `_Matrix` of one part."""
    out = packed_product(x, numbers[0], tensors[0], tensors[1], numbers[1], numbers[2])
    if numbers[3] == 1:
        out = out + tensors[2]
    return out


def _cast(x: Tensor, numbers: list[int], tensors: list[Tensor]) -> Tensor:
    """x as the matrix takes it. Asking is cheaper than a cast that does nothing."""
    if numbers[4] == 1:
        x = x.to(tensors[3].dtype)
    return x


def _side_by_side(x: Tensor, numbers: list[int], tensors: list[Tensor]) -> Tensor:
    """x [1, K] in the widest dtype of the parts -> x Wᵀ + b, where the rows of W are stored in several formats."""
    outs: list[Tensor] = []
    for part in range(len(numbers) // 5):
        own, held = numbers[5 * part : 5 * part + 5], tensors[4 * part : 4 * part + 4]
        outs.append(_product(_cast(x, own, held), own, held))
    return torch.cat(outs, dim=1)


def _projection(x: Tensor, numbers: list[int], tensors: list[Tensor]) -> Tensor:
    """`_product` of a matrix that may be of several parts."""
    return _product(x, numbers, tensors) if len(numbers) == 5 else _side_by_side(x, numbers, tensors)


def _layers(
    residual: Tensor, zero: Tensor, eps: float, gains: list[Tensor], numbers: list[list[int]],
    tensors: list[list[Tensor]], turns: list[Tensor], activation: int,
    qkv: Tensor, pairs: Tensor, q: Tensor, kv: Tensor, query: Tensor, pool: Tensor, slot: int,
) -> None:  # fmt: skip
    """Every layer on the residual [1, d]: two gains, four matrices and one turn each.

    qkv [1, width] float32 is seen as complex `pairs`, as q [1, Hk, G, D] and as kv [2, Hk, D]; `query` is q in the
    cache's dtype. pool [L, 2, 1, Hk, capacity, D].
    """
    written = pool[:, :, 0, :, slot].unbind(0)  # L × [2, Hk, D]
    live = pool[:, :, :, :, : slot + 1].flatten(0, 1).unbind(0)  # 2L × [1, Hk, slot + 1, D]
    for layer in range(len(turns)):
        at = 4 * layer
        x = _norm(residual, gains[2 * layer], zero, eps, tensors[at][-1])
        qkv.copy_(_projection(x, numbers[at], tensors[at]))
        pairs.mul_(turns[layer])
        written[layer].copy_(kv)
        out = torch.nn.functional.scaled_dot_product_attention(
            query.copy_(q), live[2 * layer], live[2 * layer + 1], scale=1.0
        )
        row = _cast(out.view(1, -1), numbers[at + 1], tensors[at + 1])
        residual.add_(_product(row, numbers[at + 1], tensors[at + 1]))
        x = _norm(residual, gains[2 * layer + 1], zero, eps, tensors[at + 2][-1])
        both = _projection(x, numbers[at + 2], tensors[at + 2])
        size = both.size(1) // 2
        gate, up = both.narrow(1, 0, size), both.narrow(1, size, size)
        if activation == 0:
            gate = torch.nn.functional.silu(gate, inplace=True)
        elif activation == 1:
            gate = torch.nn.functional.gelu(gate)
        else:
            gate = torch.nn.functional.gelu(gate, approximate="tanh")
        row = _cast(gate.mul_(up), numbers[at + 3], tensors[at + 3])
        residual.add_(_product(row, numbers[at + 3], tensors[at + 3]))


@functools.cache
def _scripted_layers() -> Callable[..., None]:
    """Made at the first step, with the functions above in it: a model is loaded sooner."""
    return scripted(_layers)


class _Matrix(NamedTuple):
    """A matrix with its bias, as TorchScript takes it: 5 numbers and 4 tensors for each part of one format. The last
    tensor is a row that x may be written to: the only part's, or one more where there are several."""

    numbers: list[int]  # kind, group size, rows, whether there is a bias, whether x must be cast
    tensors: list[Tensor]  # weight, scale, bias, and a row in the dtype of x

    @classmethod
    def of(cls, stored: WeightFormat, bias: Tensor | None, dtype: torch.dtype) -> _Matrix:
        """`dtype`: what x comes in."""
        packed: Packed | None = stored.operands()
        assert packed is not None
        numbers = [packed.kind, packed.group_size, packed.rows, int(bias is not None), int(packed.dtype != dtype)]
        row = torch.empty(1, stored.shape[1], dtype=packed.dtype)
        offset = row if bias is None else bias.view(1, -1).to(packed.dtype)
        return cls(numbers, [packed.weight, packed.scale, offset, row])

    @classmethod
    def of_linear(cls, linear: Linear, dtype: torch.dtype) -> _Matrix:
        """`dtype`: what x comes in, where it does not come from a norm."""
        if linear.is_fused:
            return cls.of(linear.format, linear.bias, dtype)
        widest = linear.compute_dtype
        offsets = [None] * len(linear.parts) if linear.bias is None else linear.bias.split(linear.widths)
        parts = [cls.of(part, offset, widest) for part, offset in zip(linear.parts, offsets, strict=True)]
        row = torch.empty(1, linear.format.shape[1], dtype=widest)
        return cls([n for part in parts for n in part.numbers], [*(t for part in parts for t in part.tensors), row])


def _matrices(layer: Layer, dtype: torch.dtype) -> list[_Matrix]:
    """qkv, o, gate_up and down; `dtype` is what attention yields."""
    qkv, o, gate_up, down = _linears(layer)
    inputs = (qkv, dtype), (o, dtype), (gate_up, dtype), (down, gate_up.compute_dtype)
    return [_Matrix.of_linear(linear, comes_in) for linear, comes_in in inputs]


class SingleToken:
    """Runs one token through `model`, storing its keys and values in a contiguous cache of batch 1."""

    def __init__(self, model: Transformer):
        config = model.config
        self.model, self.config = model, config
        self.residual = torch.empty(1, config.hidden_size)
        self.zero = torch.zeros_like(self.residual)
        width = (config.heads + 2 * config.kv_heads) * config.head_dim
        queries, group = config.heads * config.head_dim, config.heads // config.kv_heads
        self.qkv = torch.empty(1, width)
        self.pairs = self.qkv.view(torch.complex64)  # [1, width / 2]
        self.q = self.qkv[:, :queries].view(1, config.kv_heads, group, config.head_dim)
        self.kv = self.qkv[:, queries:].view(2, config.kv_heads, config.head_dim)
        self.query = torch.empty_like(self.q, dtype=model.dtype)
        here, still = torch.ones(2, width // 2, dtype=torch.complex64)  # this position's rotation; none
        here[: queries // 2] = still[: queries // 2] = config.scale
        self.turn = here
        self.turns = [still if layer.attention.rotary is None else here for layer in model.layers]
        self.rotary = next((layer.attention.rotary for layer in model.layers if layer.attention.rotary), None)
        self.gains = [gain.view(1, -1) for layer in model.layers for gain in _gains(layer)]
        matrices = [matrix for layer in model.layers for matrix in _matrices(layer, model.dtype)]
        self.numbers, self.tensors = [each.numbers for each in matrices], [each.tensors for each in matrices]
        self.gain, self.head = model.norm.view(1, -1), _Matrix.of(model.head, None, model.dtype)

    def accepts(self, cache: KVCache) -> bool:
        """Whether the next token can be stored in this cache's one pool."""
        return bool(getattr(cache, "contiguous", False))

    def room(self, cache: KVCache) -> int | None:
        """How many tokens that holds for; None: any number."""
        return cast(ContiguousCache, cache).contiguous_room

    def run(self, token: int, position: int, cache: ContiguousCache) -> Tensor:
        """-> logits [1, V] float32; the token is committed to the cache."""
        config, residual, eps = self.config, self.residual, self.config.norm_eps
        residual.copy_(self.model.embed.rows(torch.tensor([token])))
        if config.embedding_scale is not None:
            residual.mul_(config.embedding_scale)
        self._turn(position)
        slot = cache.advance_one(position)
        _scripted_layers()(
            residual, self.zero, eps, self.gains, self.numbers, self.tensors, self.turns,
            ACTIVATIONS[config.activation], self.qkv, self.pairs, self.q, self.kv, self.query, cache.pools[0], slot,
        )  # fmt: skip
        hidden = _norm(residual, self.gain, self.zero, eps, self.head.tensors[3])
        logits = _product(hidden, self.head.numbers, self.head.tensors).float()
        if config.logit_scale != 1.0:
            logits = logits * config.logit_scale
        if config.logit_softcap is not None:
            logits = torch.tanh(logits / config.logit_softcap) * config.logit_softcap
        return logits

    def most_likely(self, token: int, position: int, cache: ContiguousCache) -> int | None:
        """-> the index of the largest logit, or None where logits are not finite; the token is committed."""
        top, best = self.run(token, position, cache).max(-1)
        return int(best) if math.isfinite(float(top)) else None  # a NaN anywhere is the maximum

    def _turn(self, position: int) -> None:
        """This position's rotation: scaled for q, plain for k, 1 for v."""
        if self.rotary is None:
            return
        factors = self.rotary.table(position + 1, torch.device("cpu"))[position]
        heads, kv_heads = self.config.heads, self.config.kv_heads
        rows = self.turn.view(-1, self.config.head_dim // 2)
        rows[:heads] = factors * self.config.scale
        rows[heads : heads + kv_heads] = factors


def _gains(layer: Layer) -> tuple[Tensor, Tensor]:
    assert layer.attention_norm is not None and layer.feed_forward_norm is not None
    return layer.attention_norm, layer.feed_forward_norm
