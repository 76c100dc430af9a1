"""Hydragen: what the prompts of a batch begin with in common is computed, stored and read once, not once a row.

Paper: Hydragen: High-Throughput LLM Inference with Shared Prefixes, arXiv 2402.05099.
Differs from the paper: the tree of prefixes is found by its tokens, groups are of any size, and a row may skip a level.
A row keeps the last token of its prompt to itself. A level that does not pay, by measured times, is still computed once
but copied into what branches off it. In bfloat16 and float16 what a row sees of its own text is rounded before parts
are merged.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from fewer.cache import prefix_capture
from fewer.cache.prefix_capture import OwnText
from fewer.cache.prefix_gate import split_cost
from fewer.cache.prefix_level import LevelKeys, PrefixLevel, Reading, Sight
from fewer.cache.prefix_tree import PrefixNode, prefix_levels, worthwhile
from fewer.cache.slot_map import StepPlan
from fewer.cache.stored import StoredCache, StoredLayer
from fewer.errors import FewerError, UsageError
from fewer.kernels.attention import merge
from fewer.kernels.attention_part import attention_part
from fewer.kernels.list_attention import attend_list
from fewer.model.config import ModelConfig
from fewer.model.rope import Rotary
from fewer.model.step import Step
from fewer.registry import method
from fewer.slots import Capture, KVCache


@dataclass(frozen=True)
class HydragenConfig:
    levels: int = 0  # most levels of shared prefixes, from the root; 0: as many as the prompts have
    shortest: int = 32  # tokens that rows must have in common to be computed once
    split: Literal["measured", "always"] = "measured"  # read a level once where that is faster as measured, or always

    def __post_init__(self) -> None:
        if self.levels < 0:
            raise UsageError(f"hydragen: levels={self.levels} is negative: use 1 or more, or 0 for any number")
        if self.shortest < 1:
            raise UsageError(f"hydragen: shortest={self.shortest} shares nothing: use 1 or more")


class HydragenLayer(StoredLayer):
    """One layer of rows that share prefixes: its own keys and values are those behind the prefixes."""

    cache: HydragenCache

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, rotary: Rotary | None, step: Step) -> Tensor:
        plan = self.cache.plan_for(self.slots, step)
        if rotary is not None:
            q, k = rotary.apply(q, step.positions), rotary.apply(k, step.positions)
        self._store(k, v, plan)
        parts = [self._own(q, plan), *self.cache.shared_parts(self, q, step)]
        return merge(parts)[0].to(q.dtype)

    def _own(self, q: Tensor, plan: StepPlan) -> tuple[Tensor, Tensor]:
        """The part of the row's own text (equation 2 of the paper: the suffix)."""
        mask = self._mask(plan)
        if self.cache.by_lengths and q.shape[2] == 1 and self.slots.window is None and self.absent is None:
            found = attend_list(
                q[:, :, 0],
                self.keys,
                self.values,
                self.cache.own.pages,
                None,
                None,
                "token",
                self.cache.own.lengths,
                self.scale,
                self.softcap,
            )
            return found.out[:, :, None], found.lse[..., None]
        seen = slice(plan.first, plan.stop)
        keys, values = self.keys[:, :, seen], self.values[:, :, seen]
        return attention_part(q, keys, values, self.scale, mask, plan.causal, self.softcap)


@dataclass
class Shared:
    """Prefixes of one level that are read once."""

    keys: list[LevelKeys]  # one a kind of layers
    nodes: list[PrefixNode]
    starts: list[int]  # where each prefix begins: before its node where the nodes above are folded into it


@method("hydragen", slot="cache", paper="2402.05099", lossless=True, config=HydragenConfig)
class HydragenCache(StoredCache):
    """Keys and values of B rows behind the prefixes that they share, and those prefixes. Without any it is `full`."""

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        settings: HydragenConfig = HydragenConfig(),
    ):
        self.settings, self.wanted = settings, capacity  # what a row needs of these is known once prompts are
        self.levels: list[PrefixLevel] = []
        windows = [config.sliding_window if config.is_sliding(layer) else None for layer in range(config.layers)]
        super().__init__(config, batch, capacity if batch == 1 else 1, dtype, device, windows, [0] * config.layers)
        self._readings: list[Reading] = []  # of the step under way, one a level
        self._sights: dict[tuple[int, int], list[Sight] | None] = {}  # of a level and a kind
        self.by_lengths = device.type == "cuda"  # one new token a row goes to a kernel that asks for the rows' lengths:
        self.own = OwnText(batch, device)

    @property
    def nbytes(self) -> int:
        return super().nbytes + sum(level.nbytes for level in self.levels)

    @property
    def starts(self) -> list[int]:
        """Tokens of each row that lie in shared prefixes. `physical_lengths` counts the slots behind them."""
        return self.maps[0].starts

    def positions(self, row: int, layer: int = 0) -> Tensor:
        kind = self.homes[layer][0]
        found = [(level, level.prefix_of(row)) for level in self.levels]
        shared = [
            torch.arange(level.keys[kind].firsts[prefix], level.stops[prefix], device=self.device)
            for level, prefix in found
            if prefix is not None
        ]
        return torch.cat([*shared, super().positions(row, layer)])

    # ── prefill: the tree, level by level ────────────────────────────────────────────────────────────────────────────

    def shared_runs(self, prompts: Sequence[Sequence[int]]) -> Generator[tuple[KVCache, list[list[int]]]]:
        """Rows that hold something already take no part. The caches' rows are the prefixes of one level each."""
        if self.batch == 1:
            return
        before = list(self.committed)
        texts = [None if held else prompt for held, prompt in zip(before, prompts, strict=True)]
        tree = prefix_levels(texts, self.settings.shortest, most=self.settings.levels)
        chosen = self._worthwhile(tree)
        shared: list[Shared] = []
        fed: dict[PrefixNode, tuple[HydragenCache, int]] = {}  # a cache and its row
        for nodes in tree:
            cache = HydragenCache(self.config, len(nodes), 1, self.dtype, self.device, self.settings)
            cache._adopt(shared, [node.rows[0] for node in nodes])
            cache._allocate(max(node.stop - start for node, start in zip(nodes, cache.starts, strict=True)))
            for row, node in enumerate(nodes):
                if node.parent is not None and node.parent not in chosen:
                    cache._inherit(row, *fed[node.parent])
            yield cast(KVCache, cache), [node.tokens for node in nodes]
            fed |= {node: (cache, row) for row, node in enumerate(nodes)}
            split = [row for row, node in enumerate(nodes) if node in chosen]
            if split:
                starts = [cache.starts[row] for row in split]
                shared.append(Shared(cache._as_level(split), [nodes[row] for row in split], starts))
        self._adopt(shared, range(self.batch))
        own = [held + len(text) - start for held, text, start in zip(before, prompts, self.starts, strict=True)]
        spare = 0 if any(before) else max(0, self.wanted - max(map(len, prompts)))  # for the answers
        self._allocate(max(own) + spare)
        deepest = {row: node for nodes in tree for node in nodes for row in node.rows}
        for row, last in deepest.items():
            if last not in chosen:
                self._inherit(row, *fed[last])

    def _worthwhile(self, tree: list[list[PrefixNode]]) -> set[PrefixNode]:
        if not tree or self.settings.split == "always":
            return {node for nodes in tree for node in nodes}
        config, on_cpu = self.config, self.device.type == "cpu"
        cost = split_cost(config.heads, config.kv_heads, config.head_dim, self.dtype, self.device)
        # One call serves a level's prefixes on a GPU, and each has its own on the CPU.
        return worthwhile(tree, lambda branches, tokens, nodes: cost.pays(branches, tokens, 1 if on_cpu else nodes))

    def _adopt(self, shared: Sequence[Shared], rows: Sequence[int]) -> None:
        """This cache's rows begin with the prefixes that `rows` of the batch share."""
        for each in shared:
            members = [[place for place, row in enumerate(rows) if row in node.rows] for node in each.nodes]
            stops = [node.stop for node in each.nodes]
            for places, stop in zip(members, stops, strict=True):
                for place in places:
                    self.committed[place] = stop
                    for slots in self.maps:
                        slots.starts[place] = stop
            if any(members):
                self.levels.append(PrefixLevel(each.keys, each.starts, stops, members))
        self._choose_layers()

    def _inherit(self, row: int, source: HydragenCache, index: int) -> None:
        """The empty `row` begins, behind what it shares, with a copy of all that row `index` of `source` holds."""
        for kind, (ours, theirs) in enumerate(zip(self.maps, source.maps, strict=True)):
            held = slice(theirs.counts[index])
            self.pools[kind][:, :, row, :, held] = source.pools[kind][:, :, index, :, held]
            ours.table[row, held] = theirs.table[index, held]
            ours.counts[row] = theirs.counts[index]
        self.committed[row] = source.committed[index]

    def _as_level(self, rows: list[int]) -> list[LevelKeys]:
        """What these rows hold themselves, to be shared from now on."""
        stops = [self.committed[row] for row in rows]
        return [
            LevelKeys.take(pool, rows, [slots.counts[row] for row in rows], stops, slots.window)
            for pool, slots in zip(self.pools, self.maps, strict=True)
        ]

    def _allocate(self, tokens: int) -> None:
        """Room for exactly this many tokens of each row's own; where rows have some already, as `reserve`."""
        if any(any(slots.counts) for slots in self.maps):
            self.reserve(tokens)
            return
        with torch.inference_mode(False):  # what a pass allocates is written outside of passes, too
            for kind, slots in enumerate(self.maps):
                slots.capacity = slots.bounded(tokens)
                slots.table = slots.table.new_zeros(self.batch, slots.capacity)
                layers, sides, batch, kv_heads, _, head_dim = self.pools[kind].shape
                self.pools[kind] = self.pools[kind].new_zeros(layers, sides, batch, kv_heads, slots.capacity, head_dim)
        self._point_layers()

    def _choose_layers(self) -> None:
        """Without shared prefixes the layers are those of `full`, which the fast paths of the engine know."""
        kind = HydragenLayer if self.levels else StoredLayer
        if any(type(layer) is not kind for layer in self.layers):
            before = self.layers
            self.layers = [kind(self, layer.index, layer.slots, False) for layer in before]
            for layer, old in zip(self.layers, before, strict=True):
                layer.absent = old.absent
            self._point_layers()

    # ── steps ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def begin(self, step: Step) -> None:
        super().begin(step)
        width = step.positions.shape[1]
        new = [width] * self.batch if step.lengths is None else step.lengths
        self._readings = [level.reading(new, width) for level in self.levels]
        self._sights = {}
        if self.levels and self.by_lengths:
            self.own.count([count + n for count, n in zip(self.maps[0].counts, new, strict=True)])

    def capture(self, step: Step) -> Capture | None:
        """One token a row behind shared prefixes. Rows that wait get one, too, which is not committed."""
        if not self.levels:
            return super().capture(step)
        slots = self.maps[0]
        if self.skips or len(self.maps) > 1 or slots.window is not None:
            return None
        self._drop_tentative()
        slots.place_each(step.positions)
        self._tentative, self._step = 1, None
        self.own.place(slots.counts, self.pools[0])
        return prefix_capture.capture(self.pools[0], self.own, self.levels)

    def shared_parts(self, layer: HydragenLayer, q: Tensor, step: Step) -> Iterator[tuple[Tensor, Tensor]]:
        """The parts of the levels, root first: q [B, H, T, D] -> (output [B, H, T, D], log-sum-exp [B, H, T])."""
        kind, member = self.homes[layer.index]
        for number, (level, reading) in enumerate(zip(self.levels, self._readings, strict=True)):
            if (number, kind) not in self._sights:
                self._sights[number, kind] = level.sights(kind, reading, step.positions)
            sights = self._sights[number, kind]
            part = level.attend(q, kind, member, reading, sights, layer.scale, layer.softcap)
            if part is not None:
                yield part

    def truncate(self, row: int, length: int) -> None:
        """As every cache; a row that goes back into a prefix leaves it with a copy of what it keeps."""
        start = self.starts[row]
        if length >= start:
            super().truncate(row, length)
            return
        left = [(level, prefix) for level in self.levels if (prefix := level.prefix_of(row)) is not None]
        left = [(level, prefix) for level, prefix in left if level.stops[prefix] > length]
        torn, prefix = left[0]  # the only one that begins before `length`, if any does
        begin = min(length, torn.starts[prefix])
        firsts = [max(begin, keys.firsts[prefix]) for keys in torn.keys]
        for keys, first in zip(torn.keys, firsts, strict=True):
            if begin < length and keys.window is not None and first > max(begin, length - keys.window + 1):
                raise FewerError(
                    f"cannot go back to {length} tokens, into a shared prefix of which the window's tokens before that "
                    "are no longer stored: go back less far or start again at 0"
                )
        super().truncate(row, start)
        self.reserve(length - begin)
        for kind, (slots, keys, first) in enumerate(zip(self.maps, torn.keys, firsts, strict=True)):
            slots.starts[row], slots.counts[row] = begin, max(0, length - first)
            if first < length:
                self.pools[kind][:, :, row, :, : length - first] = keys.span(prefix, first, length)
                slots.table[row, : length - first] = torch.arange(first, length, device=self.device)
        self.committed[row] = length
        for level, _ in left:
            level.leave(row)
        self.levels = [level for level in self.levels if any(level.members)]
        self._choose_layers()
