"""The fast path of decoding on a CPU with a C compiler: a few new tokens of one sequence in one call.

`fewer/kernels/native/decode.c` runs the whole step. Its products read the matrices as PyTorch's kernels hold them, so
prefill and decoding share one copy, and compute in float32; keys and values go into the cache's own pool. This file
describes the model to it. The numbers are those of the general path up to rounding (closer to the exact ones, where
that computes in bfloat16), and a token's numbers do not depend on those that run beside it: over a cache that keeps
everything, verifying a chain gives the very bits of plain decoding. `supports` says for which models; where there is no
compiler, `fewer.engine.single_token` serves.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fewer.formats.base import WeightFormat
from fewer.kernels import nibbles, packed_product
from fewer.kernels.native import Unavailable, library
from fewer.kernels.native import structures as c
from fewer.model.feed_forward import FeedForward
from fewer.model.linear import Linear
from fewer.model.step import Output, Role, Step
from fewer.model.transformer import Layer, Transformer
from fewer.slots import KVCache, Layout, PlacedCache, Placement

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
        and config.heads // config.kv_heads <= c.MOST_QUERIES
        and all(_is_known(stored) for _, stored in model.matrices())
    )


def _is_known(stored: WeightFormat) -> bool:
    packed = stored.operands()
    if packed is None:
        return False
    if packed.kind == packed_product.DENSE:
        return packed.weight.dtype in KINDS and packed.weight.is_contiguous()
    return packed.kind == packed_product.INT8 or nibbles.tile_height() in (32, 64)


class NativeDecoder:
    """Runs up to `most` tokens of one sequence through `model`, storing their keys and values in the cache."""

    def __init__(self, model: Transformer, integers: bool = False):
        """`integers`: what meets 4-bit weights is rounded to 8 bits, so that products are sums of integers."""
        code = library()
        assert isinstance(code, ctypes.CDLL)
        self.decode = code.fewer_decode
        self.model, self.config, self.integers = model, model.config, integers
        self.laid_out: Callable[[], Layout | None] = lambda: None  # of the cache that ran last, while it lives
        self.homes = torch.empty(0)  # [L · Hk, 2] int64, the `Home` of each head
        self.held: list[Any] = []  # what the structures point at
        self.step = c.Step(model=ctypes.pointer(self._describe()))
        self.shared_size = code.fewer_shared_size
        self.shared_size.restype = ctypes.c_size_t
        self.shared, self.room_for = torch.empty(0), (0, 0)
        self.most = min(c.MOST_ROWS, c.MOST_QUERIES // (self.config.heads // self.config.kv_heads))
        self.logits = torch.empty(1, self.config.vocab_size)

    def accepts(self, cache: KVCache, tokens: int = 1, role: Role = "generated") -> bool:
        """Whether this cache's next tokens can be placed."""
        placed = cast(PlacedCache, cache)
        if not hasattr(cache, "can_place") or (role == "prompt" and not placed.places_prompts):
            return False
        return placed.can_place(tokens) and len(placed.layout.stores) <= c.MOST_KINDS

    def room(self, cache: KVCache) -> int | None:
        """How many tokens that holds for; None: any number."""
        return None

    def takes(self, step: Step) -> bool:
        """Whether the step is a few tokens of one sequence of which logits are wanted, and nothing unusual."""
        return (
            step.tokens is not None
            and step.tokens.shape[0] == 1
            and step.tokens.shape[1] <= self.most
            and step.lengths is None
            and step.mask in ("causal", "tree")
            and step.logits != "none"
            and step.layer_plan is None
            and not step.taps
        )

    def run(self, token: int, position: int, cache: PlacedCache) -> Tensor:
        """-> logits [1, V] float32; the token is committed to the cache."""
        self._run_one(token, position, cache)
        return self._finish(self.logits.clone())

    def most_likely(self, token: int, position: int, cache: PlacedCache) -> int | None:
        """-> the index of the largest logit, or None where logits are not finite; the token is committed."""
        self._run_one(token, position, cache)
        return self.step.best[0] if self.step.finite else None

    def run_step(self, step: Step, cache: PlacedCache) -> Output:
        """A step that `takes` allows; its tokens stay tentative. Logits and the final norm's output, as it asks."""
        tokens, positions = cast(Tensor, step.tokens)[0].tolist(), step.positions[0].tolist()
        rows = len(tokens)
        self._check(tokens)
        seen = _causal(rows) if step.mask == "causal" else _bits(cast(Tensor, step.ancestors)[0])
        logits, hidden = torch.empty(rows, self.config.vocab_size), torch.empty(rows, self.config.hidden_size)
        self.step.hidden = hidden.data_ptr()
        self._run(tokens, positions, cache.place(step), seen, cache, logits)
        self.step.hidden = None
        if step.logits == "last":
            hidden = hidden[None] if step.hidden else hidden[-1:]
            return Output(self._finish(logits[-1:]), hidden.to(self.model.dtype))
        return Output(self._finish(logits)[None], hidden.to(self.model.dtype)[None])

    def _check(self, tokens: Sequence[int]) -> None:
        rows = self.model.embed.shape[0]
        if not all(0 <= token < rows for token in tokens):
            raise IndexError(f"tokens {list(tokens)}: one is not among the {rows} that the model embeds")

    def _finish(self, logits: Tensor) -> Tensor:
        if self.config.logit_scale != 1.0:
            logits = logits * self.config.logit_scale
        if self.config.logit_softcap is not None:
            logits = torch.tanh(logits / self.config.logit_softcap) * self.config.logit_softcap
        return logits

    def _run_one(self, token: int, position: int, cache: PlacedCache) -> None:
        self._check((token,))
        self._run((token,), (position,), cache.place_one(position), (1,), cache, self.logits)

    def _run(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        placement: Placement,
        sees: Sequence[int],
        cache: PlacedCache,
        logits: Tensor,
    ) -> None:
        """Tokens that the cache has placed. `sees[i]`: bit j says that token i sees token j."""
        step, rows = self.step, len(tokens)
        step.rows, step.token[:rows], step.logits = rows, tokens, logits.data_ptr()
        self._reserve(rows, max(place.stop for place in placement.places))
        turns = []  # kept until the call is over
        for index, rotary in enumerate(self.rotaries):
            table = rotary.table(max(positions) + 1, logits.device)
            turns.append(table[list(positions)] if rows > 1 else table[positions[0]])
            step.turns[index] = turns[-1].data_ptr()
        layout = cache.layout
        if self.laid_out() is not layout:
            self._lay_out(layout)
        step.slots = None if placement.slots is None else placement.slots.data_ptr()
        step.weights = None if placement.weights is None else placement.weights.data_ptr()
        step.width = 0 if placement.weights is None else placement.weights.stride(1)
        for store, place in zip(step.store, placement.places, strict=False):
            visible = store.visible
            visible.start, visible.count, visible.stop, visible.sinks = place.slot, rows, place.stop, place.sinks
            for row, (first, bits) in enumerate(zip(place.first, sees, strict=True)):
                visible.first[row], visible.sees[row] = first, bits
        outcome = self.decode(ctypes.byref(step), torch.get_num_threads())
        assert outcome == 0, f"the native step refused tokens {list(tokens)}: {outcome}"

    def _lay_out(self, layout: Layout) -> None:
        """Point the step at a cache's stores."""
        self.laid_out, step = weakref.ref(layout), self.step
        for kind in range(c.MOST_KINDS):
            step.store[kind].keys = None
        for store, (keys, values) in zip(step.store, layout.stores, strict=False):
            store.keys, store.values = keys.data_ptr(), values.data_ptr() - keys.data_ptr()
        kinds, elements = layout.homes.flatten(0, 1).unbind(1)
        self.homes = torch.stack((elements * layout.stores[0][0].element_size(), kinds), dim=1).contiguous()
        step.homes = self.homes.data_ptr()

    def _reserve(self, rows: int, keys: int) -> None:
        if rows > self.room_for[0] or keys > self.room_for[1]:
            self.room_for = max(rows, self.room_for[0]), max(keys + 1024, self.room_for[1])
            self.shared = torch.empty(self.shared_size(self.step.model, *self.room_for))
            self.step.shared = self.shared.data_ptr()

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
            integers=int(self.integers),
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
            embedding_scale=1.0 if config.embedding_scale is None else config.embedding_scale,
            embed=self._matrix([model.embed], None),
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


def _causal(rows: int) -> list[int]:
    """Each token sees itself and those before it."""
    return [(2 << row) - 1 for row in range(rows)]


def _bits(ancestors: Tensor) -> list[int]:
    """[rows, rows] bool -> each row as the bits of a number."""
    return [sum(1 << at for at, seen in enumerate(row) if seen) for row in ancestors.tolist()]
