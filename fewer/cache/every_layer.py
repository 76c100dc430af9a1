"""Caches whose every layer, from one on, makes a selection of its own: the bounds that guessing methods are held to."""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch

from fewer.cache.selected import SelectedCache, SelectedLayer
from fewer.model.config import ModelConfig


class EveryLayerSettings(Protocol):
    @property
    def budget(self) -> int: ...  # tokens that a query head attends to

    @property
    def start(self) -> int: ...  # first layers that read everything


class EveryLayerCache(SelectedCache):
    """Layers from `start` on are of `layer_type`."""

    name: ClassVar[str]
    layer_type: ClassVar[type[SelectedLayer]]

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        settings: EveryLayerSettings,
    ):
        self.settings = settings
        super().__init__(
            self.name,
            config,
            batch,
            capacity,
            dtype,
            device,
            settings.budget,
            lambda cache, index, slots: (
                self.layer_type(cache, index, slots, False) if index >= settings.start else None
            ),
        )
