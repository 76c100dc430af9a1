"""Bytes: what the weights take, what one decoding step reads, and how far the process has grown."""

from __future__ import annotations

import sys

from fewer.language_model import LanguageModel
from fewer.model.experts import Experts


def peak_rss() -> int:
    """The most memory this process has held so far, in bytes."""
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def weight_bytes_read(model: LanguageModel) -> int:
    """Bytes of weights that one token needs: all but the unread rows of the embedding and the experts not chosen."""
    transformer, config = model.transformer, model.config
    total = transformer.nbytes
    if transformer.head is not transformer.embed:
        total -= transformer.embed.nbytes
    if config.experts is not None and any(isinstance(layer.feed_forward, Experts) for layer in transformer.layers):
        idle = 1 - config.experts.per_token / config.experts.count
        experts = sum(fmt.nbytes for name, fmt in transformer.matrices() if ".experts." in name)
        total -= int(idle * experts)
    return total


def kv_bytes_read(model: LanguageModel, keys: float) -> int:
    """Bytes of keys and values that one token attends to when the cache holds `keys` of them."""
    config, size = model.config, model.transformer.dtype.itemsize
    window = config.sliding_window or keys
    held = sum(min(keys, window) if config.is_sliding(layer) else keys for layer in range(config.layers))
    return int(held / config.layers * config.kv_bytes_per_token(size))
