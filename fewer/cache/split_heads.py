"""A cache whose layers' heads follow different rules: each rule has a pool, and each layer a part in some of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewer.cache.head_homes import HeadHomes
from fewer.cache.head_pool import HeadPool
from fewer.cache.slot_map import SlotMap, StepPlan
from fewer.kernels.attention import attention
from fewer.kernels.sink_window import BLOCK, sink_window_attention
from fewer.model.config import ModelConfig
from fewer.model.rope import Rotary
from fewer.model.step import Step
from fewer.slots import Capture, Layout, Placement


@dataclass(frozen=True, slots=True)
class Part:
    """Heads of one layer that lie in one pool."""

    pool: HeadPool
    span: slice  # of the pool's heads
    key_heads: Tensor | None  # [n] int64 of the layer's; None: all of them
    query_heads: Tensor | None  # [n·G] int64


class SplitLayer:
    """One layer: its parts attend for themselves, and their outputs go to the places of their heads."""

    def __init__(self, cache: SplitHeadCache, index: int, parts: list[Part]):
        self.cache, self.index, self.parts = cache, index, parts
        self.scale, self.softcap = cache.config.scale, cache.config.attention_softcap or 0.0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, rotary: Rotary | None, step: Step) -> Tensor:
        plans = self.cache.plans_for(step)
        if rotary is not None:
            q, k = rotary.apply(q, step.positions), rotary.apply(k, step.positions)
        if len(self.parts) == 1:
            return self._attend(self.parts[0], q, k, v, plans)
        out = torch.empty_like(q)
        for part in self.parts:
            queries, heads = part.query_heads, part.key_heads
            out[:, queries] = self._attend(part, q[:, queries], k[:, heads], v[:, heads], plans)
        return out

    def skip(self, nothing: Tensor, step: Step) -> None:
        for part in self.parts:
            plan = self.cache.plans_for(step)[part.pool]
            empty = nothing if part.key_heads is None else nothing[:, part.key_heads]
            part.pool.store(part.span, empty, empty, plan)
            part.pool.mask(self.index, plan)

    def _attend(self, part: Part, q: Tensor, k: Tensor, v: Tensor, plans: dict[HeadPool, StepPlan]) -> Tensor:
        pool, plan = part.pool, plans[part.pool]
        keys, values = pool.store(part.span, k, v, plan)
        if q.shape[2] > BLOCK and pool.is_plain_window(plan):
            slots = pool.slots  # live ones are the sinks and an unbroken run, so places among them serve as positions
            assert slots.window is not None and plan.start is not None
            return sink_window_attention(
                q, keys, values, plan.start, slots.sinks, slots.window, self.scale, self.softcap
            )
        if pool.is_plain_chunk(plan):
            keys, values = pool.before_chunk(keys, plan), pool.before_chunk(values, plan)
            return attention(q, keys, values, self.scale, None, True, self.softcap)
        mask = pool.mask(self.index, plan)
        return attention(q, keys, values, self.scale, mask, plan.causal and mask is None, self.softcap)


class SplitHeadCache:
    """A KVCache of B rows of unequal lengths, in pools."""

    keys_rotated = True
    renumbers = False
    places_prompts = True
    max_step: int | None = None

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
        rules: Sequence[tuple[SlotMap, Tensor]],
    ):
        """`rules`: slots and the heads [layers, Hk] bool that follow them; every head is in one of them."""
        self.config, self.device = config, device
        parts: list[list[Part]] = [[] for _ in range(config.layers)]
        self.pools: list[HeadPool] = []
        self._homes = torch.zeros(config.layers, config.kv_heads, 2, dtype=torch.int64)  # pool, and head of the pool
        for slots, members in rules:
            heads = int(members.sum())
            if heads:
                self._homes[members] = torch.stack((torch.full((heads,), len(self.pools)), torch.arange(heads)), dim=1)
                self.pools.append(HeadPool(slots, heads, config.head_dim, config.layers, dtype))
                _share_out(self.pools[-1], members, config.heads // config.kv_heads, parts)
        self.layers = [SplitLayer(self, index, own) for index, own in enumerate(parts)]
        self.committed = [0] * batch
        self._tentative = 0  # width of a step that is not committed yet
        self._step: Step | None = None
        self._plans: dict[HeadPool, StepPlan] = {}
        self._layout: tuple[list[Tensor], Layout] | None = None  # with the tensors that it looks into
        self._for_kernels: HeadHomes | None = None

    @property
    def nbytes(self) -> int:
        return sum(pool.nbytes for pool in self.pools)

    @property
    def lengths(self) -> list[int]:
        return list(self.committed)

    @property
    def physical_lengths(self) -> list[int]:
        return [max(pool.slots.counts[row] for pool in self.pools) for row in range(len(self.committed))]

    def positions(self, row: int, layer: int = 0) -> Tensor:
        """Of a layer with several parts: those of its first."""
        slots = self.layers[layer].parts[0].pool.slots
        return slots.table[row, : slots.counts[row]].clone()

    def plans_for(self, step: Step) -> dict[HeadPool, StepPlan]:
        """What each pool does in the step, made when the first layer asks."""
        if step is not self._step:
            self._abandon()
            width = step.positions.shape[1]
            new = list(step.lengths) if step.lengths is not None else [width] * len(self.committed)
            self._tentative = width
            self._plans = {pool: pool.begin(step, new, width) for pool in self.pools}
            self._step = step
        return self._plans

    def commit(self, kept: Sequence[int | Sequence[int]]) -> None:
        for pool in self.pools:
            pool.commit(kept)
        for row, choice in enumerate(kept):
            self.committed[row] += choice if isinstance(choice, int) else len(choice)
        self._tentative, self._step = 0, None

    def truncate(self, row: int, length: int) -> None:
        """Forget the tokens of `row` from position `length` on. Raises FewerError where a window's tokens before it are
        gone."""
        cuts = [pool.slots.count_before(row, length) for pool in self.pools]
        for pool, kept in zip(self.pools, cuts, strict=True):
            pool.cut(row, kept)
        self.committed[row] = min(self.committed[row], length)
        self._step = None

    def reserve(self, tokens: int) -> None:
        """Room for this many tokens a row, in the heads that keep them all."""
        for pool in self.pools:
            pool.reserve(tokens)

    def _abandon(self) -> None:
        """The last step failed or was given up."""
        if self._tentative:
            for pool in self.pools:
                pool.abandon(self._tentative)

    # ── CUDA's fast path ────────────────────────────────────────────────────────────────────────────────────────────

    def capture(self, step: Step) -> Capture | None:
        """Place a token in every row, where slots are sinks and unbroken runs. A layer is one kernel."""
        if step.lengths is not None or any(pool.absent is not None for pool in self.pools):
            return None
        self._abandon()
        places = [pool.place_each(step) for pool in self.pools]
        self._tentative, self._step = 1, None
        if self._for_kernels is None or not self._for_kernels.look_into(self.pools):
            self._for_kernels = HeadHomes(self.pools, self._homes)
        return self._for_kernels.capture(places)

    # ── the CPU's fast path: it reads where heads lie, and stores keys and values itself ────────────────────────────

    @property
    def layout(self) -> Layout:
        storages = [pool.storage for pool in self.pools]
        if self._layout is None or any(a is not b for a, b in zip(self._layout[0], storages, strict=True)):
            steps = torch.tensor([storage.stride(2) for storage in storages])  # from a head to the next
            homes = self._homes.clone()
            homes[..., 1] *= steps[homes[..., 0]]
            self._layout = storages, Layout([(storage[0], storage[1]) for storage in storages], homes)
        return self._layout[1]

    def can_place(self, tokens: int) -> bool:
        """Whether a single row's slots are sinks and unbroken runs, and the next `tokens` see one another."""
        windows = [pool.slots.window for pool in self.pools]
        return (
            len(self.committed) == 1
            and all(pool.absent is None for pool in self.pools)
            and all(window is None or tokens <= window for window in windows)
        )

    def place_one(self, position: int) -> Placement:
        """Commit one token of the single row; a place in each pool."""
        places = [pool.place_one(position) for pool in self.pools]
        self.committed[0] += 1
        return Placement(places)

    def place(self, step: Step) -> Placement:
        """The same for a step's tokens, which are tentative until `commit`."""
        self._abandon()
        places = [pool.place(step, self.committed[0]) for pool in self.pools]
        self._tentative, self._step = step.positions.shape[1], None
        return Placement(places)


def _share_out(pool: HeadPool, members: Tensor, group: int, parts: list[list[Part]]) -> None:
    """Give every layer's heads among `members` [layers, Hk] their span of the pool."""
    first = 0
    for of_layer, own in zip(members, parts, strict=True):
        heads = of_layer.nonzero()[:, 0]
        if not len(heads):
            continue
        span = slice(first, first + len(heads))
        first = span.stop
        if len(heads) == len(of_layer):
            own.append(Part(pool, span, None, None))
            continue
        queries = (heads[:, None] * group + torch.arange(group)).flatten()
        device = pool.storage.device
        own.append(Part(pool, span, heads.to(device), queries.to(device)))
