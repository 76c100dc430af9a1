"""Keys and values in pre-allocated tensors: the layer and the cache that `full` and `sink-window` share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewer.cache.slot_map import SLACK, SlotMap, StepPlan
from fewer.cache.window_capture import WindowPlaces
from fewer.kernels.attention import attend, attention, merge
from fewer.model.config import ModelConfig
from fewer.model.rope import Rotary
from fewer.model.step import Step
from fewer.slots import Capture, Layout, Place, Placement


class StoredLayer:
    """One layer's keys and values [B, Hk, capacity, D]; keys are rotated before they are stored."""

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
        unrotated = q
        if rotary is not None:
            q, k = rotary.apply(q, step.positions), rotary.apply(k, step.positions)
        self._store(k, v, plan)
        mask = self._mask(plan)
        if self.renumber and rotary is not None and self.slots.has_gap(plan):
            near = rotary.apply(unrotated, step.positions.clamp(max=self.slots.budget - 1))
            return self._attend_renumbered(q, near, plan, mask)
        window, causal = slice(plan.first, plan.stop), plan.causal and mask is None
        return attention(q, self.keys[:, :, window], self.values[:, :, window], self.scale, mask, causal, self.softcap)

    def skip(self, nothing: Tensor, step: Step) -> None:
        plan = self.cache.plan_for(self.slots, step)
        self._store(nothing, nothing, plan)
        self._mask(plan)

    def _attend_renumbered(self, q: Tensor, near: Tensor, plan: StepPlan, mask: Tensor | None) -> Tensor:
        """Positions count what a query sees: sinks at 0, 1, …, then its window, as if nothing lay between.

        Distances inside the window are those of the text, so its keys need no turning. Only the sinks come nearer: for
        them the query `near` stands at place sinks + window - 1 at most. The two parts are merged.
        """
        assert mask is not None  # there is a gap
        sinks = self.slots.sinks
        of_sink = self.slots.table[:, None, None, : plan.stop] < sinks  # [B, 1, 1, S]
        # The sinks have the first slots, except in the step that brings them: a tree may place siblings there.
        first, last = (sinks, sinks) if min(self.slots.counts) >= sinks else (0, plan.stop)
        parts = [
            (near, slice(0, last), mask & of_sink),
            (q, slice(first, plan.stop), mask & ~of_sink),
        ]
        return merge(
            [
                attend(query, self.keys[:, :, at], self.values[:, :, at], self.scale, seen[..., at], self.softcap)
                for query, at, seen in parts
            ]
        )[0]

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
            with torch.inference_mode(False):  # a commit outside a pass moves it, too
                self.absent = torch.zeros(*self.keys.shape[0:3:2], dtype=torch.bool, device=self.keys.device)
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
        if plan.causal and plan.start == 0:  # the text begins with this step, and nothing in it skips the layer
            return None
        present = ~self.absent[:, None, None, plan.first : plan.stop]
        return present if plan.visible is None else plan.visible & present

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

    slack: int | None = SLACK  # of any model; a cache without windows can take back everything
    keys_rotated = True
    places_prompts = True

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
        self.slack = None if all(window is None for window in windows) else SLACK
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
        self.homes = [  # of each layer: its kind, and its place among the layers of that kind
            (self.maps.index(layer.slots), sum(other.slots is layer.slots for other in self.layers[:index]))
            for index, layer in enumerate(self.layers)
        ]
        self.pools: list[Tensor] = []  # one a kind: [layers, 2 (keys, values), B, Hk, capacity, D]
        for slots in self.maps:
            members = sum(layer.slots is slots for layer in self.layers)
            shape = (members, 2, batch, config.kv_heads, slots.capacity, config.head_dim)
            self.pools.append(torch.zeros(shape, dtype=dtype, device=device))
        self._point_layers()
        self.skips = False  # some token skipped some layer
        self.committed = [0] * batch
        self._tentative = 0  # width of a step that is not committed yet
        self._plans: dict[int, StepPlan] = {}
        self._step: Step | None = None
        self._places: WindowPlaces | None = None  # of captured steps behind a window

    @property
    def nbytes(self) -> int:
        return sum(pool.nbytes for pool in self.pools)

    @property
    def is_plain(self) -> bool:
        """Whether a fast path may do without the layers: they attend to what they hold, and none was skipped."""
        return not self.renumbers and not self.skips and all(type(layer) is StoredLayer for layer in self.layers)

    @property
    def contiguous_room(self) -> int | None:
        """How many more tokens every row may take while each slot s holds position s and is visible: what the fast
        single-token paths need. None: any number."""
        slots = self.maps[0]
        if len(self.maps) > 1 or not self.is_plain or slots.counts != self.committed:
            return 0
        return None if slots.window is None else max(0, slots.window - max(slots.counts))

    @property
    def contiguous(self) -> bool:
        """Whether the next token may take a fast path."""
        return self.contiguous_room != 0

    def contiguous_capture(self) -> Capture:
        """On CUDA a layer over the contiguous pool is one kernel, which reads the lengths itself."""
        from fewer.kernels.triton.attention_decode import attend_new  # Triton is imported only where there is a GPU

        (pool,) = self.pools
        key = pool.data_ptr(), pool.shape, pool.dtype
        return Capture(key, lambda layer, new: attend_new(new, pool[layer, 0], pool[layer, 1]))

    def capture(self, step: Step) -> Capture | None:
        """The step placed, where `contiguous` holds or every layer has sinks and a window."""
        if self.contiguous:
            self.begin(step)
            return self.contiguous_capture()
        slots = self.maps[0]
        if len(self.maps) > 1 or slots.window is None or not self.is_plain or step.lengths is not None:
            return None
        self._drop_tentative()
        self._make_room(slots, 1)
        slots.place_each(step.positions)
        self._tentative, self._step = 1, None
        self._places = self._places or WindowPlaces(slots)
        return self._places.capture(self.pools[0])

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
        new = list(step.lengths) if step.lengths is not None else [width] * batch
        self._drop_tentative()
        self._tentative = width
        for slots in self.maps:
            plan, moves = slots.plan(step, new, width)
            if moves is not None:
                self._move(slots, moves)
            self._plans[id(slots)] = plan
        self._step = step

    def commit(self, kept: Sequence[int | Sequence[int]]) -> None:
        for slots in self.maps:
            moves = slots.commit(kept)
            if moves is not None:
                self._move(slots, moves)
        for row, choice in enumerate(kept):
            self.committed[row] += choice if isinstance(choice, int) else len(choice)
        self._step = None
        self._tentative = 0

    def advance_one(self, position: int) -> int:
        """Commit one token of a single row that a fast path has stored itself; returns its slot."""
        slots = self.maps[0]
        slot = slots.counts[0]
        slots.table[0, slot] = position
        slots.counts[0] = slot + 1
        self.committed[0] += 1
        return slot

    def can_place(self, tokens: int) -> bool:
        """Whether a single row's slots are its sinks and an unbroken run, and the next `tokens` see one another."""
        return (
            self.batch == 1
            and self.is_plain
            and all(slots.window is None or tokens <= slots.window for slots in self.maps)
        )

    def place_one(self, position: int) -> Placement:
        """Commit one token of the single row, which a fast path stores itself; a place for each kind of layer."""
        places = []
        for slots in self.maps:
            self._make_room(slots, 1)
            slot = slots.counts[0]
            slots.table[0, slot] = position
            slots.counts[0] = slot + 1
            first = 0 if slots.window is None else max(0, slot + 1 - slots.window)
            places.append(Place(slot, slot + 1, (first,), slots.sinks))
        self.committed[0] += 1
        return Placement(places)

    def place(self, step: Step) -> Placement:
        """The same for a step's tokens, which are tentative until `commit`."""
        self._drop_tentative()
        positions, places = step.positions[0].tolist(), []
        for slots in self.maps:
            self._make_room(slots, len(positions))
            slot = slots.reserve_row(step.positions)
            ahead = slot - self.committed[0] + 1  # from a position to the slot behind its own
            first = [0 if slots.window is None else max(0, at + ahead - slots.window) for at in positions]
            places.append(Place(slot, slot + len(positions), first, slots.sinks))
        self._tentative, self._step = len(positions), None
        return Placement(places)

    def truncate(self, row: int, length: int) -> None:
        """Forget the tokens of `row` from position `length` on. Raises FewerError where a window's tokens before it are
        gone."""
        cuts = [slots.count_before(row, length) for slots in self.maps]
        for slots, kept in zip(self.maps, cuts, strict=True):
            self._clear(slots, row, kept, slots.counts[row])
            slots.counts[row] = kept
        self.committed[row] = min(self.committed[row], length)
        self._step = None

    def _drop_tentative(self) -> None:
        """The last step failed or was given up."""
        if self._tentative:
            for slots in self.maps:
                for row, count in enumerate(slots.counts):
                    self._clear(slots, row, count, count + self._tentative)

    def _make_room(self, slots: SlotMap, tokens: int) -> None:
        moves = slots.make_room(tokens)
        if moves is not None:
            self._move(slots, moves)

    def _clear(self, slots: SlotMap, row: int, start: int, stop: int) -> None:
        """What was stored may not be finite, and a mask keeps no NaN out: 0·NaN is NaN."""
        self.pools[self.maps.index(slots)][:, :, row, :, start:stop] = 0

    def reserve(self, tokens: int) -> None:
        """Grow every unbounded kind of layer to hold this many tokens a row."""
        for slots in self.maps:
            self._reserve(slots, tokens)

    def _reserve(self, slots: SlotMap, tokens: int) -> None:
        """Grow one kind."""
        kind = self.maps.index(slots)
        if slots.bounded(tokens) <= slots.capacity:
            return
        extra = slots.bounded(max(tokens, slots.capacity * 5 // 4 + 64)) - slots.capacity
        slots.table = torch.nn.functional.pad(slots.table, (0, extra))
        slots.capacity += extra
        self.pools[kind] = torch.nn.functional.pad(self.pools[kind], (0, 0, 0, extra))
        for layer in self.layers:
            if layer.slots is slots and layer.absent is not None:
                layer.absent = torch.nn.functional.pad(layer.absent, (0, extra))
        self._point_layers()

    def _point_layers(self) -> None:
        """Layers and the layout look into the pools."""
        homes = torch.empty(len(self.layers), self.config.kv_heads, 2, dtype=torch.int64)
        for layer, (kind, member) in zip(self.layers, self.homes, strict=True):
            pool = self.pools[kind]
            layer.keys, layer.values = pool[member]
            homes[layer.index, :, 0] = kind
            homes[layer.index, :, 1] = member * pool.stride(0) + torch.arange(self.config.kv_heads) * pool.stride(3)
        self.layout = Layout([(pool[:, 0], pool[:, 1]) for pool in self.pools], homes)

    def _move(self, slots: SlotMap, moves: Tensor) -> None:
        for layer in self.layers:
            if layer.slots is slots:
                layer.move(moves)
