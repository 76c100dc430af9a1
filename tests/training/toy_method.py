"""A method that learns something, small enough for tests: a gain on hidden channels, whose mean widens a window.

Registered by `register`, in a registry that the test puts back.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from fewer import registry
from fewer.cache.stored import StoredCache
from fewer.errors import UsageError
from fewer.model.config import ModelConfig
from fewer.model.step import Step
from fewer.training import (
    Adapter,
    FittedModel,
    TokenBlocks,
    TrainerConfig,
    TrainingRun,
    TrainingText,
    next_token_loss,
)

NAME = "toy-gain"
WINDOW = 8


@dataclass(frozen=True)
class ToyConfig:
    adapter: str | None = None  # file of a fitted gain; none: the one for the model


@dataclass(frozen=True)
class ToyFitConfig:
    steps: int = 6
    learning_rate: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(f"{NAME}: steps={self.steps} is not allowed: use 1 or more")


def fit_gain(model: FittedModel, data: TrainingText, config: ToyFitConfig, run: TrainingRun) -> Adapter:
    tokens = model.tokenizer.encode(data.text)[:2000]
    blocks = TokenBlocks.from_tokens(tokens, block=16, batch_size=4, seed=config.seed)
    gain = nn.Parameter(torch.ones(model.config.hidden_size))

    def loss(batch: Tensor) -> Tensor:
        places = torch.arange(batch.shape[1]).expand_as(batch).contiguous()
        output = model.runner.step(Step(batch, places, logits="all"), model.new_cache(*batch.shape))
        assert output.hidden is not None
        scaled = (output.hidden.clone() * gain).to(model.transformer.dtype)
        return next_token_loss(model.transformer.logits(scaled), batch)  # the gradient goes through the head

    settings = TrainerConfig(config.steps, config.learning_rate, seed=config.seed)
    history = run.train({"gain": gain}, loss, blocks, settings)
    return run.adapter({"gain": gain}, {"loss_before": history[0].loss, "loss_after": history[-1].loss})


class ToyCache(StoredCache):
    """A window of `WINDOW` tokens times the mean gain."""

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        settings: ToyConfig = ToyConfig(),
        *,
        adapter: Adapter,
    ):
        window = max(1, round(WINDOW * float(adapter.tensors["gain"].mean())))
        super().__init__(config, batch, capacity, dtype, device, [window] * config.layers, [0] * config.layers)


def register(monkeypatch: pytest.MonkeyPatch) -> registry.Method:
    monkeypatch.setattr(registry, "_METHODS", {(entry.slot, entry.name): entry for entry in registry.methods()})
    registry.method(NAME, slot="cache", lossless=False, config=ToyConfig, fit=fit_gain, fit_config=ToyFitConfig)(
        ToyCache
    )
    return registry.find("cache", NAME)
