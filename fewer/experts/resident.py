"""All experts stay in memory, in the format that the weights slot chose: the plain mixture of experts."""

from __future__ import annotations

from fewer.formats.base import WeightFormat
from fewer.model.config import ExpertsConfig
from fewer.model.experts import ResidentStore, TopKRouter
from fewer.model.feed_forward import FeedForward
from fewer.registry import method


@method("resident", slot="experts", lossless=True)
class ResidentExperts:
    """The network's own router and store, for every layer."""

    def router(self, matrix: WeightFormat, settings: ExpertsConfig) -> TopKRouter:
        return TopKRouter(matrix, settings)

    def store(self, experts: list[FeedForward]) -> ResidentStore:
        return ResidentStore(experts)
