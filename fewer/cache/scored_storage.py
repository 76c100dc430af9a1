"""What every key head holds by its scores, and how keys leave: one for each token, or all but the best at once.

Heads choose for themselves, but as many keys each, so that one rectangle [B, Hk, capacity, D] holds a layer. Live slots
of a row are 0..count-1. Their order means nothing once a key has taken the slot of another: `held` says whose it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewer.cache.eviction import Eviction
from fewer.cache.scored_layer import ScoredLayer
from fewer.cache.slot_map import SlotMap
from fewer.cache.stored import StoredCache
from fewer.errors import FewerError, UsageError
from fewer.model.config import ModelConfig
from fewer.model.step import Step


class ScoredStorage(StoredCache):
    """Keys, values, scores and positions of the layers that see the whole text; the others are those of `full`."""

    slack: int | None = 0  # what was evicted for a token does not come back with it

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        policy: Eviction,
    ):
        windows = [config.sliding_window if config.is_sliding(layer) else None for layer in range(config.layers)]
        if None not in windows:
            raise UsageError(
                f"cache={policy.name} evicts in layers that see the whole text, but each layer of this model keeps a "
                f"window of {config.sliding_window} tokens already: use cache=full"
            )
        super().__init__(config, batch, 0, dtype, device, windows, [0] * config.layers)  # room is made by the step
        self.policy = policy
        self.slack, self.keys_rotated = type(self).slack, policy.positions == "absolute"
        self.renumbers = not self.keys_rotated
        self.slots: SlotMap = next(slots for slots in self.maps if slots.window is None)
        self.kind = self.maps.index(self.slots)
        self.scored: list[ScoredLayer] = []
        for index, layer in enumerate(self.layers):
            if layer.slots is self.slots:
                self.scored.append(ScoredLayer(self, index, self.slots, len(self.scored)))
                self.layers[index] = self.scored[-1]
        self._point_layers()
        shape = len(self.scored), batch, config.kv_heads, 0
        self.scores = torch.zeros(shape, device=device)  # [L, B, Hk, capacity] float32: A, 0 where nothing is held
        self.held = torch.zeros(shape, dtype=torch.int32, device=device)  # position of the token in each slot
        self.ranks = torch.zeros(shape, dtype=torch.int64, device=device)  # its place in the cache, if places count
        self.limits = [policy.limits(0) if policy.budget else None] * batch  # of each row: keys that stay, newest ones
        self.complete_from = [0] * batch  # every token from this position on is held
        self.wanted = 0  # slots that the prompt under way will need
        self.new = self.seen = self.query_positions = torch.empty(0)  # of a step [B], [B], [B, T]
        self.table = torch.arange(batch, dtype=torch.int32, device=device)[:, None]  # one page a row

    @property
    def nbytes(self) -> int:
        tails = sum(layer.tail.nbytes for layer in self.scored if layer.tail is not None)
        return super().nbytes + self.scores.nbytes + self.held.nbytes + tails

    def positions(self, row: int, layer: int = 0, head: int = 0) -> Tensor:
        """Of the keys that one key head holds: [physical length] int64, ascending."""
        at = self.layers[layer]
        if not isinstance(at, ScoredLayer):
            return super().positions(row, layer)
        return self.held[at.order, row, head, : self.slots.counts[row]].long().sort().values

    # ── which steps there are ────────────────────────────────────────────────────────────────────────────────────────

    def evicts_after(self, step: Step) -> bool:
        """Whether the step is one token after which keys go."""
        return self.policy.while_generating and (step.role == "generated" or self.policy.mode == "stepwise")

    def _check(self, step: Step, width: int) -> None:
        name = self.policy.name
        if step.layer_plan is not None:
            raise FewerError(f"cache={name} keeps as many keys in every layer, so no token may skip a layer")
        if step.mask == "bidirectional":
            raise FewerError(f"cache={name} scores keys by causal attention and cannot read a text both ways")
        if width > 1 and self.evicts_after(step):
            raise FewerError(f"cache={name} evicts after every token, so a step of {width} is too long: feed one")
        if self.renumbers and step.role == "prompt" and max(self.slots.counts) + width > self.config.context_length:
            raise UsageError(
                f"a prompt beyond the context of {self.config.context_length} tokens cannot be attended to whole: use "
                f"cache={name}:positions=cache,mode=stepwise"
            )

    # ── how keys rank ────────────────────────────────────────────────────────────────────────────────────────────────

    def importance(self, scores: Tensor, ages: Tensor) -> Tensor:
        """scores and ages (how many queries have seen the key) [.., Hk, S] -> [.., Hk, S]: the highest stay."""
        return scores.mean(-2, keepdim=True).expand_as(scores) if self.policy.together else scores

    def query_weights(self, distance: Tensor) -> Tensor:
        """Weight of the query that many tokens before the newest one of a prompt, float32."""
        return self.policy.decay ** distance.float()

    def _ranking(self, scores: Tensor, held: Tensor, length: Tensor | int, recent: Tensor | int) -> Tensor:
        """Infinite for the newest tokens of a row; `length` and `recent` broadcast to [.., Hk, S]."""
        ages = length - held
        ranking = self.importance(scores, ages)
        return ranking if isinstance(recent, int) and not recent else ranking.masked_fill(ages <= recent, torch.inf)

    def _lowest(self) -> Tensor:
        """The slot that ranks lowest among those in use: [L, B, Hk]."""
        counts, limits = self.slots.counts, [limit[1] if limit else 0 for limit in self.limits]
        if self.batch == 1:
            ranking = self._ranking(self.scores, self.held, self.committed[0], limits[0])
        else:
            length, recent = torch.tensor([self.committed, limits], device=self.device)[..., None, None]
            ranking = self._ranking(self.scores, self.held, length, recent)
        if min(counts) < self.slots.capacity:
            unused = torch.arange(self.slots.capacity, device=self.device) >= self._per_row(counts)
            ranking = ranking.masked_fill(unused, torch.inf)
        return ranking.argmin(-1)

    def _per_row(self, values: Sequence[int]) -> Tensor:
        """[B, 1, 1]"""
        return torch.tensor(values, device=self.device)[:, None, None]

    # ── one key goes ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _is_full(self, row: int) -> bool:
        limit = self.limits[row]
        return limit is not None and self.slots.counts[row] > limit[0]

    def _evict_one(self) -> None:
        """In every row over its budget, the lowest key goes."""
        full = [self._is_full(row) for row in range(self.batch)]
        if any(full):
            self._fill(self._lowest(), full)

    def _fill(self, holes: Tensor, rows: Sequence[bool]) -> None:
        """In `rows`, the key of the last slot takes the slot holes[l, b, h], whose own is gone."""
        ends = [max(0, count - 1) for count in self.slots.counts]
        chosen, last = torch.tensor([list(map(int, rows)), ends], device=self.device)[:, :, None]  # [B, 1]
        holes = torch.where(chosen.bool(), holes, last)
        source = last.expand_as(holes)[..., None]
        for state in (self.scores, self.held):
            state.scatter_(3, holes[..., None], state.gather(3, source))
        self.scores.scatter_(3, source, self.scores.gather(3, source) * (1 - chosen)[..., None])
        pool = self.pools[self.kind]  # [L, 2, B, Hk, capacity, D]
        shape = *pool.shape[:4], 1, pool.shape[5]
        moved = pool.gather(4, source[:, None, :, :, :, None].expand(shape))
        pool.scatter_(4, holes[:, None, :, :, None, None].expand(shape), moved)
        self.slots.counts = [count - row for count, row in zip(self.slots.counts, rows, strict=True)]

    # ── all but the best go ──────────────────────────────────────────────────────────────────────────────────────────

    def _compact(self) -> None:
        """Every row keeps the best keys of its budget, in the order of the text, and the pool shrinks to the most."""
        counts = self.slots.counts
        limits = [limit or (count, 0) for count, limit in zip(counts, self.limits, strict=True)]
        kept = [min(count, budget) for count, (budget, _) in zip(counts, limits, strict=True)]
        capacity = max(kept) + 1
        chosen = torch.zeros(*self.held.shape[:3], capacity, dtype=torch.int64, device=self.device)
        for row, (count, stay, (_, recent)) in enumerate(zip(counts, kept, limits, strict=True)):
            if stay == count:
                chosen[:, row, :, :stay] = torch.arange(stay, device=self.device)
                continue
            scores, held = self.scores[:, row, :, :count], self.held[:, row, :, :count]
            best = self._ranking(scores, held, self.committed[row], recent).topk(stay).indices  # [L, Hk, stay]
            chosen[:, row, :, :stay] = best.gather(2, held.gather(2, best).argsort(2))
            self.complete_from[row] = self.committed[row] - recent
        pool = self.pools[self.kind]
        index = chosen[:, None, :, :, :, None].expand(*pool.shape[:4], capacity, pool.shape[5])
        self.pools[self.kind] = pool.gather(4, index)
        live = torch.arange(capacity, device=self.device) < self._per_row(kept)
        self.scores, self.held = self.scores.gather(3, chosen) * live, self.held.gather(3, chosen)
        self.slots.counts, self.slots.capacity = kept, capacity
        self.slots.table = self.slots.table.new_zeros(self.batch, capacity)  # `held` says it for every head
        self._point_layers()

    # ── room ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _reserve(self, slots: SlotMap, tokens: int) -> None:
        """The scored layers get their room when a step begins, because a generated one shrinks them first."""
        if slots is self.slots:
            self.wanted = tokens
        else:
            super()._reserve(slots, tokens)

    def _grown(self, needed: int) -> int:
        """Capacity for generated tokens: a quarter more, but not more than the largest budget and the newest key."""
        grown = max(needed, self.slots.capacity * 5 // 4 + 64)
        budgets = [limit[0] for limit in self.limits if limit is not None]
        if self.policy.while_generating and len(budgets) == self.batch:
            return max(needed, min(grown, max(budgets) + 1))
        return grown

    def _resize(self, capacity: int) -> None:
        extra, pad = capacity - self.slots.capacity, torch.nn.functional.pad
        self.pools[self.kind] = pad(self.pools[self.kind], (0, 0, 0, extra))
        self.scores, self.held = pad(self.scores, (0, extra)), pad(self.held, (0, extra))
        self.slots.table, self.slots.capacity = pad(self.slots.table, (0, extra)), capacity
        self._point_layers()

    def _move(self, slots: SlotMap, moves: Tensor) -> None:
        super()._move(slots, moves)
        if slots is self.slots:
            index = moves[:, None].expand(*self.held.shape[:3], -1)
            self.held[..., : moves.shape[1]] = self.held.gather(3, index)
