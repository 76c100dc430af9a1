"""Add a method: a complete cache method in one file, registered, and compared with the full cache.

    python examples/add_a_method.py [MODEL]

One layer in `every` keeps the whole text, the others only a recent window. A real one lives in fewer/cache/.
"""

import sys
from dataclasses import dataclass

import torch

import fewer
from fewer.cache.stored import StoredCache
from fewer.errors import UsageError
from fewer.evaluation.divergence import divergence, reference
from fewer.model.config import ModelConfig
from fewer.registry import method


@dataclass(frozen=True)
class LayerWindowConfig:
    every: int = 3  # one layer in this many keeps everything
    window: int = 64  # most recent tokens that the other layers keep

    def __post_init__(self) -> None:
        if self.every < 1 or self.window < 1:
            raise UsageError(f"layer-window: every={self.every}, window={self.window}: use 1 or more for both")


@method("layer-window", slot="cache", lossless=False, config=LayerWindowConfig)
class LayerWindowCache(StoredCache):
    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        settings: LayerWindowConfig = LayerWindowConfig(),
    ):
        windows = [None if layer % settings.every == 0 else settings.window for layer in range(config.layers)]
        super().__init__(config, batch, capacity, dtype, device, windows, sinks=[0] * config.layers)


def main(model: str = "smollm2") -> None:
    full = fewer.load(model)
    text = reference(full, full.encode("Tell a long story about a lighthouse.", raw=True), max_tokens=100)
    for spec in ("full", "layer-window:every=1", "layer-window:window=32", "layer-window:window=8"):
        other = full.with_recipe(fewer.Recipe(cache=spec))
        found = divergence(other, text)
        print(f"{spec:24} KL {found.kl:.4f} nats a token, {found.agreement:.0%} of greedy tokens unchanged")


if __name__ == "__main__":
    main(*sys.argv[1:])
