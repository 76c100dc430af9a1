"""The fast path of decoding on CUDA: one new token in each of B rows, the whole pass captured in one CUDA graph.

A layer is a few kernels: [norm · qkv], what its cache launches, [o + residual], [norm · gate, up · gating],
[down + residual]; beyond 64 rows cuBLAS multiplies, between kernels for what is fused. A cache says by a `Capture` what
it launches and what the graph depends on. Over a contiguous one, [rotation · cache write · attention · merge] is one
kernel, and lengths are read on the device, so one graph serves every length up to the cache's capacity. The numbers are
those of `fewer.model.transformer`, up to rounding.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from fewer.engine.run_ahead import is_finite, run_ahead, run_along
from fewer.formats import DenseFormat, Int4Format, Int8Format, WeightFormat
from fewer.kernels.from_host import write_from_host
from fewer.kernels.new_tokens import Fusion, NewTokens, Workspace
from fewer.kernels.triton.ends import TopScratch, embed, most_likely
from fewer.kernels.triton.linear import WIDE, Fused, Stored, multiply, word_order
from fewer.kernels.triton.wide import multiply_wide
from fewer.model.feed_forward import FeedForward
from fewer.model.linear import Linear
from fewer.model.step import Step
from fewer.model.transformer import Layer, Transformer
from fewer.slots import Ahead, AheadCache, Capture, CapturedCache, ContiguousCache, KVCache

MOST_ROWS = 2048  # of a batch: beyond them a launch is short beside its work
SHORTEST_TABLE = 4096  # positions of the rotary table, which grows in powers of two
KEPT_GRAPHS = 8  # a session that ends leaves its memory, and mostly its graph, to the next


def stored(matrix: WeightFormat) -> Stored | None:
    """The tensors that the kernels read, or None for a format or layout that they do not know."""
    if isinstance(matrix, DenseFormat):
        return Stored("dense", matrix.weight)
    if isinstance(matrix, Int8Format) and not matrix.halves and matrix.shape[1] % 32 == 0:
        return Stored("int8", matrix.codes, matrix.scale)
    if isinstance(matrix, Int4Format) and matrix.zero is not None:
        return Stored("int4", matrix.packed, matrix.scale, matrix.zero)
    return None


def supports(model: Transformer) -> bool:
    """Dense decoders with norms before their blocks and full attention, in formats that the kernels know."""
    config = model.config
    return (
        config.experts is None
        and config.norm_placement == "pre"
        and config.qk_norm != "all"
        and config.sliding_window is None
        and config.clip_qkv is None
        and config.residual_scale == 1.0
        and stored(model.head) is not None
        and stored(model.embed) is not None
        and all(_fits(layer) for layer in model.layers)
    )


def _fits(layer: Layer) -> bool:
    if not isinstance(layer.feed_forward, FeedForward):
        return False
    linears = (layer.attention.qkv, layer.attention.o, layer.feed_forward.gate_up, layer.feed_forward.down)
    return all(linear.is_fused and stored(linear.format) is not None for linear in linears)


@dataclass(slots=True)
class Buffers:
    """What the passes over B rows work on."""

    inputs: Tensor  # [2, B] int32: tokens, lengths
    residual: Tensor  # [B, d]
    projected: Tensor  # [B, (H + 2 Hk) D]
    attended: Tensor  # [B, H D]
    gated: Tensor  # [B, intermediate]
    logits: Tensor  # [B, V] float32
    report: Tensor  # [2, B] int64: the most likely token, and the bits of its logit in the low halves
    top: TopScratch


class CudaDecoder:
    """Runs one token a row through `model`, storing its keys and values where the cache wants them."""

    def __init__(self, model: Transformer, pdl: bool | None = None):
        """`pdl`: kernels start while the one in front drains (Hopper and later); None: where the GPU can."""
        self.model, self.config = model, model.config
        self.on_gpu = model.device.type == "cuda"
        if pdl is None:
            pdl = self.on_gpu and torch.cuda.get_device_capability(model.device) >= (9, 0)
        self.pdl = pdl
        self.workspace = Workspace(model.device)
        self.buffers: dict[int, Buffers] = {}  # by rows
        # A graph does not keep its cache alive: it is replayed only when tensors of the same shapes lie where its
        # cache's lay.
        self.graphs: OrderedDict[Hashable, torch.cuda.CUDAGraph] = OrderedDict()
        self.reach = 0  # positions of the rotary table
        self.fusions: list[Fusion] = []  # of each layer
        self.word_gains: dict[int, Tensor] = {}  # a norm's gain in the order of int4's words, by the gain's id

    def accepts(self, cache: object, batch: int) -> bool:
        """Whether a pass may run over this cache that needs no `capture`."""
        return batch <= MOST_ROWS and bool(getattr(cache, "contiguous", False))

    def ahead(self, cache: object) -> Ahead | None:
        """What `greedy` launches over this cache of one row; None: it cannot."""
        if self.accepts(cache, 1):
            contiguous = cast(ContiguousCache, cache)
            return Ahead(contiguous.contiguous_capture(), contiguous.contiguous_room)
        return cache.ahead() if isinstance(cache, AheadCache) else None

    def capture(self, step: Step, cache: object) -> Capture | None:
        """Place a step of one token a row; None, and nothing has changed: it is for the general path."""
        if step.positions.shape[0] > MOST_ROWS or not isinstance(cache, CapturedCache):
            return None
        return cache.capture(step)

    def run(self, tokens: Sequence[int], lengths: Sequence[int], capture: Capture) -> Tensor:
        """tokens [B] at positions `lengths` [B] -> logits [B, V] float32, a buffer that the next call overwrites.

        Keys and values go where `capture` puts them; the caller commits them.
        """
        work = self.feed(tokens, lengths)
        self.launch(work, capture, max(lengths) + 1)
        return work.logits

    def is_finite(self, batch: int) -> bool:
        """Whether the last pass over `batch` rows gave finite logits. Waits for it."""
        return is_finite(self.buffers[batch].report)

    def greedy(self, token: int, position: int, cache: KVCache, count: int) -> Iterator[int]:
        """Feed `token` at `position` to a single row, then each most likely token: yields `count` of them, the last one
        not fed; fewer where the cache has no way of its own for the next, or where logits are not finite (or raises
        NotFinite). `ahead` has room for them."""
        ahead = self.ahead(cache)
        if ahead is None:
            return run_along(self, token, position, cache, count)
        return run_ahead(self, token, position, cast(ContiguousCache, cache), ahead, count)

    def feed(self, tokens: Sequence[int], lengths: Sequence[int]) -> Buffers:
        """tokens [B] at positions `lengths` [B], for the next pass."""
        work = self._buffers(len(tokens))
        write_from_host(work.inputs, [list(tokens), list(lengths)])
        return work

    def launch(self, work: Buffers, capture: Capture, positions: int) -> None:
        """One pass over what `work.inputs` holds, at positions below `positions`: the first one of its kind is run
        launch by launch and recorded, the others are replayed."""
        fusions = self._fusions(positions)
        key = work.inputs.shape[1], capture.key
        if key in self.graphs:
            self.graphs.move_to_end(key)
            self.graphs[key].replay()
            return
        if not self.on_gpu:
            self.forward(work, capture, fusions)
            return
        while len(self.graphs) >= KEPT_GRAPHS:
            self.graphs.popitem(last=False)
        here, side = torch.cuda.current_stream(self.model.device), torch.cuda.Stream(self.model.device)
        side.wait_stream(here)
        with torch.cuda.stream(side):
            self.forward(work, capture, fusions)  # compiles the kernels, too
        here.wait_stream(side)
        self.graphs[key] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graphs[key]):
            self.forward(work, capture, fusions)

    def _buffers(self, batch: int) -> Buffers:
        if batch not in self.buffers:
            config, model, device = self.config, self.model, self.model.device

            def empty(width: int, dtype: torch.dtype = model.dtype) -> Tensor:
                return torch.empty(batch, width, dtype=dtype, device=device)

            self.buffers[batch] = Buffers(
                inputs=torch.zeros(2, batch, dtype=torch.int32, device=device),
                residual=empty(config.hidden_size, model.residual_dtype),
                projected=empty((config.heads + 2 * config.kv_heads) * config.head_dim),
                attended=empty(config.heads * config.head_dim),
                gated=empty(config.intermediate_size),
                logits=empty(config.vocab_size, torch.float32),
                report=torch.zeros(2, batch, dtype=torch.int64, device=device),
                top=TopScratch(batch, config.vocab_size, device),
            )
        return self.buffers[batch]

    def _fusions(self, positions: int) -> list[Fusion]:
        """What every layer does to new queries and keys, with a table for this many positions or more."""
        if not self.fusions or self.reach < positions:
            self.graphs.clear()  # they read the tables that are about to go
            self.reach = max(SHORTEST_TABLE, 1 << (positions - 1).bit_length())
            self.fusions = [self._fusion(layer) for layer in self.model.layers]
        return self.fusions

    def _fusion(self, layer: Layer) -> Fusion:
        attention = layer.attention
        rotary = attention.rotary
        table = None if rotary is None else torch.view_as_real(rotary.table(self.reach, self.model.device))
        return Fusion(
            table=table,
            rotary_dim=0 if rotary is None else rotary.rotary_dim,
            q_gain=attention.q_norm,
            k_gain=attention.k_norm,
            eps=self.config.norm_eps,
        )

    def forward(self, work: Buffers, capture: Capture, fusions: list[Fusion]) -> None:
        """Every launch of one pass, in order. Leaves `inputs` ready for the next."""
        model, config = self.model, self.config
        tokens, lengths = work.inputs[0], work.inputs[1]
        rows = stored(model.embed)
        assert rows is not None
        embed(tokens, rows, work.residual, config.embedding_scale or 1.0, self.pdl)
        for index, layer in enumerate(model.layers):
            new = NewTokens(
                work.projected, lengths, work.attended, config.heads, config.kv_heads, config.scale,
                config.attention_softcap, fusions[index], self.workspace, self.pdl,
            )  # fmt: skip
            self._layer(index, layer, capture, new, work)
        self._multiply(work.residual, Linear([model.head]), work.logits, model.norm)
        if config.logit_scale != 1.0:
            work.logits.mul_(config.logit_scale)
        if config.logit_softcap is not None:
            work.logits.div_(config.logit_softcap).tanh_().mul_(config.logit_softcap)
        most_likely(work.logits, work.inputs, work.report, work.top, self.pdl)  # and what the next pass is fed

    def _layer(self, index: int, layer: Layer, capture: Capture, new: NewTokens, work: Buffers) -> None:
        block = layer.feed_forward
        assert isinstance(block, FeedForward)
        self._multiply(work.residual, layer.attention.qkv, work.projected, layer.attention_norm)
        capture.attend(index, new)
        self._multiply(work.attended, layer.attention.o, work.residual, residual=work.residual)
        self._multiply(work.residual, block.gate_up, work.gated, layer.feed_forward_norm, self.config.activation)
        self._multiply(work.gated, block.down, work.residual, residual=work.residual)

    def _multiply(
        self, x: Tensor, linear: Linear, out: Tensor, gain: Tensor | None = None, activation: str = "none",
        residual: Tensor | None = None,
    ) -> None:  # fmt: skip
        matrix = stored(linear.format)
        assert matrix is not None
        words = self._word_gain(gain) if gain is not None and matrix.kind == "int4" and x.shape[0] == 1 else None
        around = Fused(gain, self.config.norm_eps, linear.bias, activation, residual, words)
        if x.shape[0] <= WIDE:
            multiply(x, matrix, out, around, self.pdl)
        else:
            multiply_wide(x, matrix, out, self.workspace, around, self.pdl)

    def _word_gain(self, gain: Tensor) -> Tensor:
        if id(gain) not in self.word_gains:
            self.word_gains[id(gain)] = word_order(gain)
        return self.word_gains[id(gain)]
