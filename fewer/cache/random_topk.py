"""Random keys: every layer attends to its newest token and others drawn by lot; what a selection must beat.

Paper: none; the lower bound that TidalDecode, arXiv 2410.05076, compares with. Sets depend on the seed, the layer and
the token's slot alone, so every run of a text draws the same ones.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from fewer.cache.every_layer import EveryLayerCache
from fewer.cache.selected import SelectedLayer, Selection, check_budget, check_start
from fewer.registry import method


@dataclass(frozen=True)
class RandomTopkConfig:
    budget: int = 256  # tokens that a query head attends to, the newest included
    start: int = 2  # first layers that read everything
    seed: int = 0  # of the draws

    def __post_init__(self) -> None:
        check_budget("random-topk", self.budget)
        check_start("random-topk", self.start)


class RandomLayer(SelectedLayer):
    """Reads what the lot says."""

    cache: RandomTopkCache

    def choose(self, q: Tensor, selection: Selection, mask: Tensor | None) -> Tensor:
        """The older tokens of every query head are drawn without replacement, by the query's position: a guess on a
        branch draws what it would draw in a row."""
        settings, heads = self.cache.settings, q.shape[1]
        slots = torch.full((len(selection.own), heads, settings.budget), -1, dtype=torch.int32)
        positions = selection.plan.step.positions.flatten().tolist()
        seen = None
        if mask is not None:
            seen = mask[:, 0].expand(q.shape[0], q.shape[2], -1).flatten(0, 1).cpu()  # [B·T, S]
        for query, (own, position) in enumerate(zip(selection.own.tolist(), positions, strict=True)):
            older = torch.arange(own) if seen is None else seen[query].nonzero()[:, 0]
            older = older[older != own]
            lot = random.Random(f"{settings.seed}/{self.index}/{position}").getrandbits(62)
            generator = torch.Generator().manual_seed(lot)
            drawn = min(settings.budget - 1, len(older))
            slots[query, :, :drawn] = older[
                torch.rand(heads, len(older), generator=generator).topk(drawn).indices
            ].int()
            slots[query, :, -1] = own
        return slots.to(q.device)


@method("random-topk", slot="cache", lossless=False, config=RandomTopkConfig)
class RandomTopkCache(EveryLayerCache):
    """Every layer from `start` on attends to `budget` tokens that say nothing about the query."""

    name = "random-topk"
    layer_type = RandomLayer
    settings: RandomTopkConfig
