"""H2O: keep the keys with the most attention summed over all queries, and the most recent ones.

Paper: H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models, arXiv 2306.14048. Key
head h keeps its newest keys and, of the others, those of the largest Σ_q S[h, q, k]; half of the budget each.
Differs from the paper: the budget is a count of tokens unless `share` is set (the paper's is 0.2 of the prompt), and
prompts are attended to whole before anything goes unless `mode=stepwise`. The sums are of one row, where the released
code adds up a batch, and query heads that share a key head add theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fewer.cache.eviction import Eviction, Mode, Positions
from fewer.cache.scored_capture import CapturedScoredCache
from fewer.errors import UsageError
from fewer.model.config import ModelConfig
from fewer.registry import method


@dataclass(frozen=True)
class H2OConfig:
    budget: int = 256  # keys that stay for every key head, the recent ones included; 0: `share` of the first prompt
    share: float = 0.0  # of the first prompt's tokens, instead of `budget`
    recent: float = 0.5  # part of the budget that the newest tokens have
    mode: Mode = "prefill-then-evict"  # or stepwise: prompt tokens evict, too, one at a time
    positions: Positions = "absolute"  # or cache: positions count the keys that are held

    def __post_init__(self) -> None:
        if not 0 <= self.recent <= 1:
            raise UsageError(f"h2o: recent={self.recent} is not a part of the budget: use 0 to 1")
        _ = self.policy  # checks the other settings

    @property
    def policy(self) -> Eviction:
        return Eviction(
            "h2o", self.budget, self.share, recent_part=self.recent, mode=self.mode, positions=self.positions
        )


@method("h2o", slot="cache", paper="2306.14048", lossless=False, config=H2OConfig)
class H2OCache(CapturedScoredCache):
    """Heavy hitters and recent tokens, for every key head."""

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        settings: H2OConfig = H2OConfig(),
    ):
        super().__init__(config, batch, capacity, dtype, device, settings.policy)
