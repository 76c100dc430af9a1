"""Best keys of every layer: each computes all its scores and attends to the highest; a bound for methods that guess.

Paper: none; the upper bound that TidalDecode, arXiv 2410.05076, and Quest, arXiv 2406.10774, compare with. Every layer
reads all keys to find its set, so nothing gets faster: what it saves is what a perfect guess would.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fewer.cache.every_layer import EveryLayerCache
from fewer.cache.selected import SelectedLayer, Selection, Sets, check_budget, check_start
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
    """Scores everything, and reads the best."""

    cache: OracleTopkCache

    def choose(self, q: Tensor, selection: Selection, mask: Tensor | None) -> Tensor:
        settings = self.cache.settings
        return self.best(self.scored(q, selection, mask)[1], selection, settings.budget, settings.sets)


@method("oracle-topk", slot="cache", lossless=False, config=OracleTopkConfig)
class OracleTopkCache(EveryLayerCache):
    """Every layer from `start` on attends to its own `budget` best tokens."""

    name = "oracle-topk"
    layer_type = OracleLayer
    settings: OracleTopkConfig
