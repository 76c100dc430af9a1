"""LServe: streaming heads keep sinks and a window, the others read the pages that matter, in 16, 8 or 4 bits.

Paper: LServe: Efficient Long-sequence LLM Serving with Unified Sparse Attention, arXiv 2502.14866.

Static sparsity: a share `sparsity` of the key heads, by the gates that `duo-attention` learns, streams in prefill and
in decoding. Dynamic sparsity: once a text exceeds `budget` tokens, a decoding step reads that many of the other heads'
tokens, in pages that bounds of small logical pages choose once in `interval` steps. Nothing else is read.

Differs from the paper:
- Streaming heads see `sinks` and the window to the token, as in the paper's code, and store exactly that, not pages.
- The prefill window holds until the first token is generated; prompts of later turns see the decoding window.
- Attention in prefill reads keys and values as they are stored, so a prompt gives the same however it is cut.
- A batch's rows choose pages each by its own length, where the paper's code goes by the longest.
- Layers with a sliding window of the model's own keep that window in all heads. MInference is not part of this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from fewer.cache.head_gates import check_sparsity, gates_of, retrieval_heads
from fewer.cache.lserve_capture import Launches, can_capture
from fewer.cache.quantised_pages import Bits, RowLayout
from fewer.cache.retrieval_pages import FEWEST, PageChoice, RetrievalPages
from fewer.cache.sink_ring import SinkRing
from fewer.errors import UsageError
from fewer.kernels.from_host import write_from_host
from fewer.model.config import ModelConfig
from fewer.model.rope import Rotary
from fewer.model.step import Step
from fewer.registry import method
from fewer.slots import Capture

if TYPE_CHECKING:
    from fewer.training import Adapter

Sets = Literal["query-head", "key-head"]


@dataclass(frozen=True)
class LServeConfig:
    sparsity: float = 0.5  # share of key heads that stream; 0: none, and no gates are needed
    sinks: int = 128  # first tokens that streaming heads keep
    window: int = 256  # most recent tokens that they keep when they decode, the current one included
    prefill_window: int = 8192  # the same in prefill
    budget: int = 4096  # tokens that the other heads read in a decoding step, in whole pages
    page_size: int = 64  # tokens a page: what is read at once
    logical_size: int = 16  # tokens a logical page: what is scored at once
    interval: int = 4  # steps that one choice of pages serves
    bits: Bits = 16  # of a stored number: 16 (the model's own), 8 or 4
    sets: Sets = "query-head"  # a choice of pages for each query head, or one for those of a key head together
    adapter: str | None = None  # file of duo-attention's gates; none: those fitted to the model

    def __post_init__(self) -> None:
        check_sparsity("lserve: sparsity", self.sparsity)
        if self.sinks < 0:
            raise UsageError(f"lserve: sinks={self.sinks} is negative: use 0 or more")
        if self.window < 1:
            raise UsageError(f"lserve: window={self.window} keeps nothing: use 1 or more")
        if self.prefill_window < self.window:
            raise UsageError(
                f"lserve: prefill_window={self.prefill_window} is smaller than window={self.window}: use {self.window} "
                "or more"
            )
        if self.page_size not in (16, 32, 64, 128):
            raise UsageError(f"lserve: page_size={self.page_size} is not allowed: use 16, 32, 64 or 128")
        for name in ("logical_size", "interval"):
            size = getattr(self, name)
            if size < 1 or self.page_size % size:
                raise UsageError(
                    f"lserve: {name}={size} does not divide page_size={self.page_size}: use 1, 2, 4, … {self.page_size}"
                )
        if self.budget < FEWEST * self.page_size:
            raise UsageError(
                f"lserve: budget={self.budget} is less than {FEWEST} pages of {self.page_size} tokens: use "
                f"{FEWEST * self.page_size} or more, or smaller pages"
            )

    @property
    def wants_adapter(self) -> bool:
        """Without streaming heads nothing that was learnt is asked for."""
        return self.sparsity > 0


class LServeLayer:
    """One layer: which of its key heads retrieve, and which stream in which ring."""

    def __init__(self, cache: LServeCache, index: int, retrieval: Tensor, ring: SinkRing, first: int):
        config = cache.config
        self.cache, self.index, self.ring = cache, index, ring
        self.scale, self.softcap = config.scale, config.attention_softcap or 0.0
        # [Hk] int32: its number among the retrieval heads, or -1 less that among the streaming ones
        self.homes = torch.where(retrieval, retrieval.cumsum(0) - 1, -(~retrieval).cumsum(0)).int().to(cache.device)
        group = config.heads // config.kv_heads
        self.parts = []  # (query heads, key heads), retrieval and streaming; None where there are none
        for chosen in (retrieval, ~retrieval):
            heads = chosen.nonzero()[:, 0]
            queries = (heads[:, None] * group + torch.arange(group)).flatten()
            self.parts.append((queries.to(cache.device), heads.to(cache.device)) if len(heads) else None)
        self.span = slice(first, first + int((~retrieval).sum()))  # its heads in the ring

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, rotary: Rotary | None, step: Step) -> Tensor:
        self.cache.begin(step)
        if rotary is not None:
            q, k = rotary.apply(q, step.positions), rotary.apply(k, step.positions)
        retrieval, streaming = self.parts
        if streaming is None:
            return self._retrieve(q, k, v)
        if retrieval is None:
            return self._stream(q, k, v)
        out = torch.empty_like(q)
        for part, attend in ((retrieval, self._retrieve), (streaming, self._stream)):
            queries, heads = part
            out[:, queries] = attend(q[:, queries], k[:, heads], v[:, heads])
        return out

    def _retrieve(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.cache.pages.attend(self.index, q, k, v, self.scale, self.softcap)

    def _stream(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.ring.attend(self.span, q, k, v, self.scale, self.softcap)

    def skip(self, nothing: Tensor, step: Step) -> None:
        raise UsageError("lserve does not know layers that tokens skip: use cache=full with skipped layers")


@method("lserve", slot="cache", paper="2502.14866", lossless=False, config=LServeConfig, adapter_of="duo-attention")
class LServeCache:
    """A KVCache of one page pool for retrieval heads and a ring for each kind of streaming heads."""

    slack: int | None = 0  # a choice of pages and a ring that has moved on cannot be taken back
    keys_rotated = True
    renumbers = False
    max_step: int | None = None

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        settings: LServeConfig = LServeConfig(),
        *,
        adapter: Adapter | None = None,
    ):
        self.config, self.settings, self.device = config, settings, device
        retrieval = _retrieval_heads(config, settings, adapter)  # [layers, Hk]
        layout = RowLayout(config.head_dim, settings.bits, dtype)
        choice = PageChoice(
            settings.page_size, settings.logical_size, settings.budget, settings.interval, settings.sets == "key-head"
        )
        self.pages = RetrievalPages(batch, retrieval.sum(1).tolist(), layout, choice, capacity, device)
        sliding = torch.tensor([config.is_sliding(layer) for layer in range(config.layers)])
        streams = ~retrieval
        self.ring = SinkRing(
            batch, int(streams[~sliding].sum()), settings.sinks, settings.prefill_window, layout, device
        )
        self.rings = [self.ring]
        if config.sliding_window is not None:  # the model's own windows: of all heads, and never narrowed
            self.rings.append(SinkRing(batch, int(streams[sliding].sum()), 0, config.sliding_window, layout, device))
        self.layers, firsts = [], [0, 0]
        for index, heads in enumerate(retrieval):
            kind = int(sliding[index])
            self.layers.append(LServeLayer(self, index, heads, self.rings[kind], firsts[kind]))
            firsts[kind] += int((~heads).sum())
        self.counts = [0] * batch  # committed tokens
        self._step: Step | None = None  # the one that is not committed yet
        self._launches: Launches | None = None  # of captured steps
        self._due = torch.zeros(batch, dtype=torch.int32, device=device)  # rows that choose pages in a captured step

    @property
    def nbytes(self) -> int:
        return self.pages.nbytes + sum(ring.nbytes for ring in self.rings)

    @property
    def lengths(self) -> list[int]:
        return list(self.counts)

    @property
    def physical_lengths(self) -> list[int]:
        if any(layer.parts[0] is not None for layer in self.layers):  # asked for in every step: no tensors here
            return list(self.counts)
        widest = max(layer.ring.sinks + layer.ring.window for layer in self.layers)
        return [min(count, widest) for count in self.counts]

    def positions(self, row: int, layer: int = 0) -> Tensor:
        """Of a layer with heads of both kinds: those of its retrieval heads."""
        count, kept = self.counts[row], self.layers[layer]
        positions = torch.arange(count) if kept.parts[0] is not None else kept.ring.positions(count)
        return positions.to(self.device)

    def begin(self, step: Step) -> None:
        """Place the step's new tokens, when the first layer asks."""
        if step is self._step:
            return
        batch, width = step.positions.shape
        decodes = step.role == "generated"
        if step.mask == "bidirectional" or step.layer_plan is not None or (decodes and width > 1):
            raise UsageError(
                "lserve takes prompts and one generated token a row at a time, in every layer: use decoding=plain or "
                "cache=full"
            )
        new = list(step.lengths) if step.lengths is not None else [width] * batch
        self.pages.abandon(self.counts)  # the last step, if it failed or was given up
        if decodes:
            self.ring.narrow(self.settings.window, self.counts)
        for ring in self.rings:
            ring.begin(self.counts, new, width)
        self.pages.begin(self.counts, new, step.positions, decodes)
        self._step = step

    def commit(self, kept: Sequence[int | Sequence[int]]) -> None:
        stays = [choice if isinstance(choice, int) else len(choice) for choice in kept]
        if any(not isinstance(choice, int) and list(choice) != list(range(len(choice))) for choice in kept):
            raise ValueError("lserve keeps a prefix of a step's tokens, not a choice of them")
        for ring in self.rings:
            ring.commit(stays)
        self.counts = [count + n for count, n in zip(self.counts, stays, strict=True)]
        self.pages.commit(self.counts)
        self._step = None

    def capture(self, step: Step) -> Capture | None:
        """Place one generated token in every row. A layer is two launches, and four where some row chooses pages."""
        if step.role != "generated" or step.lengths is not None or not can_capture(self):
            return None
        self.pages.abandon(self.counts)
        self.ring.narrow(self.settings.window, self.counts)
        self.ring.place_one_each()
        due = self.pages.place_one_each(self.counts)
        self._step = None
        if any(due):
            write_from_host(self._due, due)
        if self._launches is None or not self._launches.serve(self):
            self._launches = Launches(self)
        return self._launches.capture(self._due if any(due) else None)

    def truncate(self, row: int, length: int) -> None:
        """Forget the tokens of `row` from position `length` on. Raises FewerError where a window's are gone."""
        for ring in self.rings:
            ring.check_cut(row, self.counts[row], length)
        self.pages.abandon(self.counts)
        self._step = None
        self.counts[row] = min(self.counts[row], length)
        self.pages.truncate(row, self.counts[row])

    def reserve(self, tokens: int) -> None:
        """Nothing to do: pages and slots are taken by the steps that fill them."""


def _retrieval_heads(config: ModelConfig, settings: LServeConfig, adapter: Adapter | None) -> Tensor:
    """[layers, Hk] bool, on the CPU: none in layers with a sliding window of the model's own."""
    sliding = torch.tensor([config.is_sliding(layer) for layer in range(config.layers)])
    retrieval = torch.ones(config.layers, config.kv_heads, dtype=torch.bool)
    if settings.wants_adapter:
        if adapter is None:
            raise UsageError(
                f"lserve: sparsity={settings.sparsity} needs the gates of duo-attention, which say what heads stream: "
                "run `fewer train duo-attention` with the model, or use sparsity=0"
            )
        retrieval = retrieval_heads(gates_of(adapter, config), settings.sparsity, config)
    return retrieval & ~sliding[:, None]
