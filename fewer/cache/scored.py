"""Eviction by attention score: every key head keeps the keys that queries looked at, in storage of its own.

A prompt is attended to whole. Its end is known when the first generated step comes: then every key head keeps the keys
that rank highest, and the pool shrinks to them. From then on a step puts its key behind the kept ones, attends to all,
adds its row of probabilities to the scores, and the lowest key goes. With `mode=stepwise` the tokens of a prompt are
treated likewise, one at a time. With S[h, q, k] the probabilities of query q, summed over the query heads of key head
h, n new queries change the scores by

    A[h, k] <- α^n·A[h, k] + Σ_q α^(n-1-q)·S[h, q, k]

A method is a policy and, where scores do not rank yet, its `importance`.

A fast path hands out a token's attention when the token is over, so the cache acts on it, `unsettled` until then, when
the next one comes. That one takes the slot of the key that goes, so nothing is moved. The CPU's is here, CUDA's is in
`fewer.cache.scored_capture`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fewer.cache.eviction import Eviction
from fewer.cache.scored_prompts import ScoredPrompts
from fewer.errors import FewerError
from fewer.model.config import ModelConfig
from fewer.model.step import Step
from fewer.slots import Place, Placement

NEVER = torch.iinfo(torch.int32).max


class ScoredCache(ScoredPrompts):
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
        self.places_prompts = policy.mode == "stepwise"
        self.placed: Step | None = None  # the step under way, if a fast path runs it
        self.weights: Tensor | None = None  # [layers, H, width] float32: what the CPU's hands out
        # Reads what the last token, which a fast path ran, gave each slot: [L, B, Hk, S]. None: it was acted on.
        self.unsettled: Callable[[], Tensor] | None = None

    @property
    def max_step(self) -> int | None:
        return 1 if self.policy.mode == "stepwise" else super().max_step

    @property
    def physical_lengths(self) -> list[int]:
        lengths = super().physical_lengths
        if self.unsettled is None or len(self.maps) > 1:
            return lengths
        return [n - self._is_full(row) for row, n in enumerate(lengths)]  # one key is held, but is no longer seen

    def positions(self, row: int, layer: int = 0, head: int = 0) -> Tensor:
        self._settle()
        return super().positions(row, layer, head)

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
        added = counts_of(kept)
        received = self._received()
        if received is not None:
            self._add_to_scores(received, added)
        for layer in self.scored:
            layer.tail = layer.tail if layer.next_tail is None else layer.next_tail
            layer.next_tail = layer.received = None
        if self.evicts_after(step):
            self._evict_one()
        elif step.role == "prompt":
            self._lengthen_prompts(added)

    def _prepare(self, step: Step | None, width: int, whole: bool) -> None:
        """Finish what came before a step of `width` tokens (`whole`: of a prompt that evicts at its end), and make room
        for it."""
        if step is not None:
            self._check(step, width)
        self._give_up()
        self._settle()
        if not whole and any(self.unscored):
            self._end_prompts()
        needed = max(self.slots.counts) + width
        if needed > self.slots.capacity:
            self._resize(max(needed, self.wanted) if whole else self._grown(needed))

    def _received(self) -> Tensor | None:
        """What the step that ends gave each slot: [L, B, Hk, S], or None where nobody looked."""
        if self.unsettled is not None:
            read, self.unsettled = self.unsettled, None
            return read()
        found = [layer.received for layer in self.scored if layer.received is not None]
        return torch.stack(found) if found else None

    def _add_to_scores(self, received: Tensor, added: Sequence[int]) -> None:
        """`added` new queries of each row gave the slots what they `received`; what a row took back does not count."""
        if all(count == 1 for count in added):
            self.scores *= self.policy.decay
        else:
            queries = self._per_row(added)
            self.scores *= self.policy.decay ** queries.float()
            received = received * (queries > 0)
        self.scores[..., : received.shape[3]] += received

    @torch.inference_mode(False)
    def _settle(self) -> None:
        """Act on the attention of the token that a fast path ran last."""
        if self.unsettled is not None and self.placed is None:
            read, self.unsettled = self.unsettled, None
            self._add_to_scores(read(), [1] * self.batch)
            self._evict_one()

    def _give_up(self) -> None:
        """Forget a fast path's step that was not committed."""
        if self.placed is not None:
            self.placed, self.unsettled = None, None

    # ── the CPU's fast path, which stores the keys itself ────────────────────────────────────────────────────────────

    def can_place(self, tokens: int) -> bool:
        """Whether a single row's keys stand where they stood in the text; one token at a time where it evicts."""
        windows = [slots.window for slots in self.maps if slots.window is not None]
        most = 1 if self.policy.while_generating else min(windows, default=tokens)
        return self.batch == 1 and self.keys_rotated and tokens <= most

    @torch.inference_mode(False)
    def place_one(self, position: int) -> Placement:
        if self.unsettled is not None and self.placed is None and len(self.maps) == 1 and self._is_full(0):
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
        self._add_to_scores(received, [1])
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
        self.unsettled = self._handed_out
        return placement._replace(weights=self.weights)

    def _handed_out(self) -> Tensor:
        assert self.weights is not None
        shares = self.weights[:, None, :, : self.slots.counts[0]]
        shares = shares if len(self.maps) == 1 else shares[[layer.index for layer in self.scored]]
        return shares.unflatten(2, (self.config.kv_heads, -1)).sum(3)

    # ── back ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    @torch.inference_mode(False)
    def truncate(self, row: int, length: int) -> None:
        """Forget the tokens of `row` from position `length` on. Raises FewerError where what was evicted would be
        missed, or the queries that have to choose."""
        removed = self.committed[row] - length
        if removed <= 0:
            return
        last_alone = self.unsettled is not None and removed == 1  # it has evicted nothing yet
        if length and not last_alone and not self._can_take_back(row, removed):
            raise FewerError(
                f"cache={self.policy.name} cannot go back to {length} tokens: what it evicted since is gone; start "
                "again at 0"
            )
        self.unsettled = None
        if last_alone:
            self._fill((self.held == length).int().argmax(-1), [True])  # the last slot may hold an older key
            self.slots.counts[0] += 1
        own = self.slots.counts[row] - removed if length else 0
        cuts = [own if slots is self.slots else slots.count_before(row, length) for slots in self.maps]
        for slots, stays in zip(self.maps, cuts, strict=True):
            self._clear(slots, row, stays, slots.counts[row])
            slots.counts[row] = stays
        self.scores[:, row, :, own:] = 0
        self._shorten_prompt(row, removed)
        if not length:
            self.limits[row] = self.policy.limits(0) if self.policy.budget else None
            self.complete_from[row] = 0
        self.committed[row], self._step = length, None


def counts_of(kept: Sequence[int | Sequence[int]]) -> list[int]:
    """How many tokens of each row `commit` keeps."""
    return [choice if isinstance(choice, int) else len(choice) for choice in kept]
