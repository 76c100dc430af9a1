"""SnapKV: at a prompt's end, keep the keys that its last queries look at, and their neighbours; then keep what comes.

Paper: SnapKV: LLM Knows What You are Looking for Before Generation, arXiv 2404.14469. The queries of the last `window`
tokens vote; the votes for the keys before them are smoothed by pooling along the text, and every key head keeps the
window and the best others, `budget` together. Defaults are those of the released code, which pools by the mean.
Differs from the paper: query heads that share a key head vote together, so that a key is stored once a key head (the
released code chooses, and stores, for every query head).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from fewer.cache.eviction import Eviction
from fewer.cache.scored_capture import CapturedScoredCache
from fewer.errors import UsageError
from fewer.model.config import ModelConfig
from fewer.registry import method

SLACK = 16  # tokens that can be taken back: no more than the smallest window, which is held whole


@dataclass(frozen=True)
class SnapKVConfig:
    budget: int = 2048  # keys of a prompt that stay for every key head, the window included
    window: int = 32  # last tokens of the prompt, whose queries choose
    kernel: int = 5  # neighbours over which votes are pooled, an odd number
    pooling: Literal["mean", "max"] = "mean"  # how

    def __post_init__(self) -> None:
        if self.window < SLACK:
            raise UsageError(f"snapkv: window={self.window} is too small: use {SLACK} or more tokens")
        if self.budget <= self.window:
            raise UsageError(
                f"snapkv: budget={self.budget} leaves nothing beside a window of {self.window}: use a larger budget"
            )
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise UsageError(f"snapkv: kernel={self.kernel} has no middle: use an odd number, 1 for no pooling")


@method("snapkv", slot="cache", paper="2404.14469", lossless=False, config=SnapKVConfig)
class SnapKVCache(CapturedScoredCache):
    """`budget` keys of the prompt for every key head, and every generated token."""

    slack = SLACK

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        settings: SnapKVConfig = SnapKVConfig(),
    ):
        policy = Eviction(
            "snapkv", settings.budget, recent=settings.window, decay=0.0, memory=settings.window, while_generating=False
        )
        super().__init__(config, batch, capacity, dtype, device, policy)
        self.settings = settings

    def query_weights(self, distance: Tensor) -> Tensor:
        return torch.ones_like(distance, dtype=torch.float32)

    def importance(self, scores: Tensor, ages: Tensor) -> Tensor:
        """Only at a prompt's end, when slots are in the order of the text: scores [.., Hk, S], the window last."""
        window, kernel = self.settings.window, self.settings.kernel
        pool = avg_pool1d if self.settings.pooling == "mean" else max_pool1d
        votes = pool(scores[..., :-window], kernel, stride=1, padding=kernel // 2)
        return torch.cat((votes, scores[..., -window:]), -1)
