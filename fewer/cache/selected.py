"""Selected keys: every token stays in memory, and a generated one attends to few of them.

What `tidal-decode`, `quest`, `oracle-topk` and `random-topk` share. Prompts are read with full attention, and so is
everything while no row holds more than the budget. After that a layer attends to lists of slots, a list for each query
head (or one for the query heads of a key head together), and gathers only those keys and values. Layers with a sliding
window of the model's own stay as they are.

A step of T new tokens a row (a draft to verify) counts as B·T queries, each with lists of its own: so a verified chain
chooses what one token after the other would have chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewer.cache.slot_map import SlotMap, StepPlan
from fewer.cache.stored import StoredCache, StoredLayer
from fewer.errors import UsageError
from fewer.kernels.attention import attention
from fewer.kernels.list_attention import INFINITY, attend_list
from fewer.model.config import ModelConfig
from fewer.model.rope import Rotary
from fewer.model.step import Step
from fewer.slots import Ahead, Capture

Sets = Literal["query-head", "key-head"]
LONGEST_RUN = 1024  # keys that are scored at once


def check_budget(method: str, budget: int) -> None:
    if budget < 1:
        raise UsageError(f"{method}: budget={budget} keeps nothing: use 1 token or more")


def check_start(method: str, start: int) -> None:
    if start < 0:
        raise UsageError(f"{method}: start={start} is negative: use 0 or more dense layers")


@dataclass(slots=True)
class Selection:
    """One step as B·T queries, and what its layers have chosen so far: made with the step, handed on from layer to
    layer, gone with the commit. A captured step has none: its launches hand on a tensor."""

    plan: StepPlan
    rows: Tensor  # [B·T, 1] int32: the row of each query, which is the page table of a contiguous cache
    own: Tensor  # [B·T] int64: the slot of each query's own token
    lengths: Tensor  # [B·T] int32: slots that may hold something it sees; the plan's mask says which do
    chosen: Tensor | None = None  # [B·T, H or Hk, n] int32 slots, negative: none. What the layers behind attend to


class SelectedLayer(StoredLayer):
    """A layer that keeps everything and, where a `Selection` says so, reads part of it."""

    cache: SelectedCache

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, rotary: Rotary | None, step: Step) -> Tensor:
        plan = self.cache.plan_for(self.slots, step)
        selection = self.cache.selection_for(plan)
        if selection is None or not self.is_ready(selection):
            return super().attend(q, k, v, x, rotary, step)
        if rotary is not None:
            q, k = rotary.apply(q, step.positions), rotary.apply(k, step.positions)
        self._store(k, v, plan)
        return self.attend_some(q, selection, self._mask(plan))

    def is_ready(self, selection: Selection) -> bool:
        """Whether there is something to select by; else the layer reads everything."""
        return True

    def attend_some(self, q: Tensor, selection: Selection, mask: Tensor | None) -> Tensor:
        """q [B, H, T, D] rotated, mask [B or 1, 1, T, S] bool or None -> [B, H, T, D]."""
        return self.gather(q, self.choose(q, selection, mask), selection, mask)

    def choose(self, q: Tensor, selection: Selection, mask: Tensor | None) -> Tensor:
        """Slots [B·T, H or Hk, n] int32 that the queries attend to; negative or invisible ones count as none.
        A layer supplies this, or an `attend_some` of its own."""
        raise NotImplementedError

    def gather(self, q: Tensor, slots: Tensor, selection: Selection, mask: Tensor | None) -> Tensor:
        """Attention over listed slots [B·T, H or Hk, n] alone."""
        batch, heads, width, head_dim = q.shape
        if mask is not None:
            seen = mask[:, 0].expand(batch, width, -1).reshape(batch * width, 1, -1)
            at = slots.clamp(0, seen.shape[2] - 1).long()
            slots = torch.where(seen.expand(-1, slots.shape[1], -1).gather(2, at), slots, -1)
        out = attend_list(
            queries_of(q),
            self.keys,
            self.values,
            selection.rows,
            slots,
            None,
            "token",
            selection.lengths,
            self.scale,
            self.softcap or None,
        ).out
        return out.view(batch, width, heads, head_dim).transpose(1, 2).to(q.dtype)

    def scored(self, q: Tensor, selection: Selection, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Full attention with its logits: (output [B, H, T, D], scores [B, H, T, S] float32, -inf where unseen)."""
        stop, softcap = selection.plan.stop, self.softcap
        if q.is_cuda and q.shape[2] == 1 and self.absent is None:
            return self._scored_together(q, selection)
        keys, values = self.keys[:, :, :stop], self.values[:, :, :stop]
        out = attention(q, keys, values, self.scale, mask, softcap=softcap)
        batch, heads, width, head_dim = q.shape
        scores = torch.empty(batch, keys.shape[1], heads // keys.shape[1] * width, stop, device=q.device)
        grouped = q.float().mul(self.scale).reshape(*scores.shape[:3], head_dim)
        for first in range(0, stop, LONGEST_RUN):  # float32 copies of few keys at a time stay in the processor's cache
            run = slice(first, first + LONGEST_RUN)
            scores[..., run] = grouped @ keys[:, :, run].float().transpose(2, 3)
        scores = scores.view(batch, heads, width, stop)
        if softcap:
            scores = scores.div_(softcap).tanh_().mul_(softcap)
        return out, scores if mask is None else scores.masked_fill_(~mask, -INFINITY)

    def _scored_together(self, q: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
        """One token a row on a GPU: both in one pass over the keys."""
        part = attend_list(
            q[:, :, 0],
            self.keys,
            self.values,
            selection.rows,
            None,
            None,
            "token",
            selection.lengths,
            self.scale,
            self.softcap or None,
            want_scores=True,
        )
        assert part.scores is not None
        return part.out[:, :, None].to(q.dtype), part.scores[:, :, None, : selection.plan.stop]

    def best(self, scores: Tensor, selection: Selection, budget: int, sets: Sets) -> Tensor:
        """The `budget` slots with the highest scores [B, H, T, S] -> [B·T, H or Hk, n] int32; -1: fewer are visible.

        A query's own token always is among them. For sets by key head a slot is worth its best score in the group.
        """
        if sets == "key-head":
            scores = scores.unflatten(1, (self.keys.shape[1], -1)).amax(2)
        flat = queries_of(scores)  # [B·T, heads, S]
        own = selection.own[:, None, None].clamp(max=flat.shape[2] - 1).expand(-1, flat.shape[1], 1)
        top = flat.scatter(2, own, INFINITY).topk(min(budget, flat.shape[2]), sorted=False)
        return torch.where(top.values > -INFINITY, top.indices, -1).int()


def queries_of(x: Tensor) -> Tensor:
    """[B, H, T, n] -> [B·T, H, n]."""
    return x.transpose(1, 2).flatten(0, 1)


class SelectedCache(StoredCache):
    """A KVCache of which some layers select. `make_layer(cache, index, slots)` gives those, and None for the others."""

    def __init__(
        self,
        name: str,
        config: ModelConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        budget: int,
        make_layer: Callable[[SelectedCache, int, SlotMap], SelectedLayer | None],
    ):
        windows = [config.sliding_window if config.is_sliding(layer) else None for layer in range(config.layers)]
        if all(window is not None for window in windows):
            raise UsageError(
                f"cache={name} has nothing to select from: every layer of this model sees only its last "
                f"{config.sliding_window} tokens; use cache=full"
            )
        super().__init__(config, batch, capacity, dtype, device, windows, [0] * config.layers)
        self.budget = budget
        self.everything = next(slots for slots in self.maps if slots.window is None)
        self.row_table = torch.arange(batch, dtype=torch.int32, device=device)[:, None]
        self._selection: Selection | None = None
        self._selects = False  # the step under way reads part of what is stored
        for index, layer in enumerate(self.layers):
            made = make_layer(self, index, layer.slots) if windows[index] is None else None
            self.layers[index] = made or layer
        self._point_layers()

    def adopt(self, other: StoredCache) -> None:
        """Begin with what `other` holds, a cache without windows of as many rows: prompts leave the same in both."""
        self.reserve(max(other.lengths))
        longest = max(other.lengths)
        for mine, theirs in zip(self.pools, other.pools, strict=True):
            mine[..., :longest, :] = theirs[..., :longest, :]
        for slots, known in zip(self.maps, other.maps, strict=True):
            slots.table[:, :longest] = known.table[:, :longest]
            slots.counts = list(known.counts)
        self.committed, self._step, self._selection = other.lengths, None, None

    def begin(self, step: Step) -> None:
        self._selection, self._selects = None, False
        super().begin(step)

    def capture(self, step: Step) -> Capture | None:
        """While everything is read, what `full` launches; behind the budget, what the method says."""
        if step.lengths is not None or len(self.maps) > 1 or self.skips:
            return None
        selects = self._room_for_all == 0
        capture = self.selecting_capture() if selects else self.contiguous_capture()
        if capture is not None:
            self.begin(step)
            self._selects = selects
        return capture

    def ahead(self) -> Ahead | None:
        """Launches over contiguous keys read positions on the device, also where they select."""
        if len(self.maps) > 1 or self.skips:
            return None
        room = self._room_for_all
        capture = self.selecting_capture() if room == 0 else self.contiguous_capture()
        return None if capture is None else Ahead(capture, room or None)

    @property
    def _room_for_all(self) -> int | None:
        """Tokens one by one until a step is a selecting one, as `selection_for` says; None: none ever is."""
        if not any(isinstance(layer, SelectedLayer) for layer in self.layers):
            return None
        return max(0, self.budget - max(self.everything.counts))

    def selecting_capture(self) -> Capture | None:
        """What one token a row launches that reads part of what is stored; None: only the layers' `attend` knows."""
        return None

    def selection_for(self, plan: StepPlan) -> Selection | None:
        """The step's selection, made when the first layer asks; None: this step reads everything."""
        if plan.step.role == "prompt" or plan.causal or plan.stop <= self.budget or plan.step.mask == "bidirectional":
            return None
        if self._selection is None:
            self._selection, self._selects = self._select(plan), True
        return self._selection

    def _select(self, plan: StepPlan) -> Selection:
        width = plan.step.positions.shape[1]
        counts = torch.tensor(self.everything.counts, device=self.device)
        rows = self.row_table.repeat_interleave(width, 0)
        own = (counts[:, None] + torch.arange(width, device=self.device)).flatten()
        lengths = torch.full_like(own, plan.stop, dtype=torch.int32)
        if width == 1:
            new = plan.step.lengths
            lengths = (counts + (1 if new is None else torch.tensor(list(new), device=self.device))).int()
        return Selection(plan, rows, own, lengths)


def selecting_layers(config: ModelConfig, start: int) -> list[int]:
    """Layers from number `start` on without a window of the model's own, ascending."""
    return [layer for layer in range(start, config.layers) if not config.is_sliding(layer)]
