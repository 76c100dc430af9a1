"""A layer over a pool of pages, and what every layer does in one step. `fewer.cache.paged` keeps the books."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fewer.cache.slot_map import StepPlan
from fewer.kernels.paged_attention import paged_attention
from fewer.model.rope import Rotary
from fewer.model.step import Step

if TYPE_CHECKING:
    from fewer.cache.paged import PagedCache


@dataclass(slots=True)
class PagedPlan:
    """What every layer does in one step: N new tokens are written, those in pages found by their text are not."""

    step: Step
    slots: StepPlan
    lengths: Tensor  # [B] int64: slots of each row that hold a token, the new ones included
    table: Tensor  # [B, P] the rows' pages
    rows: Tensor  # [N] row of the batch
    columns: Tensor  # [N] place among the step's tokens
    pages: Tensor  # [N] page that takes it
    offsets: Tensor  # [N] place in that page
    near: tuple[int, Tensor] | None = None  # windowed layers: the first page read, and what is visible from there on


class PagedLayer:
    """One layer's view of the pool; keys are rotated before they are stored."""

    def __init__(self, cache: PagedCache, index: int, window: int | None):
        self.cache, self.index, self.window = cache, index, window

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, rotary: Rotary | None, step: Step) -> Tensor:
        plan = self.cache.plan_for(step)
        if rotary is not None:
            q, k = rotary.apply(q, step.positions), rotary.apply(k, step.positions)
        self._store(k, v, plan)
        first, mask, causal = 0, plan.slots.mask, plan.slots.causal
        if self.window is not None:
            (first, mask), causal = self.cache.near(plan, self.window), False
        size, absent = self.cache.pool.page_size, self.cache.absent
        if absent is not None and not (plan.slots.causal and plan.slots.start == 0):
            present = ~absent[self.index, :, None, None, first * size : plan.slots.stop]
            mask = mask if self.window is not None else plan.slots.visible
            mask, causal = present if mask is None else mask & present, False
        keys, values = self.cache.pool.storage[self.index]
        return paged_attention(
            q,
            keys,
            values,
            plan.table[:, first:],
            plan.lengths - first * size,
            self.cache.config.scale,
            mask,
            causal,
            self.cache.config.attention_softcap or 0.0,
        )

    def skip(self, nothing: Tensor, step: Step) -> None:
        self._store(nothing, nothing, self.cache.plan_for(step))

    def _store(self, k: Tensor, v: Tensor, plan: PagedPlan) -> None:
        """k, v [B, Hk, T, D]: those of written tokens go to their places."""
        new = torch.stack([part[plan.rows, :, plan.columns] for part in (k, v)], dim=1)  # [N, 2, Hk, D]
        storage = self.cache.pool.storage
        storage[self.index][:, plan.pages, :, plan.offsets] = new.to(storage.dtype)
