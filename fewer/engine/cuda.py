"""The fast path of decoding on CUDA: one new token in each of B rows, the whole pass captured in one CUDA graph.

A layer is five kernels: [norm · qkv], [norm · rotation · cache write · attention · merge], [o + residual],
[norm · gate, up · gating], [down + residual]. Lengths are read on the device, so one graph serves every length up to
the cache's capacity. The numbers are those of `fewer.model.transformer`, up to rounding.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewer.formats import DenseFormat, Int4Format, Int8Format, WeightFormat
from fewer.kernels.triton import attention_decode
from fewer.kernels.triton.attention_decode import Fusion, Scratch, Tiling
from fewer.kernels.triton.ends import TopScratch, embed, most_likely
from fewer.kernels.triton.linear import WIDE, Fused, Stored, multiply, word_order
from fewer.model.feed_forward import FeedForward
from fewer.model.linear import Linear
from fewer.model.transformer import Layer, Transformer
from fewer.slots import ContiguousCache

KEPT_GRAPHS = 4  # one a (batch, cache pool): a session that ends leaves its memory, and mostly its graph, to the next


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
class _Pass:
    """Static buffers of one (batch, pool), and the graph that works on them. It does not keep the pool alive: the
    graph is replayed only when a pool of the same shape lies at the same address."""

    inputs: Tensor  # [2, B] int32: tokens, lengths
    residual: Tensor  # [B, d]
    qkv: Tensor  # [B, (H + 2 Hk) D]
    attended: Tensor  # [B, H D]
    gated: Tensor  # [B, intermediate]
    logits: Tensor  # [B, V] float32
    report: Tensor  # [2, B] int64: the most likely token, and the bits of its logit in the low halves
    top: TopScratch
    scratch: Scratch
    tiling: Tiling
    fusions: list[Fusion]
    graph: torch.cuda.CUDAGraph | None = None


def _tops(report: Tensor) -> list[float]:
    """The logits of a report [2, B]."""
    return [float(top) for top in report[1].to(torch.int32).view(torch.float32).tolist()]


class CudaDecoder:
    """Runs one token a row through `model`, storing its keys and values in a contiguous cache."""

    def __init__(self, model: Transformer, pdl: bool | None = None):
        """`pdl`: kernels start while the one in front drains (Hopper and later); None: where the GPU can."""
        self.model, self.config = model, model.config
        self.on_gpu = model.device.type == "cuda"
        if pdl is None:
            pdl = self.on_gpu and torch.cuda.get_device_capability(model.device) >= (9, 0)
        self.pdl = pdl
        properties = torch.cuda.get_device_properties(model.device) if self.on_gpu else None
        self.processors = 4 if properties is None else properties.multi_processor_count
        self.passes: OrderedDict[tuple[int, torch.Size], _Pass] = OrderedDict()
        self.word_gains: dict[int, Tensor] = {}  # a norm's gain in the order of int4's words, by the gain's id

    def accepts(self, cache: object, batch: int) -> bool:
        """Whether this cache's pool can be written by the kernels."""
        return batch <= WIDE and bool(getattr(cache, "contiguous", False))

    def run(self, tokens: Sequence[int], lengths: Sequence[int], cache: ContiguousCache) -> Tensor:
        """tokens [B] at positions `lengths` [B] -> logits [B, V] float32, a buffer that the next call overwrites.

        Keys and values go to slot lengths[b] of row b; the caller commits them.
        """
        work = self._pass(cache.pools[0])
        self._feed(work, tokens, lengths)
        self._graph(work, cache.pools[0])()
        return work.logits

    def is_finite(self, cache: ContiguousCache) -> bool:
        """Whether the last pass over `cache` gave finite logits. Waits for it."""
        return all(math.isfinite(top) for top in _tops(self._pass(cache.pools[0]).report))

    def greedy(self, token: int, position: int, cache: ContiguousCache, count: int) -> Iterator[int]:
        """Feed `token` at `position`, then each most likely token: yields `count` of them, the last one not fed.

        The GPU never waits for the host: a pass begins before the token of the one in front has arrived, since its
        inputs are already there. Only what is yielded is committed. Ends early when logits are not finite.
        """
        work = self._pass(cache.pools[0])
        self._feed(work, [token], [position])
        graph = self._graph(work, cache.pools[0])
        reports = [torch.empty_like(work.report, device="cpu", pin_memory=self.on_gpu) for _ in range(2)]
        arrived = [torch.cuda.Event() if self.on_gpu else None for _ in range(2)]

        def launch(index: int) -> None:
            graph()
            reports[index % 2].copy_(work.report, non_blocking=True)
            event = arrived[index % 2]
            if event is not None:
                event.record()

        launch(0)
        for index in range(count):
            if index + 1 < count:
                launch(index + 1)
            event = arrived[index % 2]
            if event is not None:
                event.synchronize()
            if not all(math.isfinite(top) for top in _tops(reports[index % 2])):
                return
            cache.advance_one(position + index)
            yield int(reports[index % 2][0, 0])

    def _feed(self, work: _Pass, tokens: Sequence[int], lengths: Sequence[int]) -> None:
        work.inputs.copy_(torch.tensor([list(tokens), list(lengths)], dtype=torch.int32), non_blocking=True)

    def _graph(self, work: _Pass, pool: Tensor) -> Callable[[], None]:
        """Runs one pass over what `work.inputs` holds."""
        if not self.on_gpu:
            return lambda: self.forward(work, pool)
        if work.graph is None:
            work.graph = self._capture(work, pool)
        return work.graph.replay

    def _capture(self, work: _Pass, pool: Tensor) -> torch.cuda.CUDAGraph:
        inputs = work.inputs.clone()
        side = torch.cuda.Stream(self.model.device)
        side.wait_stream(torch.cuda.current_stream(self.model.device))
        with torch.cuda.stream(side):
            self.forward(work, pool)  # compiles the kernels; the first replay writes the same keys again
        torch.cuda.current_stream(self.model.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.forward(work, pool)
        work.inputs.copy_(inputs)
        return graph

    def _pass(self, pool: Tensor) -> _Pass:
        key = pool.data_ptr(), pool.shape
        if key in self.passes:
            self.passes.move_to_end(key)
        else:
            while len(self.passes) >= KEPT_GRAPHS:
                self.passes.popitem(last=False)
            self.passes[key] = self._allocate(pool)
        return self.passes[key]

    def _allocate(self, pool: Tensor) -> _Pass:
        config, model, device = self.config, self.model, pool.device
        _, _, batch, kv_heads, capacity, head_dim = pool.shape

        def empty(width: int, dtype: torch.dtype = model.dtype) -> Tensor:
            return torch.empty(batch, width, dtype=dtype, device=device)

        tiling = attention_decode.tiling_for(batch, kv_heads, capacity, self.processors)
        return _Pass(
            inputs=torch.zeros(2, batch, dtype=torch.int32, device=device),
            residual=empty(config.hidden_size, model.residual_dtype),
            qkv=empty((config.heads + 2 * kv_heads) * head_dim),
            attended=empty(config.heads * head_dim),
            gated=empty(config.intermediate_size),
            logits=empty(config.vocab_size, torch.float32),
            report=torch.zeros(2, batch, dtype=torch.int64, device=device),
            top=TopScratch(batch, config.vocab_size, device),
            scratch=Scratch.allocate(batch, config.heads, kv_heads, head_dim, tiling.splits, device),
            tiling=tiling,
            fusions=[self._fusion(layer, capacity, device) for layer in model.layers],
        )

    def _fusion(self, layer: Layer, capacity: int, device: torch.device) -> Fusion:
        attention = layer.attention
        rotary = attention.rotary
        table = None if rotary is None else torch.view_as_real(rotary.table(capacity, device))
        return Fusion(
            table=table,
            rotary_dim=0 if rotary is None else rotary.rotary_dim,
            q_gain=attention.q_norm,
            k_gain=attention.k_norm,
            eps=self.config.norm_eps,
        )

    def forward(self, work: _Pass, pool: Tensor) -> None:
        """Every launch of one pass, in order; pool [L, 2, B, Hk, capacity, D]. Leaves `inputs` ready for the next."""
        model, config = self.model, self.config
        tokens, lengths = work.inputs[0], work.inputs[1]
        rows = stored(model.embed)
        assert rows is not None
        embed(tokens, rows, work.residual, config.embedding_scale or 1.0, self.pdl)
        for index, layer in enumerate(model.layers):
            self._layer(layer, pool[index], work.fusions[index], lengths, work)
        self._multiply(work.residual, Linear([model.head]), work.logits, model.norm)
        if config.logit_scale != 1.0:
            work.logits.mul_(config.logit_scale)
        if config.logit_softcap is not None:
            work.logits.div_(config.logit_softcap).tanh_().mul_(config.logit_softcap)
        most_likely(work.logits, work.inputs, work.report, work.top, self.pdl)  # and what the next pass is fed

    def _layer(self, layer: Layer, cached: Tensor, fusion: Fusion, lengths: Tensor, work: _Pass) -> None:
        """cached [2, B, Hk, capacity, D]: the layer's keys and values."""
        config, pdl = self.config, self.pdl
        block = layer.feed_forward
        assert isinstance(block, FeedForward)
        before, between = layer.attention_norm, layer.feed_forward_norm
        self._multiply(work.residual, layer.attention.qkv, work.qkv, before)
        attention_decode.launch(
            work.qkv, cached[0], cached[1], lengths, work.attended, None, work.scratch, work.tiling, config.heads,
            config.scale, None, config.attention_softcap, fusion, pdl,
        )  # fmt: skip
        self._multiply(work.attended, layer.attention.o, work.residual, residual=work.residual)
        self._multiply(work.residual, block.gate_up, work.gated, between, config.activation)
        self._multiply(work.gated, block.down, work.residual, residual=work.residual)

    def _multiply(
        self, x: Tensor, linear: Linear, out: Tensor, gain: Tensor | None = None, activation: str = "none",
        residual: Tensor | None = None,
    ) -> None:  # fmt: skip
        matrix = stored(linear.format)
        assert matrix is not None
        words = self._word_gain(gain) if gain is not None and matrix.kind == "int4" and x.shape[0] == 1 else None
        around = Fused(gain, self.config.norm_eps, linear.bias, activation, residual, words)
        multiply(x, matrix, out, around, self.pdl)

    def _word_gain(self, gain: Tensor) -> Tensor:
        if id(gain) not in self.word_gains:
            self.word_gains[id(gain)] = word_order(gain)
        return self.word_gains[id(gain)]
