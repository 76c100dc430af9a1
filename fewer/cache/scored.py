"""Eviction by attention score: every key head keeps the keys that queries looked at, in storage of its own.

A prompt is attended to whole. Its end is known when the first generated step comes: then every key head keeps the keys
that rank highest, and the pool shrinks to them. From then on a step puts its key behind the kept ones, attends to all,
adds its row of probabilities to the scores, and the lowest key goes. With `mode=stepwise` the tokens of a prompt are
treated likewise, one at a time. With S[h, q, k] the probabilities of query q, summed over the query heads of key head
h, n new queries change the scores by

    A[h, k] <- α^n·A[h, k] + Σ_q α^(n-1-q)·S[h, q, k]

Of a prompt, either every chunk sums the columns of its attention, or, where only the last queries count, the layers
remember those and the sums are taken once. A method is a policy and, where scores do not rank yet, its `importance`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewer.cache.eviction import Eviction
from fewer.cache.scored_storage import ScoredStorage
from fewer.errors import FewerError, UsageError
from fewer.model.config import ModelConfig
from fewer.model.step import Step
from fewer.slots import Place, Placement

NEVER = torch.iinfo(torch.int32).max


class ScoredCache(ScoredStorage):
    """The steps. What one pass makes others change, so nothing here is made in inference mode."""

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        policy: Eviction,
    ):
        super().__init__(config, batch, capacity, dtype, device, policy)
        self.tail_length = 0 if policy.memory is None else policy.memory + (self.slack or 0)
        self.unscored = [0] * batch  # prompt tokens since keys were last chosen
        self.remembered = [0] * batch  # how many of their queries the tails hold
        self.places_prompts = policy.mode == "stepwise"
        self.placed: Step | None = None  # the step under way, if a fast path runs it
        self.weights: Tensor | None = None  # [layers, H, width] float32: the attention of a token that one has run
        self.unsettled = False  # it has not been acted on

    @property
    def max_step(self) -> int | None:
        return 1 if self.policy.mode == "stepwise" else super().max_step

    @property
    def physical_lengths(self) -> list[int]:
        lengths = super().physical_lengths
        late = self.unsettled and len(self.maps) == 1 and self._is_full(0)  # a key that is held, but is no longer seen
        return [lengths[0] - 1] if late else lengths

    def positions(self, row: int, layer: int = 0, head: int = 0) -> Tensor:
        self._settle()
        return super().positions(row, layer, head)

    def evicts_after(self, step: Step) -> bool:
        """Whether the step is one token after which keys go."""
        return self.policy.while_generating and (step.role == "generated" or self.policy.mode == "stepwise")

    def weights_of(self, width: int) -> Tensor:
        """Of a prompt's new queries: [B, width] float32, 0 for padding."""
        distance = self.new[:, None] - 1 - torch.arange(width, device=self.device)
        return torch.where(distance >= 0, self.query_weights(distance.clamp(min=0)), 0.0)

    # ── a step ───────────────────────────────────────────────────────────────────────────────────────────────────────

    @torch.inference_mode(False)
    def begin(self, step: Step) -> None:
        width = step.positions.shape[1]
        self._prepare(step, width, step.role == "prompt" and self.policy.mode != "stepwise")
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

    @torch.inference_mode(False)
    def commit(self, kept: Sequence[int | Sequence[int]]) -> None:
        step, self.placed = self._step or self.placed, None
        assert step is not None
        super().commit(kept)
        added = [choice if isinstance(choice, int) else len(choice) for choice in kept]
        received = self._received()
        if received is not None:
            self.scores *= self.policy.decay ** self._per_row(added).float()
            self.scores[..., : received.shape[3]] += received
        for layer in self.scored:
            layer.tail = layer.tail if layer.next_tail is None else layer.next_tail
            layer.next_tail = layer.received = None
        if self.evicts_after(step):
            self._evict_one()
        elif step.role == "prompt":
            self.unscored = [tokens + more for tokens, more in zip(self.unscored, added, strict=True)]
            self.remembered = [min(self.tail_length, n + more) for n, more in zip(self.remembered, added, strict=True)]

    def _prepare(self, step: Step | None, width: int, whole: bool) -> None:
        """Finish what came before a step of `width` tokens (`whole`: of a prompt that evicts at its end), and make room
        for it."""
        if step is not None:
            self._check(step, width)
        if self.placed is not None:  # given up
            self.placed, self.unsettled = None, False
        self._settle()
        if not whole and any(self.unscored):
            self._end_prompts()
        needed = max(self.slots.counts) + width
        if needed > self.slots.capacity:
            self._resize(max(needed, self.wanted) if whole else self._grown(needed))

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

    def _received(self) -> Tensor | None:
        """What the step that ends gave each slot: [L, B, Hk, S], or None where nobody looked."""
        if self.unsettled and self.weights is not None:
            self.unsettled = False
            shares = self.weights[:, None, :, : self.slots.counts[0]]
            shares = shares if len(self.maps) == 1 else shares[[layer.index for layer in self.scored]]
            return shares.unflatten(2, (self.config.kv_heads, -1)).sum(3)
        found = [layer.received for layer in self.scored if layer.received is not None]
        return torch.stack(found) if found else None

    # ── the end of a prompt ──────────────────────────────────────────────────────────────────────────────────────────

    def _end_prompts(self) -> None:
        """Score what the prompts left, choose the keys that stay, and shrink the pool to them."""
        for row, tokens in enumerate(self.unscored):
            self.limits[row] = self.limits[row] or self.policy.limits(self.committed[row])
            if tokens and self.policy.memory is not None:
                self._score_tail(row, tokens, min(self.remembered[row], self.policy.memory))
        for layer in self.scored:
            layer.tail = None
        self._compact()
        self.unscored, self.remembered = [0] * self.batch, [0] * self.batch

    def _score_tail(self, row: int, tokens: int, queries: int) -> None:
        count = self.slots.counts[row]
        weights = self.query_weights(torch.arange(queries - 1, -1, -1, device=self.device))
        for layer in self.scored:
            scores = self.scores[layer.order, row]
            scores *= self.policy.decay**tokens
            scores[:, :count] += layer.tail_sums(row, queries, weights)

    # ── steps of a fast path, which stores the keys itself and hands out the attention of a token when it is over ─────

    def can_place(self, tokens: int) -> bool:
        """Whether a single row's keys stand where they stood in the text; one token at a time where it evicts."""
        windows = [slots.window for slots in self.maps if slots.window is not None]
        most = 1 if self.policy.while_generating else min(windows, default=tokens)
        return self.batch == 1 and self.keys_rotated and tokens <= most

    @torch.inference_mode(False)
    def place_one(self, position: int) -> Placement:
        if self.unsettled and self.placed is None and len(self.maps) == 1 and self._is_full(0):
            return self._place_in_lowest(position)
        self._prepare(None, 1, whole=False)
        placement = super().place_one(position)
        self.held[:, 0, :, self.slots.counts[0] - 1] = position
        return self._with_weights(placement)

    @torch.inference_mode(False)
    def place(self, step: Step) -> Placement:
        width = step.positions.shape[1]
        self._prepare(step, width, whole=False)
        placement, self.placed = super().place(step), step
        start = self.slots.counts[0]
        self.held[:, 0, :, start : start + width] = step.positions.int()
        return self._with_weights(placement)

    def _place_in_lowest(self, position: int) -> Placement:
        """The new token gets the slots of the keys that the last one evicts: nothing is moved."""
        received, count = self._received(), self.slots.counts[0]
        assert received is not None
        self.scores *= self.policy.decay
        self.scores[..., :count] += received
        lowest = self._lowest()  # [L, 1, Hk]
        self.held.scatter_(3, lowest[..., None], position)
        self.scores.scatter_(3, lowest[..., None], 0.0)
        self.committed[0] += 1
        return self._with_weights(Placement([Place(count - 1, count, (0,))], slots=lowest[:, 0].int()))

    def _with_weights(self, placement: Placement) -> Placement:
        if not self.policy.while_generating:
            return placement
        width = -(-self.slots.capacity // 16) * 16
        if self.weights is None or self.weights.shape[2] != width:
            self.weights = torch.zeros(self.config.layers, self.config.heads, width)
        self.unsettled = True
        return placement._replace(weights=self.weights)

    @torch.inference_mode(False)
    def _settle(self) -> None:
        """Act on the attention of the token that a fast path ran last."""
        if self.unsettled and self.placed is None:
            received = self._received()
            assert received is not None
            self.scores *= self.policy.decay
            self.scores[..., : received.shape[3]] += received
            self._evict_one()

    # ── back ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    @torch.inference_mode(False)
    def truncate(self, row: int, length: int) -> None:
        """Forget the tokens of `row` from position `length` on. Raises FewerError where what was evicted would be
        missed, or the queries that have to choose."""
        removed = self.committed[row] - length
        if removed <= 0:
            return
        last_alone = self.unsettled and removed == 1  # it has evicted nothing yet
        if length and not last_alone and not self._can_take_back(row, removed):
            raise FewerError(
                f"cache={self.policy.name} cannot go back to {length} tokens: what it evicted since is gone; start "
                "again at 0"
            )
        self.unsettled = False
        if last_alone:
            self._fill((self.held == length).int().argmax(-1), [True])  # the last slot may hold an older key
            self.slots.counts[0] += 1
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
