"""Keys and values of heads that keep the same tokens, from whatever layers: one slot map, one tensor.

A cache whose heads follow different rules has a pool for each rule, with a span of heads for every layer. A pool with a
window holds `sinks + window + 2 x slack` tokens a row, and is compacted once in `slack` steps. A step that brings more
than fit, as a chunk of a prompt does, is held whole until it is committed; then the pool is as small as before.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from fewer.cache.slot_map import SlotMap, StepPlan
from fewer.kernels.causal import needs_no_mask
from fewer.model.step import Step
from fewer.slots import Place


class HeadPool:
    """`storage` [2 (keys, values), B, heads, capacity, D]; keys are rotated before they are stored."""

    def __init__(self, slots: SlotMap, heads: int, head_dim: int, layers: int, dtype: torch.dtype):
        self.slots, self.layers = slots, layers
        shape = 2, len(slots.counts), heads, slots.capacity, head_dim
        self.storage = torch.zeros(shape, dtype=dtype, device=slots.device)
        self.absent: Tensor | None = None  # [layers, B, capacity] slots of tokens that skipped a layer

    @property
    def nbytes(self) -> int:
        return self.storage.nbytes

    def begin(self, step: Step, new: list[int], width: int) -> StepPlan:
        """Place a step of `new[b]` tokens a row, padded to `width`."""
        self._make_room(width)
        plan, _ = self.slots.plan(step, new, width)
        return plan

    def store(self, span: slice, k: Tensor, v: Tensor, plan: StepPlan) -> tuple[Tensor, Tensor]:
        """k, v [B, n, T, D] of the heads in `span` -> their keys and values [B, n, stop - first, D], the new ones
        included."""
        keys, values = self.storage[:, :, span]
        if plan.slots is None:
            keys[:, :, plan.start : plan.stop] = k
            values[:, :, plan.start : plan.stop] = v
        else:
            index = plan.slots[:, None, :, None].expand_as(k)
            keys.scatter_(2, index, k.to(keys.dtype))
            values.scatter_(2, index, v.to(values.dtype))
        return keys[:, :, plan.first : plan.stop], values[:, :, plan.first : plan.stop]

    def mask(self, layer: int, plan: StepPlan) -> Tensor | None:
        """The plan's mask without the tokens that skip `layer`, now or before."""
        layer_plan = plan.step.layer_plan
        if layer_plan is None and self.absent is None:
            return plan.mask
        if self.absent is None:
            shape = self.layers, len(self.slots.counts), self.slots.capacity
            with torch.inference_mode(False):  # a commit outside a pass moves it, too
                self.absent = torch.zeros(shape, dtype=torch.bool, device=self.slots.device)
        absent = self.absent[layer]
        skipped = torch.zeros_like(plan.step.positions, dtype=torch.bool)
        if layer_plan is not None:
            skipped = ~layer_plan[:, :, layer].to(absent.device)
        if plan.slots is None:
            absent[:, plan.start : plan.stop] = skipped
        else:
            absent.scatter_(1, plan.slots, skipped)
        if plan.causal and plan.start == 0:  # the text begins with this step, and nothing in it skips the layer
            return None
        present = ~absent[:, None, None, plan.first : plan.stop]
        return present if plan.visible is None else plan.visible & present

    def is_plain_window(self, plan: StepPlan) -> bool:
        """Whether each query of the step sees the sinks and its own window, and all rows begin at one slot."""
        return (
            self.slots.window is not None
            and not self.slots.by_chunk
            and plan.step.mask == "causal"
            and plan.step.layer_plan is None
            and plan.start is not None
            and self.absent is None
        )

    def is_plain_chunk(self, plan: StepPlan) -> bool:
        """Whether each query of the step sees the sinks, the window in front of the step and the step's triangle, where
        a triangle is attended to without a mask."""
        return (
            self.slots.by_chunk
            and plan.step.role == "prompt"
            and plan.step.mask == "causal"
            and plan.step.layer_plan is None
            and plan.start is not None
            and self.absent is None
            and needs_no_mask(self.slots.device)
        )

    def before_chunk(self, stored: Tensor, plan: StepPlan) -> Tensor:
        """What a plain chunk sees of keys or values [B, n, stop, D]: the sinks, the window in front of it, and it."""
        slots = self.slots
        assert slots.window is not None and plan.start is not None
        low = plan.start - slots.window + 1
        if low <= slots.sinks:
            return stored
        return torch.cat((stored[:, :, : slots.sinks], stored[:, :, low:]), dim=2)

    def place_one(self, position: int) -> Place:
        """Commit a token of the only row, which the caller stores."""
        self._make_room(1)
        slots = self.slots
        slot = slots.counts[0]
        slots.table[0, slot] = position
        slots.counts[0] = slot + 1
        return Place(slot, slot + 1, (self._first(slot),), slots.sinks)

    def place(self, step: Step, committed: int) -> Place:
        """Place a step of the only row behind its `committed` tokens; it stays tentative."""
        positions = step.positions[0].tolist()
        self._make_room(len(positions))
        slot = self.slots.reserve_row(step.positions)
        at = [slot + position - committed for position in positions]  # as if every node of a tree stood in a row
        if self.slots.by_chunk and step.role == "prompt":
            at = [slot] * len(at)
        return Place(slot, slot + len(at), [self._first(each) for each in at], self.slots.sinks)

    def place_each(self, step: Step) -> list[list[int]]:
        """Place a token in every row, which the caller stores; it stays tentative. Of each row: slots in use, the new
        token's slot, the first one that it sees behind the sinks, and these."""
        self._make_room(1)
        slots = self.slots
        slots.place_each(step.positions)
        return [[count, count, self._first(count), slots.sinks] for count in slots.counts]

    def commit(self, kept: Sequence[int | Sequence[int]]) -> None:
        self._move(self.slots.commit(kept))
        room = self.slots.bounded(self.slots.capacity)
        if self.slots.capacity > room:  # widened for this step
            self._compact(self.slots.capacity)
            self._resize(room)

    def abandon(self, width: int) -> None:
        """Clear what a step of `width` tokens wrote that is given up."""
        for row, count in enumerate(self.slots.counts):
            self.clear(row, count, count + width)

    def cut(self, row: int, kept: int) -> None:
        """Keep the first `kept` slots of `row`."""
        self.clear(row, kept, self.slots.counts[row])
        self.slots.counts[row] = kept

    def clear(self, row: int, start: int, stop: int) -> None:
        """What was stored may not be finite, and a mask keeps no NaN out: 0·NaN is NaN."""
        self.storage[:, row, :, start:stop] = 0

    def reserve(self, tokens: int) -> None:
        """Make room for this many tokens a row, or for as many as the window holds."""
        slots = self.slots
        if slots.bounded(tokens) > slots.capacity:
            self._resize(slots.bounded(max(tokens, slots.capacity * 5 // 4 + 64)))

    def _first(self, slot: int) -> int:
        """The first slot that a token at `slot` sees behind the sinks."""
        return 0 if self.slots.window is None else max(0, slot + 1 - self.slots.window)

    def _make_room(self, width: int) -> None:
        """Compact a window, or widen it until the step is committed."""
        self._compact(width)
        needed = max(self.slots.counts) + width
        if self.slots.window is not None and needed > self.slots.capacity:
            self._resize(needed)

    def _compact(self, width: int) -> None:
        """Drop what no later query sees, where `width` more tokens would not fit."""
        slots = self.slots
        if slots.window is not None and max(slots.counts) > slots.sinks + slots.window + slots.slack:
            self._move(slots.make_room(width))

    def _resize(self, capacity: int) -> None:
        extra = capacity - self.slots.capacity
        self.slots.capacity = capacity
        with torch.inference_mode(False):  # a commit outside a pass writes to them, too
            self.slots.table = pad(self.slots.table, (0, extra))
            self.storage = pad(self.storage, (0, 0, 0, extra))
            if self.absent is not None:
                self.absent = pad(self.absent, (0, extra))

    def _move(self, moves: Tensor | None) -> None:
        """Slot j of row b takes what slot moves[b, j] held."""
        if moves is None:
            return
        width = moves.shape[1]
        index = moves[None, :, None, :, None].expand(2, -1, self.storage.shape[2], -1, self.storage.shape[4])
        self.storage[:, :, :, :width] = self.storage.gather(3, index)
        if self.absent is not None:
            self.absent[:, :, :width] = self.absent.gather(2, moves.expand(self.layers, -1, -1))
