"""A ring of sinks and the last tokens: all that streaming heads store, whatever the length of the text.

Source: DuoAttention, arXiv 2410.10819 (heads that see sinks and a window, each token exactly its own); LServe, arXiv
2502.14866, section 3.3 (tiles outside of both are skipped in prefill).

The query at position i sees key j <= i where j < sinks or i - j < window. Position p lies in slot p if p < sinks, else
in slot sinks + (p - sinks) % window: nothing is ever moved, and live slots are 0..min(n, sinks + window)-1. A row's one
new token is written before it attends, over the one that has just left the window. Several attend to what is stored and
to one another, and `commit` writes them: a step that fails has overwritten nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewer.cache.quantised_pages import RowLayout
from fewer.errors import FewerError
from fewer.kernels.attention import attention
from fewer.kernels.causal import needs_no_mask
from fewer.kernels.tile_attention import Lambda, attend_tiles


@dataclass(slots=True)
class RingPlan:
    """What all layers do in one step of T new tokens a row."""

    counts: list[int]  # tokens of each row before the step
    rows: Tensor  # [N] one new token a row: the rows that get one …
    slots: Tensor  # [N] … and where
    live: int  # slots that some row fills, the new token included
    seen: Tensor | None  # [B, 1, 1, live] bool: one new token, rows of unequal lengths
    order: Tensor | None  # [B, n] more tokens: stored ones by position, then the new ones; None: only new ones
    start: Tensor | None  # [B] int32: the first new token's place in `order`
    causal: bool  # more tokens: stored or new, what is not behind a query is a plain triangle


class SinkRing:
    """The streaming heads of all layers side by side, in slots of `sinks + window` tokens (fewer for short texts)."""

    def __init__(self, batch: int, heads: int, sinks: int, window: int, layout: RowLayout, device: torch.device):
        self.sinks, self.window, self.layout, self.device = sinks, window, layout, device
        # [2 (keys, values), B, heads, slots, width]
        self.storage = torch.zeros(2, batch, heads, 0, layout.width, dtype=layout.stored_dtype, device=device)
        self._waiting: dict[int, tuple[slice, Tensor]] = {}  # packed tokens of a step that is not committed
        self._plan: RingPlan | None = None

    @property
    def nbytes(self) -> int:
        return self.storage.nbytes

    @property
    def slots(self) -> int:
        return self.storage.shape[3]

    def reserve(self, tokens: int) -> None:
        """Room for rows of this many tokens. It grows only while no row has gone round."""
        missing = min(tokens, self.sinks + self.window) - self.slots
        if missing > 0:
            with torch.inference_mode(False):  # what a pass allocates is written outside of passes, too
                self.storage = torch.nn.functional.pad(self.storage, (0, 0, 0, missing))

    def positions(self, count: int) -> Tensor:
        """The positions that a row of `count` tokens stores, ascending: [n] int64."""
        stored = torch.arange(min(count, self.sinks + self.window))
        return torch.where(stored < self.sinks, stored, stored + count - len(stored))

    def begin(self, counts: Sequence[int], new: Sequence[int], width: int) -> None:
        """Plan a step of new[b] tokens a row, padded to `width`."""
        self._waiting.clear()
        self.reserve(max(count + n for count, n in zip(counts, new, strict=True)))
        nothing = torch.empty(0, dtype=torch.int64)
        if width == 1:
            rows = [row for row, n in enumerate(new) if n]
            slots = self._slot(torch.tensor([counts[row] for row in rows], dtype=torch.int64))
            filled = [min(count + n, self.sinks + self.window) for count, n in zip(counts, new, strict=True)]
            seen = None
            if min(filled) < max(filled):
                seen = (torch.arange(max(filled)) < torch.tensor(filled)[:, None])[:, None, None].to(self.device)
            places = torch.tensor(rows, device=self.device), slots.to(self.device)
            self._plan = RingPlan(list(counts), *places, max(filled), seen, None, None, False)
            return
        order, start, causal = None, None, True
        if max(counts):
            old = [self._slot(self.positions(count)) for count in counts]
            length = max(map(len, old)) + width
            causal = len(set(map(len, old))) == 1 and needs_no_mask(self.device)
            fresh = self.slots + torch.arange(length)
            order = torch.stack([torch.cat((slots, fresh[: length - len(slots)])) for slots in old])
            order = order.clamp(max=self.slots + width - 1).to(self.device)  # behind a shorter row: seen by nobody
            start = torch.tensor([len(slots) for slots in old], dtype=torch.int32, device=self.device)
        self._plan = RingPlan(list(counts), nothing, nothing, 0, None, order, start, causal)

    def place_one_each(self) -> None:
        """Begin a step of one token in every row, for kernels that find its slot and write it themselves. There is room
        for all that the window may hold, so that nothing moves later."""
        self._waiting.clear()
        self._plan = None
        self.reserve(self.sinks + self.window)

    def attend(self, heads: slice, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float) -> Tensor:
        """q [B, H, T, D] and new k, v [B, Hk, T, D], rotated, of those `heads` -> [B, H, T, D]."""
        plan = self._plan
        assert plan is not None
        packed = self.write(heads, k, v)
        if plan.live:
            k, v = self.layout.unpack(self.storage[:, :, heads, : plan.live])
            return attention(q, k, v, scale, plan.seen, softcap=softcap)
        start: Tensor | int = 0
        if plan.order is not None and plan.start is not None:
            side_by_side = torch.cat((self.storage[:, :, heads], packed), dim=3).transpose(2, 3)
            row = torch.arange(len(plan.order), device=self.device)[:, None]
            packed, start = side_by_side[:, row, plan.order].transpose(2, 3), plan.start
        k, v = self.layout.unpack(packed)
        if k.shape[2] <= self.window:
            seen = None if plan.causal else self._triangle(plan, q, k)
            return attention(q, k, v, scale, seen, plan.causal, softcap)
        each = torch.ones(q.shape[1], dtype=torch.int32, device=self.device)
        # Without the gap behind the sinks, distances in the window and the sinks' own places are the same.
        return attend_tiles(q, k, v, start, Lambda(each * self.sinks, each * self.window), scale, softcap or None)[0]

    def write(self, heads: slice, k: Tensor, v: Tensor) -> Tensor:
        """The step's new keys and values [B, Hk, T, D] of these heads, rotated -> as they are stored."""
        plan = self._plan
        assert plan is not None
        packed = self.layout.pack(torch.stack((k, v)))  # [2, B, Hk, T, width]
        if plan.live:
            self.storage[:, plan.rows, heads, plan.slots] = packed[:, plan.rows, :, 0].transpose(0, 1)
        else:
            self._waiting[heads.start] = heads, packed
        return packed

    def commit(self, kept: Sequence[int]) -> None:
        """Keep the first kept[b] new tokens of each row."""
        waiting, plan, self._plan = list(self._waiting.values()), self._plan, None
        self._waiting.clear()
        if plan is None or not waiting:
            return
        places = []
        for row, (count, n) in enumerate(zip(plan.counts, kept, strict=True)):
            stored = self.positions(count + n)
            stored = stored[stored >= count]
            places.append(torch.stack((torch.full_like(stored, row), stored - count, self._slot(stored))))
        rows, columns, slots = torch.cat(places, dim=1).to(self.device)
        for heads, packed in waiting:
            self.storage[:, rows, heads, slots] = packed[:, rows, :, columns]

    def narrow(self, window: int, counts: Sequence[int]) -> None:
        """A smaller window from now on; what lies outside of it is freed."""
        if window >= self.window:
            return
        wide, stored = self.window, self.storage
        self.window = window
        with torch.inference_mode(False):
            self.storage = stored.new_zeros(*stored.shape[:3], min(self.slots, self.sinks + window), stored.shape[4])
        for row, count in enumerate(counts):
            kept = self.positions(count)
            source, target = self._slot(kept, wide).to(self.device), self._slot(kept).to(self.device)
            self.storage[:, row, :, target] = stored[:, row, :, source]

    def check_cut(self, row: int, count: int, length: int) -> None:
        """Raises FewerError where a row of `count` tokens cannot go back to `length`: its window has moved on."""
        moved_on = count > self.sinks + self.window and self.storage.shape[2] > 0
        if moved_on and 0 < length < count - 1:
            raise FewerError(
                f"cannot go back to {length} of {count} tokens: streaming heads have dropped what their window held "
                "there; start again at 0"
            )

    def _slot(self, positions: Tensor, window: int | None = None) -> Tensor:
        behind = positions - self.sinks
        return torch.where(behind < 0, positions, self.sinks + behind % (window or self.window))

    def _triangle(self, plan: RingPlan, q: Tensor, k: Tensor) -> Tensor:
        """[B, 1, T, n] bool: everything that is not behind a query, where the window holds it all."""
        assert plan.start is not None
        query = plan.start[:, None] + torch.arange(q.shape[2], device=self.device)
        return (torch.arange(k.shape[2], device=self.device) <= query[..., None])[:, None]
