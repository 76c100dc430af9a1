"""Eviction by attention score: every key head keeps the keys that queries looked at, in storage of its own.

A prompt is attended to whole. Its end is known when the first generated step comes: then every key head keeps the keys
that rank highest, and the pool shrinks to them. From then on a step puts its key behind the kept ones, attends to all,
adds its row of probabilities to the scores, and the newest key takes the slot of the lowest. With `mode=stepwise` the
tokens of a prompt are treated likewise, one at a time. With S[h, q, k] the probabilities of query q, summed over the
query heads of key head h, n new queries change the scores by

    A[h, k] <- α^n·A[h, k] + Σ_q α^(n-1-q)·S[h, q, k]

Heads choose for themselves, but as many keys each, so that one rectangle [B, Hk, capacity, D] holds a layer. Keys stay
where they are: their order in memory means nothing once a slot has been taken over, and `held` says what a slot holds.
Layers with a sliding window of their own are bounded already and keep it.
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

NEVER = torch.iinfo(torch.int32).max


class ScoredCache(StoredCache):
    """Keys that stay by their scores. A method says how they rank (`importance`) and how queries weigh (`policy`)."""

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
        self.table = torch.arange(batch, dtype=torch.int32, device=device)[:, None]  # one page a row
        self.tail_length = 0 if policy.memory is None else policy.memory + (self.slack or 0)
        self.limits = [policy.limits(0) if policy.budget else None] * batch  # of each row: keys that stay, newest ones
        self.unscored = [0] * batch  # prompt tokens since keys were last chosen
        self.remembered = [0] * batch  # how many of their queries the tails hold
        self.complete_from = [0] * batch  # every token from this position on is held
        self.wanted = 0  # slots that the prompt under way will need

    @property
    def nbytes(self) -> int:
        tails = sum(layer.tail.nbytes for layer in self.scored if layer.tail is not None)
        return super().nbytes + self.scores.nbytes + self.held.nbytes + tails

    @property
    def max_step(self) -> int | None:
        return 1 if self.policy.mode == "stepwise" else super().max_step

    def positions(self, row: int, layer: int = 0, head: int = 0) -> Tensor:
        """Of the keys that one key head holds: [physical length] int64, ascending."""
        at = self.layers[layer]
        if not isinstance(at, ScoredLayer):
            return super().positions(row, layer)
        return self.held[at.order, row, head, : self.slots.counts[row]].long().sort().values

    # ── how keys rank ────────────────────────────────────────────────────────────────────────────────────────────────

    def importance(self, scores: Tensor, ages: Tensor) -> Tensor:
        """scores and ages (how many queries have seen the key) [.., Hk, S] -> [.., Hk, S]: the highest stay."""
        return scores

    def query_weights(self, distance: Tensor) -> Tensor:
        """Weight of the query that many tokens before the newest one of a prompt, float32."""
        return self.policy.decay ** distance.float()

    def evicts_after(self, step: Step) -> bool:
        """Whether the step is one token after which keys go."""
        return self.policy.while_generating and (step.role == "generated" or self.policy.mode == "stepwise")

    def weights_of(self, width: int) -> Tensor:
        """Of a prompt's new queries: [B, width] float32, 0 for padding."""
        distance = self.new[:, None] - 1 - torch.arange(width, device=self.device)
        return torch.where(distance >= 0, self.query_weights(distance.clamp(min=0)), 0.0)

    # ── a step ───────────────────────────────────────────────────────────────────────────────────────────────────────

    @torch.inference_mode(False)  # what one pass makes, others change
    def begin(self, step: Step) -> None:
        batch, width = step.positions.shape
        self._check(step, width)
        if step.role == "generated" and any(self.unscored):
            self._end_prompts()
        needed = max(self.slots.counts) + width
        if needed > self.slots.capacity:
            whole = step.role == "prompt" and self.policy.mode != "stepwise"
            self._resize(max(needed, self.wanted) if whole else self._grown(needed))
        super().begin(step)
        self.new = torch.tensor(self.slots.pending, device=self.device)
        counts = torch.tensor(self.slots.counts, device=self.device)
        self.seen = (counts + self.new).int()
        at = counts[:, None] + torch.arange(width, device=self.device)  # [B, T]
        self.query_positions = step.positions if self.keys_rotated else at
        index = at[:, None].expand(*self.held.shape[:3], width)
        self.held.scatter_(3, index, step.positions.int()[:, None].expand_as(index))
        if not self.keys_rotated:
            dead = torch.arange(self.slots.capacity, device=self.device) >= self.seen[:, None, None]
            self.ranks = self.held.masked_fill(dead, NEVER).argsort(-1).argsort(-1)

    @torch.inference_mode(False)  # what one pass makes, others change
    def commit(self, kept: Sequence[int | Sequence[int]]) -> None:
        step = self._step
        super().commit(kept)
        assert step is not None
        added = [choice if isinstance(choice, int) else len(choice) for choice in kept]
        if self.scored[0].received is not None:
            received = torch.stack([layer.received for layer in self.scored if layer.received is not None])
            self.scores *= self.policy.decay ** torch.tensor(added, device=self.device).float()[:, None, None]
            self.scores[..., : received.shape[3]] += received
        for layer in self.scored:
            layer.tail = layer.tail if layer.next_tail is None else layer.next_tail
            layer.next_tail = layer.received = None
        if self.evicts_after(step):
            self._evict_one()
        elif step.role == "prompt":
            self.unscored = [tokens + more for tokens, more in zip(self.unscored, added, strict=True)]
            self.remembered = [min(self.tail_length, n + more) for n, more in zip(self.remembered, added, strict=True)]

    @torch.inference_mode(False)  # what one pass makes, others change
    def truncate(self, row: int, length: int) -> None:
        """Forget the tokens of `row` from position `length` on. Raises FewerError where what was evicted would be
        missed, or the queries that have to choose."""
        removed = self.committed[row] - length
        if removed <= 0:
            return
        if length and not self._can_take_back(row, removed):
            raise FewerError(
                f"cache={self.policy.name} cannot go back to {length} tokens: what it evicted since is gone; start "
                "again at 0"
            )
        own = self.slots.counts[row] - removed if length else 0
        cuts = [own if slots is self.slots else slots.count_before(row, length) for slots in self.maps]
        for slots, stays in zip(self.maps, cuts, strict=True):
            self._clear(slots, row, stays, slots.counts[row])
            slots.counts[row] = stays
        self.scores[:, row, :, own:] = 0
        for layer in self.scored:
            if layer.tail is not None and removed < self.tail_length:
                layer.tail = layer.tail.clone()
                layer.tail[row] = layer.tail[row].roll(removed, 1)  # what comes round to the front is not counted
        self.unscored[row] = max(0, self.unscored[row] - removed)
        self.remembered[row] = max(0, self.remembered[row] - removed)
        if not length:
            self.limits[row] = self.policy.limits(0) if self.policy.budget else None
            self.complete_from[row] = 0
        self.committed[row], self._step = length, None

    def _can_take_back(self, row: int, removed: int) -> bool:
        if self.policy.while_generating or self.committed[row] - removed < self.complete_from[row]:
            return False
        choosing = min(self.policy.memory or 0, max(0, self.unscored[row] - removed))
        return self.remembered[row] - removed >= choosing or not choosing

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

    # ── eviction ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _ranking(self, scores: Tensor, held: Tensor, length: Tensor, recent: Tensor) -> Tensor:
        """Infinite for the newest tokens of a row; `length` and `recent` broadcast to [.., Hk, S]."""
        ages = length - held
        return self.importance(scores, ages).masked_fill(ages <= recent, torch.inf)

    def _evict_one(self) -> None:
        """In every row over its budget, the newest key takes the slot of the lowest one."""
        counts, limits = self.slots.counts, [limit or (NEVER, 0) for limit in self.limits]
        full = [count > budget for count, (budget, _) in zip(counts, limits, strict=True)]
        if not any(full):
            return
        recent = torch.tensor([recent for _, recent in limits], device=self.device)[:, None, None]
        length = torch.tensor(self.committed, device=self.device)[:, None, None]
        ranking = self._ranking(self.scores, self.held, length, recent)
        over, last = torch.tensor([full, [count - 1 for count in counts]], device=self.device)[:, :, None]  # [B, 1]
        last = last.clamp(min=0)
        if min(counts) < self.slots.capacity:
            slot = torch.arange(self.slots.capacity, device=self.device)
            ranking = ranking.masked_fill(slot > last[:, None], torch.inf)
        lowest = torch.where(over.bool(), ranking.argmin(-1), last)  # [L, B, Hk]
        newest = last.expand_as(lowest)[..., None]
        for state in (self.scores, self.held):
            state.scatter_(3, lowest[..., None], state.gather(3, newest))
        self.scores.scatter_(3, newest, self.scores.gather(3, newest) * (1 - over)[..., None])
        pool = self.pools[self.kind]  # [L, 2, B, Hk, capacity, D]
        shape = *pool.shape[:4], 1, pool.shape[5]
        moved = pool.gather(4, newest[:, None, :, :, :, None].expand(shape))
        pool.scatter_(4, lowest[:, None, :, :, None, None].expand(shape), moved)
        self.slots.counts = [min(count, budget) for count, (budget, _) in zip(counts, limits, strict=True)]

    def _end_prompts(self) -> None:
        """Score what the prompts left, choose the keys that stay, and shrink the pool to them."""
        for row, tokens in enumerate(self.unscored):
            self.limits[row] = self.limits[row] or self.policy.limits(self.committed[row])
            if tokens and self.policy.memory is not None:
                self._score_tail(row, tokens)
        for layer in self.scored:
            layer.tail = None
        self._compact()
        self.unscored, self.remembered = [0] * self.batch, [0] * self.batch

    def _score_tail(self, row: int, tokens: int) -> None:
        queries, count = min(self.remembered[row], self.policy.memory or 0), self.slots.counts[row]
        weights = self.query_weights(torch.arange(queries - 1, -1, -1, device=self.device))
        for layer in self.scored:
            scores = self.scores[layer.order, row]
            scores *= self.policy.decay**tokens
            scores[:, :count] += layer.tail_sums(row, queries, weights)

    def _compact(self) -> None:
        counts = self.slots.counts
        kept = [min(count, limit[0]) if limit else count for count, limit in zip(counts, self.limits, strict=True)]
        capacity = max(kept) + 1
        chosen = torch.zeros(*self.held.shape[:3], capacity, dtype=torch.int64, device=self.device)
        for row, (count, stay, limit) in enumerate(zip(counts, kept, self.limits, strict=True)):
            if stay == count:
                chosen[:, row, :, :stay] = torch.arange(stay, device=self.device)
                continue
            scores, held = self.scores[:, row, :, :count], self.held[:, row, :, :count]
            length, recent = torch.tensor([self.committed[row], limit[1] if limit else 0], device=self.device)
            best = self._ranking(scores, held, length, recent).topk(stay).indices
            chosen[:, row, :, :stay] = best.gather(2, held.gather(2, best).argsort(2))  # as they follow in the text
            self.complete_from[row] = self.committed[row] - int(recent)
        pool = self.pools[self.kind]
        index = chosen[:, None, :, :, :, None].expand(*pool.shape[:4], capacity, pool.shape[5])
        self.pools[self.kind] = pool.gather(4, index)
        live = torch.arange(capacity, device=self.device) < torch.tensor(kept, device=self.device)[:, None, None]
        self.scores, self.held = self.scores.gather(3, chosen) * live, self.held.gather(3, chosen)
        self.slots.counts, self.slots.capacity = kept, capacity
        self.slots.table = self.slots.table.new_zeros(self.batch, capacity)  # `held` says it for every head
        self._point_layers()

    # ── storage ──────────────────────────────────────────────────────────────────────────────────────────────────────

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
