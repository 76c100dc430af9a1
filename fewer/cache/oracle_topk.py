"""Best keys of every layer: each computes all its scores and attends to the highest; a bound for methods that guess.

Paper: none; the upper bound that TidalDecode, arXiv 2410.05076, and Quest, arXiv 2406.10774, compare with. Every layer
reads all keys to find its set, so nothing gets faster: what it saves is what a perfect guess would.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewer.cache.selected import SelectedCache, SelectedLayer, Selection, Sets, check_budget, check_start
from fewer.model.config import ModelConfig
from fewer.registry import method


@dataclass(frozen=True)
class OracleTopkConfig:
    budget: int = 256  # tokens that a query head attends to, the newest included
    start: int = 2  # first layers that read everything
    sets: Sets = "query-head"  # a set for each query head, or one for those of a key head together

    def __post_init__(self) -> None:
        check_budget("oracle-topk", self.budget)
        check_start("oracle-topk", self.start)


class OracleLayer(SelectedLayer):
    cache: OracleTopkCache

    def choose(self, q: Tensor, selection: Selection, mask: Tensor | None) -> Tensor:
        settings = self.cache.settings
        return self.best(self.scored(q, selection, mask)[1], selection, settings.budget, settings.sets)


@method("oracle-topk", slot="cache", lossless=False, config=OracleTopkConfig)
class OracleTopkCache(SelectedCache):
    """Every layer from `start` on attends to its own `budget` best tokens."""

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        settings: OracleTopkConfig = OracleTopkConfig(),
    ):
        self.settings = settings
        super().__init__(
            "oracle-topk",
            config,
            batch,
            capacity,
            dtype,
            device,
            settings.budget,
            lambda cache, index, slots: OracleLayer(cache, index, slots, False) if index >= settings.start else None,
        )
