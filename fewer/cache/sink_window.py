"""Sink-and-window attention: keep the first tokens and the most recent ones, drop the rest.

Paper: Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453.
Differs from the paper: positions are renumbered inside the cache only when `renumber` is set (the paper always does);
without it keys keep the positions they had in the text, and the context length still bounds the text. Each token sees
the sinks and its own window, however the text is cut into steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fewer.cache.stored import StoredCache
from fewer.errors import UsageError
from fewer.model.config import ModelConfig
from fewer.registry import method


@dataclass(frozen=True)
class SinkWindowConfig:
    sinks: int = 4  # first tokens that are always kept
    window: int = 1020  # most recent tokens that are kept, the current one included
    renumber: bool = False  # positions count the sinks and the window, not the text between them

    def __post_init__(self) -> None:
        if self.sinks < 0:
            raise UsageError(f"sink-window: sinks={self.sinks} is negative: use 0 or more")
        if self.window < 1:
            raise UsageError(f"sink-window: window={self.window} keeps nothing: use 1 or more")


@method("sink-window", slot="cache", paper="2309.17453", lossless=False, config=SinkWindowConfig)
class SinkWindowCache(StoredCache):
    """Room for `sinks + window` tokens and some slack a layer: memory and time per token stay flat."""

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        settings: SinkWindowConfig = SinkWindowConfig(),
    ):
        windows: list[int | None] = []
        sinks = []
        for layer in range(config.layers):
            own = config.sliding_window if config.is_sliding(layer) else None
            narrower = own is not None and own <= settings.window  # the model's own window is the smaller: it rules
            windows.append(own if narrower else settings.window)
            sinks.append(0 if narrower else settings.sinks)
        super().__init__(config, batch, capacity, dtype, device, windows, sinks, settings.renumber)
