"""TOVA: keep the keys that the newest query attends to most, the same tokens for all heads of a layer.

Paper: Transformers are Multi-State RNNs, arXiv 2401.06104 (Token Omission Via Attention). A layer drops the token with
the smallest mean over heads of S[h, n, k], the row of the newest query alone: nothing is summed, nothing is protected.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fewer.cache.eviction import Eviction, Mode
from fewer.cache.scored_capture import CapturedScoredCache
from fewer.model.config import ModelConfig
from fewer.registry import method


@dataclass(frozen=True)
class TovaConfig:
    budget: int = 512  # tokens that stay in every layer
    mode: Mode = "prefill-then-evict"  # or stepwise: prompt tokens evict, too, one at a time

    def __post_init__(self) -> None:
        _ = self.policy  # checks the settings

    @property
    def policy(self) -> Eviction:
        return Eviction("tova", self.budget, decay=0.0, memory=1, mode=self.mode, together=True)


@method("tova", slot="cache", paper="2401.06104", lossless=False, config=TovaConfig)
class TovaCache(CapturedScoredCache):
    """`budget` tokens a layer, chosen anew with every query among those that are left."""

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        settings: TovaConfig = TovaConfig(),
    ):
        super().__init__(config, batch, capacity, dtype, device, settings.policy)
