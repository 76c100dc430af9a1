"""Quest: every layer guesses from the bounds of each page's keys which pages matter to the query, and reads those.

Paper: Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference, arXiv 2406.10774.
Differs from the paper: models with grouped queries work (its code has none), with a set of pages for each query head
or, on request, one for the heads that share keys; the newest page always is among those chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewer.cache.page_statistics import Arrivals, PageStatistics, choose_pages, upper_bound
from fewer.cache.selected import (
    SelectedCache,
    SelectedLayer,
    Selection,
    Sets,
    check_budget,
    check_start,
    queries_of,
    selecting_layers,
)
from fewer.cache.slot_map import SlotMap, StepPlan
from fewer.cache.stored import StoredCache
from fewer.errors import UsageError
from fewer.model.config import ModelConfig
from fewer.model.step import Step
from fewer.registry import method
from fewer.slots import Ahead, Capture


@dataclass(frozen=True)
class QuestConfig:
    budget: int = 1024  # tokens that a query head attends to, a whole number of pages
    page_size: int = 16  # tokens a page
    start: int = 2  # first layers that read everything
    sets: Sets = "query-head"  # a set for each query head, or one for those of a key head together

    def __post_init__(self) -> None:
        check_budget("quest", self.budget)
        check_start("quest", self.start)
        if self.page_size < 1:
            raise UsageError(f"quest: page_size={self.page_size} is not allowed: use 1 token or more")
        if self.budget % self.page_size:
            raise UsageError(
                f"quest: budget={self.budget} is not a whole number of pages of {self.page_size} tokens: use a "
                "multiple of page_size"
            )


class QuestLayer(SelectedLayer):
    """Keeps the bounds of its pages with its keys, and reads the pages that promise most."""

    cache: QuestCache

    def __init__(self, cache: QuestCache, index: int, slots: SlotMap, member: int):
        super().__init__(cache, index, slots, renumber=False)
        self.member = member  # its number among the layers with bounds

    def choose(self, q: Tensor, selection: Selection, mask: Tensor | None) -> Tensor:
        settings, size = self.cache.settings, self.cache.settings.page_size
        if selection.plan.step.mask == "tree":
            assert mask is not None
            return self._choose_on_branches(q, selection, mask)
        seen = selection.own + 1  # a query's own token is the last that it may see
        bounds = self.cache.statistics.upper_bounds(self.member, queries_of(q), selection.rows, seen)
        if settings.sets == "key-head":
            bounds = bounds.unflatten(1, (self.keys.shape[1], -1)).amax(2)
        pages = choose_pages(bounds, seen, size, settings.budget // size)  # [B·T, H or Hk, K]
        slots = pages[..., None] * size + torch.arange(size, dtype=torch.int32, device=pages.device)
        return torch.where(pages[..., None] >= 0, slots, -1).flatten(2)

    def _choose_on_branches(self, q: Tensor, selection: Selection, mask: Tensor) -> Tensor:
        """What each query would choose in a row with its ancestors alone: pages that were whole before the step are as
        they are, and what its branch sees behind them is cut into pages of its own."""
        settings, size = self.cache.settings, self.cache.settings.page_size
        queries, width, counts = queries_of(q), q.shape[2], self.cache.everything.counts
        whole = torch.tensor([counts[query // width] // size for query in range(len(queries))], device=q.device)
        bounds = self.cache.statistics.upper_bounds(self.member, queries, selection.rows, whole * size)
        slots = torch.arange(bounds.shape[2] * size, dtype=torch.int32, device=q.device).view(-1, size)
        slots = slots.repeat(len(queries), 1, 1)  # [B·T, P, page_size]
        seen = mask[:, 0].expand(q.shape[0], width, -1).flatten(0, 1)
        for query, first in enumerate(whole.tolist()):
            behind = seen[query].nonzero()[:, 0]
            behind = behind[behind >= first * size]
            parts = behind.split(size) if len(behind) else ()  # padding sees nothing
            for page, part in enumerate(parts, first):
                keys = self.keys[query // width, :, part]  # [Hk, n, D]
                bounds[query, :, page] = upper_bound(queries[query], keys.amax(1), keys.amin(1))
                slots[query, page] = -1
                slots[query, page, : len(part)] = part.int()
        if settings.sets == "key-head":
            bounds = bounds.unflatten(1, (self.keys.shape[1], -1)).amax(2)
        pages = choose_pages(bounds, seen.sum(1).clamp(min=1), size, settings.budget // size)  # [B·T, H or Hk, K]
        chosen = slots[torch.arange(len(queries), device=q.device)[:, None, None], pages.clamp(min=0).long()]
        return torch.where(pages[..., None] >= 0, chosen, -1).flatten(2)

    def _store(self, k: Tensor, v: Tensor, plan: StepPlan) -> None:
        super()._store(k, v, plan)
        rows, columns, arrivals = self.cache.arrivals(plan)
        self.cache.statistics.add(self.member, k[rows, :, columns], arrivals)


@method("quest", slot="cache", paper="2406.10774", lossless=False, config=QuestConfig)
class QuestCache(SelectedCache):
    """Every layer from `start` on attends to the `budget // page_size` pages with the highest bounds."""

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        settings: QuestConfig = QuestConfig(),
    ):
        self.settings = settings
        members = selecting_layers(config, settings.start)

        def make_layer(cache: SelectedCache, index: int, slots: SlotMap) -> QuestLayer | None:
            return QuestLayer(self, index, slots, members.index(index)) if index in members else None

        super().__init__("quest", config, batch, capacity, dtype, device, settings.budget, make_layer)
        slots, size = self.everything.capacity, settings.page_size
        shape = len(members), batch, config.kv_heads, config.head_dim
        self.statistics = PageStatistics(*shape, slots, size, dtype, device)
        self._arrivals: tuple[StepPlan, tuple[Tensor, Tensor, Arrivals]] | None = None

    @property
    def nbytes(self) -> int:
        return super().nbytes + self.statistics.nbytes

    def arrivals(self, plan: StepPlan) -> tuple[Tensor, Tensor, Arrivals]:
        """Row and place in the step of each of the N new tokens (padding is none), [N] int64, and where they go."""
        if self._arrivals is None or self._arrivals[0] is not plan:
            new = torch.tensor(self.everything.pending, device=self.device)
            counts = torch.tensor(self.everything.counts, device=self.device)
            width = torch.arange(plan.step.positions.shape[1], device=self.device)
            rows, columns = (width < new[:, None]).nonzero().unbind(1)
            self._arrivals = plan, (rows, columns, self.statistics.place(rows, counts[rows] + columns))
        return self._arrivals[1]

    def capture(self, step: Step) -> Capture | None:
        """The layers keep the bounds of pages, so no step is launched without them."""
        return None

    def ahead(self) -> Ahead | None:
        return None

    def adopt(self, other: StoredCache) -> None:
        super().adopt(other)
        self._rebuild([0] * self.batch)

    def commit(self, kept: Sequence[int | Sequence[int]]) -> None:
        before = list(self.everything.counts)
        whole = [choice if isinstance(choice, int) else len(choice) for choice in kept] == self.everything.pending
        super().commit(kept)
        if not whole:
            self._rebuild(before)

    def truncate(self, row: int, length: int) -> None:
        super().truncate(row, length)
        before = list(self.everything.counts)
        before[row] = max(0, length - 1)
        self._rebuild(before)

    def reserve(self, tokens: int) -> None:
        super().reserve(tokens)
        if self.everything.capacity > self.statistics.page_size:
            self.statistics.grow(self.batch, self.everything.capacity)

    def _drop_tentative(self) -> None:
        failed = self._tentative
        super()._drop_tentative()
        if failed:
            self._rebuild([max(0, count - 1) for count in self.everything.counts])

    def _rebuild(self, since: Sequence[int]) -> None:
        """Slots from since[b] on have lost tokens or hold others: bounds of the pages with what is left there."""
        size = self.settings.page_size
        touched = [
            (row, page, min(size, count - page * size))
            for row, (start, count) in enumerate(zip(since, self.everything.counts, strict=True))
            for page in range(start // size, -(-count // size))
        ]
        if touched:
            rows, pages, counts = torch.tensor(touched, device=self.device).unbind(1)
            keys = [layer.keys for layer in self.layers if isinstance(layer, QuestLayer)]
            self.statistics.rebuild(keys, rows, pages, counts)
