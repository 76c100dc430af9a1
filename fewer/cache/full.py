"""Full cache: every key and value stays, pre-allocated; layers with a sliding window keep only their window.

This is the uncompressed baseline. Layers of models that attend to a sliding window (Mistral, Gemma, Phi-3) store the
window and a little slack for rollback, whatever the length of the text.
"""

from __future__ import annotations

import torch

from fewer.cache.stored import StoredCache
from fewer.model.config import ModelConfig
from fewer.registry import method


@method("full", slot="cache", lossless=True)
class FullCache(StoredCache):
    """Pre-allocated keys and values of B rows of unequal lengths."""

    def __init__(self, config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device):
        windows = [config.sliding_window if config.is_sliding(layer) else None for layer in range(config.layers)]
        super().__init__(config, batch, capacity, dtype, device, windows, [0] * config.layers)
