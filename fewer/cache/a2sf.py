"""A2SF: keep the keys with the most attention, each past query counting less than the one after it.

Paper: A2SF: Accumulative Attention Scoring with Forgetting Factor for Token Pruning in Transformer Decoder, arXiv
2407.20485, equations 4 and 5. With S[h, q, k] the attention of query q to key k and n queries so far, key head h keeps
the `budget` keys of the largest

    A_n[h, k] = Σ_q α^(n-q)·S[h, q, k]

With α = 1 it is the sum of H2O, biased to old tokens because more queries have seen them; with α = 0 the last query
decides alone, for each head by itself.
Differs from the paper: the budget is a count of tokens unless `share` is set, and prompts are attended to whole before
anything goes unless `mode=stepwise`. Query heads that share a key head add their scores (the paper has none). Where α
is at most 0.56, queries that weigh less than 1e-16 of the newest are not scored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fewer.cache.eviction import Eviction, Mode, Positions, remembered_queries
from fewer.cache.scored_capture import CapturedScoredCache
from fewer.model.config import ModelConfig
from fewer.registry import method


@dataclass(frozen=True)
class A2sfConfig:
    budget: int = 256  # keys that stay for every key head; 0: `share` of the first prompt
    share: float = 0.0  # of the first prompt's tokens, instead of `budget`
    alpha: float = 0.2  # forgetting factor: what each new query leaves of the scores before it
    recent: int = 0  # newest tokens that stay whatever their score
    mode: Mode = "prefill-then-evict"  # or stepwise: prompt tokens evict, too, one at a time
    positions: Positions = "absolute"  # or cache: positions count the keys that are held

    def __post_init__(self) -> None:
        _ = self.policy  # checks the settings

    @property
    def policy(self) -> Eviction:
        return Eviction(
            "a2sf", self.budget, self.share, self.recent, decay=self.alpha, memory=remembered_queries(self.alpha),
            mode=self.mode, positions=self.positions,
        )  # fmt: skip


@method("a2sf", slot="cache", paper="2407.20485", lossless=False, config=A2sfConfig)
class A2sfCache(CapturedScoredCache):
    """`budget` keys for every key head, all of them chosen by their fading scores."""

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        settings: A2sfConfig = A2sfConfig(),
    ):
        super().__init__(config, batch, capacity, dtype, device, settings.policy)
