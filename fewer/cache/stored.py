"""Keys and values in pre-allocated tensors: the layer and the cache that `full` and `sink-window` share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewer.cache.slot_map import SLACK, SlotMap, StepPlan
from fewer.kernels.attention import attention
from fewer.model.config import ModelConfig
from fewer.model.rope import Rotary
from fewer.model.step import Step


class StoredLayer:
    """One layer's keys and values [B, Hk, capacity, D], rotated before they are stored (unless `renumber`)."""

    keys: Tensor  # views into the pool of the layer's kind
    values: Tensor

    def __init__(self, cache: StoredCache, index: int, slots: SlotMap, renumber: bool):
        config = cache.config
        self.cache, self.index, self.slots, self.renumber = cache, index, slots, renumber
        self.scale = config.scale
        self.softcap = config.attention_softcap or 0.0
        self.absent: Tensor | None = None  # [B, capacity] slots of tokens that skipped this layer

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, rotary: Rotary | None, step: Step) -> Tensor:
        plan = self.cache.plan_for(self.slots, step)
        if self.renumber and rotary is not None:
            return self._attend_renumbered(q, k, v, rotary, plan)
        if rotary is not None:
            q, k = rotary.apply(q, step.positions), rotary.apply(k, step.positions)
        self._store(k, v, plan)
        mask = self._mask(plan)
        window = slice(plan.first, plan.stop)
        return attention(
            q, self.keys[:, :, window], self.values[:, :, window], self.scale, mask, plan.causal, self.softcap
        )

    def skip(self, nothing: Tensor, step: Step) -> None:
        plan = self.cache.plan_for(self.slots, step)
        self._store(nothing, nothing, plan)
        self._mask(plan)

    def _attend_renumbered(self, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary, plan: StepPlan) -> Tensor:
        """Positions count slots, not tokens: unrotated keys are stored, and every step turns them to their slots."""
        self._store(k, v, plan)
        live = slice(plan.first, plan.stop)
        slots = torch.arange(plan.stop - plan.first, device=q.device)[None]
        if plan.slots is not None:
            at = plan.slots
        else:
            assert plan.start is not None
            at = torch.arange(plan.start, plan.stop, device=q.device)[None].expand(q.shape[0], -1)
        keys = rotary.apply(self.keys[:, :, live], slots.expand(q.shape[0], -1))
        q = rotary.apply(q, at - plan.first)
        return attention(q, keys, self.values[:, :, live], self.scale, self._mask(plan), plan.causal, self.softcap)

    def _store(self, k: Tensor, v: Tensor, plan: StepPlan) -> None:
        if plan.slots is None:
            self.keys[:, :, plan.start : plan.stop] = k
            self.values[:, :, plan.start : plan.stop] = v
            return
        index = plan.slots[:, None, :, None].expand_as(k)
        self.keys.scatter_(2, index, k.to(self.keys.dtype))
        self.values.scatter_(2, index, v.to(self.values.dtype))

    def _mask(self, plan: StepPlan) -> Tensor | None:
        layer_plan = plan.step.layer_plan
        if layer_plan is None and self.absent is None:
            return plan.mask
        if self.absent is None:
            self.cache.skips = True
            self.absent = torch.zeros(self.keys.shape[0], self.keys.shape[2], dtype=torch.bool, device=self.keys.device)
        width = plan.step.positions.shape[1]
        skipped = (
            ~layer_plan[:, :, self.index].to(self.absent.device)
            if layer_plan is not None
            else self.absent.new_zeros(1, width).expand(self.absent.shape[0], -1)
        )
        if plan.slots is None:
            self.absent[:, plan.start : plan.stop] = skipped
        else:
            self.absent.scatter_(1, plan.slots, skipped)
        present = ~self.absent[:, None, None, plan.first : plan.stop]
        if plan.mask is not None:
            return plan.mask & present
        if plan.causal:
            raise AssertionError("a layer plan is always masked")
        return present

    def move(self, moves: Tensor) -> None:
        """Slot j of row b takes what slot moves[b, j] held."""
        index = moves[:, None, :, None].expand(-1, self.keys.shape[1], -1, self.keys.shape[3])
        width = moves.shape[1]
        self.keys[:, :, :width] = self.keys.gather(2, index)
        self.values[:, :, :width] = self.values.gather(2, index)
        if self.absent is not None:
            self.absent[:, :width] = self.absent.gather(1, moves)


class StoredCache:
    """A KVCache whose layers follow one or two slot maps: all tokens, or sinks and a window."""

    can_rollback = True

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        windows: Sequence[int | None],
        sinks: Sequence[int],
        renumber: bool = False,
    ):
        self.config, self.batch, self.device, self.dtype = config, batch, device, dtype
        self.renumbers = renumber  # positions never grow beyond the cache, so the text may
        kinds: dict[tuple[int | None, int], SlotMap] = {}
        for window, sink in zip(windows, sinks, strict=True):
            if (window, sink) not in kinds:
                kinds[window, sink] = SlotMap(batch, capacity, device, window, sink)
        self.maps = list(kinds.values())
        self.layers = [
            StoredLayer(self, index, kinds[kind], renumber)
            for index, kind in enumerate(zip(windows, sinks, strict=True))
        ]
        self.pools: list[Tensor] = []  # one a kind: [layers, 2 (keys, values), B, Hk, capacity, D]
        for slots in self.maps:
            members = sum(layer.slots is slots for layer in self.layers)
            shape = (members, 2, batch, config.kv_heads, slots.capacity, config.head_dim)
            self.pools.append(torch.zeros(shape, dtype=dtype, device=device))
        self._point_layers()
        self.skips = False  # some token skipped some layer
        self.committed = [0] * batch
        self._new = [0] * batch
        self._plans: dict[int, StepPlan] = {}
        self._step: Step | None = None

    @property
    def nbytes(self) -> int:
        return sum(pool.nbytes for pool in self.pools)

    @property
    def contiguous(self) -> bool:
        """Every layer keeps every token, in slots 0, 1, 2, …, of one pool: what the fast single-token paths need."""
        return len(self.maps) == 1 and self.maps[0].window is None and not (self.renumbers or self.skips)

    @property
    def max_step(self) -> int | None:
        """The most tokens one step may bring: bounded once a window makes room by evicting."""
        return SLACK if any(slots.evicts for slots in self.maps) else None

    @property
    def lengths(self) -> list[int]:
        return list(self.committed)

    @property
    def physical_lengths(self) -> list[int]:
        return [max(slots.counts[row] for slots in self.maps) for row in range(self.batch)]

    def positions(self, row: int, layer: int = 0) -> Tensor:
        slots = self.layers[layer].slots
        return slots.table[row, : slots.counts[row]].clone()

    def plan_for(self, slots: SlotMap, step: Step) -> StepPlan:
        """The step's plan for one kind of layer, made when the first of them asks."""
        if step is not self._step:
            self.begin(step)
        return self._plans[id(slots)]

    def begin(self, step: Step) -> None:
        batch, width = step.positions.shape
        self._new = list(step.lengths) if step.lengths is not None else [width] * batch
        for slots in self.maps:
            plan, moves = slots.plan(step, self._new, width)
            if moves is not None:
                self._move(slots, moves)
            self._plans[id(slots)] = plan
        self._step = step

    def commit(self, kept: Sequence[int] | Sequence[Sequence[int]]) -> None:
        for slots in self.maps:
            moves = slots.commit(kept)
            if moves is not None:
                self._move(slots, moves)
        for row, choice in enumerate(kept):
            self.committed[row] += choice if isinstance(choice, int) else len(choice)
        self._step = None

    def advance_one(self, position: int) -> int:
        """Commit one token of a single row that a fast path has stored itself; returns its slot."""
        slots = self.maps[0]
        slot = slots.counts[0]
        slots.table[0, slot] = position
        slots.counts[0] = slot + 1
        self.committed[0] += 1
        return slot

    def truncate(self, row: int, length: int) -> None:
        """Forget the tokens of `row` from position `length` on."""
        for slots in self.maps:
            slots.truncate(row, length)
        self.committed[row] = min(self.committed[row], length)
        self._step = None

    def reserve(self, tokens: int) -> None:
        """Grow every unbounded kind of layer to hold this many tokens a row."""
        for kind, slots in enumerate(self.maps):
            if slots.bounded(tokens) <= slots.capacity:
                continue
            extra = slots.bounded(max(tokens, slots.capacity * 5 // 4 + 64)) - slots.capacity
            slots.table = torch.nn.functional.pad(slots.table, (0, extra))
            slots.capacity += extra
            self.pools[kind] = torch.nn.functional.pad(self.pools[kind], (0, 0, 0, extra))
            for layer in self.layers:
                if layer.slots is slots and layer.absent is not None:
                    layer.absent = torch.nn.functional.pad(layer.absent, (0, extra))
        self._point_layers()

    def _point_layers(self) -> None:
        for slots, pool in zip(self.maps, self.pools, strict=True):
            members = [layer for layer in self.layers if layer.slots is slots]
            for layer, (keys, values) in zip(members, pool, strict=True):
                layer.keys, layer.values = keys, values

    def _move(self, slots: SlotMap, moves: Tensor) -> None:
        for layer in self.layers:
            if layer.slots is slots:
                layer.move(moves)
