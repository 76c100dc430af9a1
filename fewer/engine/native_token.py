"""The fast path of decoding on a CPU with a C compiler: one new token of one sequence in one call.

`fewer/kernels/native/decode.c` runs the whole step. Its products read the matrices as PyTorch's kernels hold them, so
prefill and decoding share one copy, and compute in float32; keys and values go into the cache's own pool. This file
describes the model to it. The numbers are those of the general path up to rounding (closer to the exact ones, where
that computes in bfloat16); `supports` says for which models. Where there is no compiler, `fewer.engine.single_token`
serves.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fewer.formats.base import WeightFormat
from fewer.kernels import nibbles, packed_product
from fewer.kernels.native import Unavailable, library
from fewer.kernels.native import structures as c
from fewer.model.feed_forward import FeedForward
from fewer.model.linear import Linear
from fewer.model.transformer import Layer, Transformer
from fewer.slots import KVCache, PlacedCache

KINDS = {torch.float32: c.FLOAT32, torch.bfloat16: c.BFLOAT16}


def supports(model: Transformer) -> bool:
    """Dense decoders whose heads and matrices `decode.c` knows."""
    config = model.config
    return (
        model.device.type == "cpu"
        and not isinstance(library(), Unavailable)
        and model.dtype in KINDS
        and config.experts is None
        and config.head_dim % c.LANES == 0
        and config.head_dim <= c.WIDEST_HEAD
        and config.heads // config.kv_heads <= c.MOST_GROUP
        and all(_is_known(stored) for _, stored in model.matrices() if stored is not model.embed)
        and _is_known(model.head)
    )


def _is_known(stored: WeightFormat) -> bool:
    packed = stored.operands()
    if packed is None:
        return False
    if packed.kind == packed_product.DENSE:
        return packed.weight.dtype in KINDS and packed.weight.is_contiguous()
    return packed.kind == packed_product.INT8 or nibbles.tile_height() in (32, 64)


class NativeToken:
    """Runs one token through `model`, storing its keys and values in a contiguous cache of batch 1."""

    def __init__(self, model: Transformer):
        code = library()
        assert isinstance(code, ctypes.CDLL)
        self.decode = code.fewer_decode
        self.model, self.config = model, model.config
        self.homes: Sequence[tuple[int, int]] = ()  # of the layers, in the cache that ran last
        self.held: list[Any] = []  # what the structures point at
        self.step = c.Step(model=ctypes.pointer(self._describe()))
        code.fewer_shared_size.restype = ctypes.c_size_t
        self.shared = torch.empty(code.fewer_shared_size(self.step.model))
        self.logits = torch.empty(1, self.config.vocab_size)
        self.step.shared, self.step.logits = self.shared.data_ptr(), self.logits.data_ptr()

    def accepts(self, cache: KVCache) -> bool:
        """Whether this cache's next token can be placed."""
        return getattr(cache, "can_place", False) and len(cast(PlacedCache, cache).pools) <= c.KINDS_OF_LAYER

    def room(self, cache: KVCache) -> int | None:
        """How many tokens that holds for; None: any number."""
        return None

    def run(self, token: int, position: int, cache: PlacedCache) -> Tensor:
        """-> logits [1, V] float32; the token is committed to the cache."""
        self._run(token, position, cache)
        logits = self.logits.clone() if self.config.logit_scale == 1.0 else self.logits * self.config.logit_scale
        if self.config.logit_softcap is not None:
            logits = torch.tanh(logits / self.config.logit_softcap) * self.config.logit_softcap
        return logits

    def most_likely(self, token: int, position: int, cache: PlacedCache) -> int | None:
        """-> the index of the largest logit, or None where logits are not finite; the token is committed."""
        self._run(token, position, cache)
        return self.step.best if self.step.finite else None

    def _run(self, token: int, position: int, cache: PlacedCache) -> None:
        embedded = self.model.embed.rows(torch.tensor([token]))
        if self.config.embedding_scale is not None:
            embedded = embedded * self.config.embedding_scale
        step = self.step
        step.embedded = embedded.data_ptr()
        for index, rotary in enumerate(self.rotaries):
            table = rotary.table(position + 1, embedded.device)
            step.turns[index] = table.data_ptr() + position * table.stride(0) * table.element_size()
        if cache.homes is not self.homes:
            self.homes = cache.homes
            for layer, home in zip(self.layers, self.homes, strict=True):
                layer.kind, layer.index = home
        places = cache.place_one(position)  # may grow or move what a pool holds
        for store, pool, place in zip(step.store, cache.pools, places, strict=False):
            size = pool.element_size()
            store.pool = pool.data_ptr()
            store.layer, store.value, store.head = (pool.stride(axis) * size for axis in (0, 1, 3))
            store.slot, store.first, store.sinks = place
        self.decode(ctypes.byref(step), torch.get_num_threads())

    def _describe(self) -> c.Model:
        model, config = self.model, self.config
        self.rotaries = list(dict.fromkeys(r for layer in model.layers if (r := layer.attention.rotary) is not None))
        self.layers = (c.Layer * config.layers)(*map(self._layer, model.layers))
        return c.Model(
            layers=config.layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            vocab=config.vocab_size,
            activation=c.ACTIVATIONS[config.activation],
            qk_norm=c.QK_NORMS[config.qk_norm],
            rotary=config.rotary_dim or config.head_dim,
            heads=c.Heads(
                bfloat16=int(model.dtype == torch.bfloat16),
                heads=config.heads,
                kv_heads=config.kv_heads,
                dim=config.head_dim,
                softcap=config.attention_softcap or 0.0,
            ),
            eps=config.norm_eps,
            scale=config.scale,
            clip_qkv=config.clip_qkv or 0.0,
            residual_scale=config.residual_scale,
            layer=self.layers,
            norm=self._vector(model.norm),
            head=self._matrix([model.head], None),
        )

    def _layer(self, layer: Layer) -> c.Layer:
        attention, block = layer.attention, layer.feed_forward
        assert isinstance(block, FeedForward)
        return c.Layer(
            attention_norm=self._vector(layer.attention_norm),
            post_attention_norm=self._vector(layer.post_attention_norm),
            feed_forward_norm=self._vector(layer.feed_forward_norm),
            post_feed_forward_norm=self._vector(layer.post_feed_forward_norm),
            q_norm=self._vector(attention.q_norm),
            k_norm=self._vector(attention.k_norm),
            qkv=self._linear(attention.qkv),
            o=self._linear(attention.o),
            gate_up=self._linear(block.gate_up),
            down=self._linear(block.down),
            turn=-1 if attention.rotary is None else self.rotaries.index(attention.rotary),
        )

    def _vector(self, vector: Tensor | None) -> int | None:
        if vector is None:
            return None
        assert vector.dtype == torch.float32 and vector.is_contiguous()
        self.held.append(vector)
        return vector.data_ptr()

    def _linear(self, linear: Linear) -> c.Matrix:
        return self._matrix(linear.parts, linear.bias)

    def _matrix(self, parts: Sequence[WeightFormat], bias: Tensor | None) -> c.Matrix:
        offsets = [None] * len(parts) if bias is None else bias.float().split([part.shape[0] for part in parts])
        described = (c.Part * len(parts))(*(self._part(*each) for each in zip(parts, offsets, strict=True)))
        self.held.append(described)
        return c.Matrix(len(parts), described)

    def _part(self, stored: WeightFormat, bias: Tensor | None) -> c.Part:
        packed = stored.operands()
        assert packed is not None
        self.held.append(packed)
        part = c.Part(rows=packed.rows, columns=stored.shape[1], weight=packed.weight.data_ptr())
        part.bias = None if bias is None else self._vector(bias.contiguous())
        if packed.kind == packed_product.DENSE:
            part.kind = KINDS[packed.weight.dtype]
            return part
        part.scale = packed.scale.data_ptr()
        if packed.kind == packed_product.INT8:
            part.kind = c.INT8
            return part
        part.kind, part.group, part.tile = c.INT4, packed.group_size, nibbles.tile_height()
        part.copies = 2 if packed.kind == packed_product.INT8_HALVES else 1
        part.padded = packed.scale.shape[1]
        return part
