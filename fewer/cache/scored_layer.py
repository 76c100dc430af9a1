"""One layer whose keys are scored by the attention that they receive: `fewer.cache.scored` says what becomes of it.

A layer never evicts by itself. A step leaves in it what the cache needs to do so for all layers at once: `received`,
the attention that each slot got from the step's queries, or the last queries of a prompt, `tail`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from fewer.cache.slot_map import SlotMap, StepPlan
from fewer.cache.stored import StoredLayer
from fewer.kernels.attention import attention
from fewer.kernels.causal import causal_attention, needs_no_mask
from fewer.kernels.list_attention import attend_list, probabilities
from fewer.kernels.tile_attention import EVERYTHING, Lambda, attend_tiles, column_sums
from fewer.model.rope import Rotary
from fewer.model.step import Step

if TYPE_CHECKING:
    from fewer.cache.scored import ScoredCache
    from fewer.cache.scored_storage import ScoredStorage


class ScoredLayer(StoredLayer):
    """Keys [B, Hk, capacity, D] of which slot s holds another token for every key head."""

    def __init__(self, cache: ScoredStorage, index: int, slots: SlotMap, order: int):
        super().__init__(cache, index, slots, renumber=False)
        self.owner: ScoredCache = cast("ScoredCache", cache)
        self.order = order  # its place among the scored layers
        self.rotary: Rotary | None = None
        self.received: Tensor | None = None  # [B, Hk, S] float32
        self.tail: Tensor | None = None  # [B, H, M, D] the prompt's last queries, turned; the newest is the last
        self.next_tail: Tensor | None = None  # the tail once the step is committed

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, rotary: Rotary | None, step: Step) -> Tensor:
        cache = self.owner
        plan = cache.plan_for(self.slots, step)
        self.rotary, self.received, self.next_tail = rotary, None, None
        if rotary is not None:
            q = rotary.apply(q, cache.query_positions)
            k = rotary.apply(k, step.positions) if cache.keys_rotated else k
        self._store(k, v, plan)
        keys = self.turned_keys()
        if cache.evicts_after(step):
            return self._attend_one(q, keys)
        if step.role == "prompt" and cache.policy.memory is None:
            return self._attend_and_score(q, keys, plan)
        live = keys[:, :, : plan.stop], self.values[:, :, : plan.stop]
        if step.role == "prompt":
            self.next_tail = self._longer_tail(q)
            if not plan.causal and step.mask == "causal" and needs_no_mask(q.device):  # rows that differ in length
                return attend_tiles(q, *live, self._start(plan), self._everything(q), self.scale, self.softcap)[0]
        return attention(q, *live, self.scale, plan.mask, plan.causal, self.softcap)

    def turned_keys(self) -> Tensor:
        """Keys as queries meet them [B, Hk, capacity, D]: turned to their places in the cache where those count."""
        if self.owner.keys_rotated or self.rotary is None:
            return self.keys
        ranks = self.owner.ranks[self.order]  # [B, Hk, capacity]
        factors = self.rotary.table(self.slots.capacity, ranks.device)[ranks]
        return self.rotary.rotate(self.keys, factors)

    def tail_sums(self, row: int, queries: int, weights: Tensor) -> Tensor:
        """What each slot of `row` got from the last `queries` of its prompt, each times its weight: [Hk, count]."""
        assert self.tail is not None
        count = self.slots.counts[row]
        q = self.tail[row, None, :, -queries:]
        keys, values = self.turned_keys()[row, None, :, :count], self.values[row, None, :, :count]
        start, rule = count - queries, self._everything(q)
        _, lse = attend_tiles(q, keys, values, start, rule, self.scale, self.softcap)
        return self._by_key_head(column_sums(q, keys, lse, weights, start, rule, self.scale, self.softcap))[0]

    def _attend_one(self, q: Tensor, keys: Tensor) -> Tensor:
        """One new token in each row."""
        cache = self.owner
        out, lse, logits = attend_list(
            q[:, :, 0], keys, self.values, cache.table, None, None, "token", cache.seen, self.scale, self.softcap, True
        )
        assert logits is not None
        received = self._by_key_head(probabilities(logits, lse))
        self.received = received if all(self.slots.pending) else received * cache.new[:, None, None]
        return out[:, :, None].to(q.dtype)

    def _attend_and_score(self, q: Tensor, keys: Tensor, plan: StepPlan) -> Tensor:
        """A chunk of a prompt of which every query counts: a second pass over its tiles sums the columns."""
        cache, rule, start = self.owner, self._everything(q), self._start(plan)
        keys, values = keys[:, :, : plan.stop], self.values[:, :, : plan.stop]
        if plan.causal and needs_no_mask(q.device):
            out, lse = causal_attention(q, keys, values, self.scale, self.softcap)
        else:
            out, lse = attend_tiles(q, keys, values, start, rule, self.scale, self.softcap)
        weights = cache.weights_of(q.shape[2])
        self.received = self._by_key_head(column_sums(q, keys, lse, weights, start, rule, self.scale, self.softcap))
        return out

    def _start(self, plan: StepPlan) -> int | Tensor:
        """Where the step's first query stands among its row's slots: [B] int32 where rows differ."""
        if plan.start is not None:
            return plan.start
        return torch.tensor(self.slots.counts, dtype=torch.int32, device=self.keys.device)

    def _longer_tail(self, q: Tensor) -> Tensor:
        """The tail with each row's new queries behind it and as many of the oldest gone."""
        length = self.owner.tail_length
        old = q.new_zeros(*q.shape[:2], length, q.shape[3]) if self.tail is None else self.tail
        joined = torch.cat((old, q), 2)
        index = self.owner.new[:, None] + torch.arange(length, device=q.device)  # [B, M]
        return joined.gather(2, index[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))

    def _by_key_head(self, shares: Tensor) -> Tensor:
        """[B, H, S] -> [B, Hk, S]: the query heads of a key head together."""
        return shares.unflatten(1, (self.keys.shape[1], -1)).sum(2)

    def _everything(self, q: Tensor) -> Lambda:
        heads = torch.zeros(q.shape[1], dtype=torch.int32, device=q.device)
        return Lambda(heads, heads + EVERYTHING)
