"""Paged cache: keys and values in pages taken as the text grows; prompts that begin alike share their whole pages.

Paper: Efficient Memory Management for Large Language Model Serving with PagedAttention, arXiv 2309.06180.
Differs from the paper: shared prompts are found by their tokens, not declared. What the prompts of a batch have in
common is computed by one row; a text that comes later is computed again, and stored once. Nothing is swapped out: a
pool of fixed size that is used up refuses the step.
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewer.cache import paged_capture
from fewer.cache.paged_layer import PagedLayer, PagedPlan
from fewer.cache.pages import PagePool
from fewer.cache.prefix_tree import prefix_levels
from fewer.cache.slot_map import SlotMap
from fewer.errors import PoolExhausted, UsageError
from fewer.model.config import ModelConfig
from fewer.model.step import Step
from fewer.registry import method
from fewer.slots import Capture, KVCache


@dataclass(frozen=True)
class PagedConfig:
    page_size: int = 32  # tokens a page, 16 to 64
    pages: int = 0  # pages of the pool; 0: as many as the rows come to own

    def __post_init__(self) -> None:
        if not 16 <= self.page_size <= 64:
            raise UsageError(f"paged: page_size={self.page_size} is out of range: use 16 to 64")
        if self.pages < 0:
            raise UsageError(f"paged: pages={self.pages} is negative: use 1 or more, or 0 for a pool that grows")


@method("paged", slot="cache", paper="2309.06180", lossless=True, config=PagedConfig)
class PagedCache:
    """A KVCache that keeps every token of B rows, in one pool for all layers; a model's own windows are masks."""

    slack: int | None = None
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
        settings: PagedConfig = PagedConfig(),
    ):
        self.config, self.device = config, device
        size = settings.page_size
        pages = settings.pages or -(-capacity // size)  # what one row needs: the others may share it
        self.pool = PagePool(
            config.layers, batch, config.kv_heads, config.head_dim, size, pages, dtype, device, grows=not settings.pages
        )
        self.rows = list(range(batch))  # of the pool: all of them, but for a part of the batch
        self.slots = SlotMap(batch, capacity, device)
        windows = [config.sliding_window if config.is_sliding(layer) else None for layer in range(config.layers)]
        self.layers = [PagedLayer(self, index, window) for index, window in enumerate(windows)]
        self.absent: Tensor | None = None  # [layers, B, capacity] slots of tokens that skipped a layer
        self.texts: list[list[int]] = [[] for _ in range(batch)]  # a row's tokens, while all of it came as prompts
        self._plan: PagedPlan | None = None  # of the step under way, for layers
        self._tentative = False  # a step is not committed yet
        self._places: Tensor | None = None  # of the new tokens, for kernels

    @property
    def nbytes(self) -> int:
        return self.pool.nbytes

    @property
    def lengths(self) -> list[int]:
        return list(self.slots.counts)

    @property
    def physical_lengths(self) -> list[int]:
        return self.lengths

    def positions(self, row: int, layer: int = 0) -> Tensor:
        return self.slots.table[row, : self.slots.counts[row]].clone()

    def plan_for(self, step: Step) -> PagedPlan:
        """The step's plan, made when the first layer asks."""
        if self._plan is None or self._plan.step is not step:
            self._plan, self._tentative = self._begin(step), True
        return self._plan

    def capture(self, step: Step) -> Capture | None:
        """One generated token a row: kernels find every row's pages, shared or not, in the pool's table."""
        whole = self.rows == list(range(len(self.pool.rows))) and all(layer.window is None for layer in self.layers)
        if step.role != "generated" or step.lengths is not None or self.absent is not None or not whole:
            return None
        self._abandon()
        counts = self.lengths
        self.pool.prepare(counts, [count + 1 for count in counts])
        self.slots.place_each(step.positions)
        self._tentative = True
        if self._places is None:
            with torch.inference_mode(False):
                self._places = torch.zeros(len(counts), self.config.kv_heads, dtype=torch.int64, device=self.device)
        return paged_capture.capture(self.pool, step.positions[:, 0], self._places)

    def near(self, plan: PagedPlan, window: int) -> tuple[int, Tensor]:
        """For layers with a window: (the first page that some query sees, the mask [B, 1, T, S] from there on)."""
        if plan.near is None:
            step, stop = plan.step, plan.slots.stop
            mask = (step.positions[:, :, None] - self.slots.table[:, None, :stop] < window)[:, None]
            if plan.slots.causal:
                width = step.positions.shape[1]
                mask = mask & torch.ones(width, stop, dtype=torch.bool, device=self.device).tril(stop - width)
            elif plan.slots.mask is not None:
                mask = mask & plan.slots.mask
            first = int(mask.flatten(0, 2).any(0).int().argmax()) // self.pool.page_size
            plan.near = first, mask[..., first * self.pool.page_size :]
        return plan.near

    def shared_runs(self, prompts: Sequence[Sequence[int]]) -> Generator[tuple[KVCache, list[list[int]]]]:
        """One row writes each run, in whole pages, and gives them to the others. Rows that hold something are left."""
        size = self.pool.page_size
        taken = self.slots.counts if self.absent is None else [1] * len(prompts)
        texts = [None if count else prompt for count, prompt in zip(taken, prompts, strict=True)]
        held: dict[int, int] = {}
        try:
            for nodes in prefix_levels(texts, size, size):
                yield self._part([node.rows[0] for node in nodes], prompts), [node.tokens for node in nodes]
                for node in nodes:
                    held |= dict.fromkeys(node.rows, node.stop)
                    for row in node.rows[1:]:
                        self.pool.share(node.rows[0], row, node.stop)
        except GeneratorExit:
            self.pool.abandon(self.slots.counts, self.rows)
            raise
        self.reserve(max(held.values(), default=0))
        for row, length in held.items():
            self._hold(row, prompts[row][:length])

    def _part(self, rows: list[int], prompts: Sequence[Sequence[int]]) -> PagedCache:
        """A cache of these rows alone, in the same pool."""
        part = copy.copy(self)
        part.rows, part.texts, part.slots = rows, [[] for _ in rows], SlotMap(len(rows), 0, self.device)
        part.layers = [PagedLayer(part, layer.index, layer.window) for layer in self.layers]
        part.reserve(max(self.pool.lengths[row] for row in rows))
        for place, row in enumerate(rows):
            part._hold(place, prompts[row][: self.pool.lengths[row]])
        return part

    def _hold(self, row: int, text: Sequence[int]) -> None:
        """The pool's row has this text already."""
        self.texts[row], self.slots.counts[row] = list(text), len(text)
        self.slots.table[row, : len(text)] = torch.arange(len(text), device=self.device)

    def commit(self, kept: Sequence[int | Sequence[int]]) -> None:
        counts = self.lengths
        for row, choice in enumerate(kept):
            self._move(row, counts[row], list(range(choice)) if isinstance(choice, int) else list(choice))
        if (moves := self.slots.commit(kept)) is not None and self.absent is not None:
            self.absent[:, :, : moves.shape[1]] = self.absent.gather(2, moves.expand(len(self.layers), -1, -1))
        for row, length in zip(self.rows, self.slots.counts, strict=True):
            self.pool.cut(row, length)
        self._plan, self._tentative = None, False

    def truncate(self, row: int, length: int) -> None:
        """Forget the tokens of `row` from position `length` on."""
        self._abandon()
        kept = self.slots.count_before(row, length)
        self.slots.counts[row] = kept
        self.pool.cut(self.rows[row], kept)
        del self.texts[row][kept:]

    def reserve(self, tokens: int) -> None:
        """Make room in the bookkeeping; pages are taken by the steps that fill them. Raises PoolExhausted where one
        row of this many tokens would not fit the pool by itself."""
        wanted = self.pool.pages_for(tokens)
        if not self.pool.grows and wanted > self.pool.pages:
            raise PoolExhausted(
                f"a row of {tokens} tokens takes {wanted} pages of {self.pool.page_size} tokens, and the cache's pool "
                f"has {self.pool.pages}; use a shorter context or a larger pool"
            )
        if tokens > self.slots.capacity:
            extra = max(tokens, self.slots.capacity * 5 // 4 + 64) - self.slots.capacity
            self.slots.capacity += extra
            self.slots.table = torch.nn.functional.pad(self.slots.table, (0, extra))
            if self.absent is not None:
                self.absent = torch.nn.functional.pad(self.absent, (0, extra))

    def _begin(self, step: Step) -> PagedPlan:
        """Place the step's new tokens and take the pages they need. Raises PoolExhausted; then nothing is taken."""
        self._abandon()
        batch, width = step.positions.shape
        new = list(step.lengths) if step.lengths is not None else [width] * batch
        counts = self.lengths
        totals = [count + n for count, n in zip(counts, new, strict=True)]
        slots, _ = self.slots.plan(step, new, width)
        texts = self._read(step, new)
        starts = self.pool.prepare(counts, totals, texts, self.rows)
        for row, text in enumerate(texts):
            self.texts[row] = self.texts[row] if text is None else text
        columns = torch.arange(width)
        at = torch.tensor(counts)[:, None] + columns  # [B, T] slots
        written = (at >= torch.tensor(starts)[:, None]) & (columns < torch.tensor(new)[:, None])
        places = (written.nonzero()[:, 0], written.nonzero()[:, 1], at[written])
        rows, columns, targets = (part.to(self.device) for part in places)
        self._mark_absent(step, rows, columns, targets)
        lengths, mine = (torch.tensor(part, device=self.device) for part in (totals, self.rows))
        written_at = self.pool.places(mine[rows], targets)
        return PagedPlan(step, slots, lengths, self.pool.table[mine], rows, columns, *written_at)

    def _read(self, step: Step, new: list[int]) -> list[list[int] | None]:
        """Each row's whole text with the step's tokens, None where it is not known or what is stored is not the text's
        alone. Only prompts are read: what is generated would have to come back from the GPU every step."""
        readable = step.role == "prompt" and step.mask == "causal" and step.tokens is not None
        if not readable or step.layer_plan is not None or self.absent is not None:
            return [None] * len(new)
        assert step.tokens is not None
        tokens = step.tokens.tolist()
        return [
            [*text, *tokens[row][: new[row]]] if len(text) == self.slots.counts[row] else None
            for row, text in enumerate(self.texts)
        ]

    def _mark_absent(self, step: Step, rows: Tensor, columns: Tensor, slots: Tensor) -> None:
        if step.layer_plan is not None and self.absent is None:
            shape = len(self.layers), len(self.slots.counts), self.slots.capacity
            with torch.inference_mode(False):  # a commit outside a pass writes to it, too
                self.absent = torch.zeros(shape, dtype=torch.bool, device=self.device)
        if self.absent is not None:
            runs = None if step.layer_plan is None else step.layer_plan.to(self.device)[rows, columns]  # [N, L]
            self.absent[:, rows, slots] = False if runs is None else ~runs.t()

    def _move(self, row: int, count: int, chosen: list[int]) -> None:
        """Move the chosen new slots of a row together, behind its `count` old ones."""
        fed = self.texts[row][count:]
        if fed:
            self.texts[row][count:] = [fed[index] for index in chosen]
        moved = [(count + index, count + place) for place, index in enumerate(chosen) if index != place]
        if not moved:
            return
        mine = self.rows[row]
        self.pool.prepare(
            [moved[0][1]], [self.pool.lengths[mine]], rows=[mine]
        )  # a prompt's pages may be shared already
        storage = self.pool.storage
        sources, targets = torch.tensor(moved, device=self.device).t()
        whose = torch.full_like(sources, mine)
        (pages, offsets), (new_pages, new_offsets) = (self.pool.places(whose, at) for at in (sources, targets))
        storage[:, :, new_pages, :, new_offsets] = storage[:, :, pages, :, offsets]

    def _abandon(self) -> None:
        """The last step failed or was given up."""
        if not self._tentative:
            return
        self._plan, self._tentative = None, False
        self.pool.abandon(self.slots.counts, self.rows)
        self.texts = [text[:count] for text, count in zip(self.texts, self.slots.counts, strict=True)]
