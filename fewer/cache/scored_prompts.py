"""What prompts leave behind in a cache that evicts by scores, until their end is known and keys are chosen.

Either every chunk has summed the columns of its attention, or, where only the last queries count, the layers remember
those and the sums are taken once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewer.cache.eviction import Eviction
from fewer.cache.scored_storage import ScoredStorage
from fewer.model.config import ModelConfig


class ScoredPrompts(ScoredStorage):
    """The tokens of each row's prompt since keys were last chosen, and their last queries."""

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

    def weights_of(self, width: int) -> Tensor:
        """Of a prompt's new queries: [B, width] float32, 0 for padding."""
        distance = self.new[:, None] - 1 - torch.arange(width, device=self.device)
        return torch.where(distance >= 0, self.query_weights(distance.clamp(min=0)), 0.0)

    def _lengthen_prompts(self, added: Sequence[int]) -> None:
        """`added` tokens of each row were committed."""
        self.unscored = [tokens + more for tokens, more in zip(self.unscored, added, strict=True)]
        self.remembered = [min(self.tail_length, n + more) for n, more in zip(self.remembered, added, strict=True)]

    def _shorten_prompt(self, row: int, removed: int) -> None:
        """The last `removed` tokens of `row` were taken back."""
        for layer in self.scored:
            if layer.tail is not None and removed < self.tail_length:
                layer.tail = layer.tail.clone()
                layer.tail[row] = layer.tail[row].roll(removed, 1)  # what comes round to the front is not counted
        self.unscored[row] = max(0, self.unscored[row] - removed)
        self.remembered[row] = max(0, self.remembered[row] - removed)

    def _can_take_back(self, row: int, removed: int) -> bool:
        if self.policy.while_generating or self.committed[row] - removed < self.complete_from[row]:
            return False
        choosing = min(self.policy.memory or 0, max(0, self.unscored[row] - removed))
        return self.remembered[row] - removed >= choosing or not choosing

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
