"""Tiny random transformers in memory, of any `ModelConfig`: what tests use where no checkpoint is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fewer.cache import FullCache
from fewer.engine.runner import Runner
from fewer.engine.session import Session
from fewer.formats import DenseFormat, WeightFormat
from fewer.model.config import ModelConfig
from fewer.model.transformer import Transformer
from fewer.slots import KVCache

CPU = torch.device("cpu")
CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=48,
    hidden_size=32,
    intermediate_size=64,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=8,
    context_length=256,
)


def config_of(**changes: Any) -> ModelConfig:
    return replace(CONFIG, **changes)


def random_weights(config: ModelConfig, seed: int = 0, spread: float = 2.0) -> Callable[[str], Tensor]:
    """A float32 tensor for each canonical name, the same for every call. `spread` scales logits away from uniform."""

    def tensor(name: str) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + sum(map(ord, name)) * 7919 + len(name))
        shape = shape_of(config, name)
        noise = torch.randn(shape, generator=generator)
        if "norm" in name:
            return 1 + 0.2 * noise
        if name.endswith(".bias"):
            return 0.2 * noise
        return noise if name == "embed.weight" else spread * noise / shape[-1] ** 0.5

    return tensor


def shape_of(config: ModelConfig, name: str) -> tuple[int, ...]:
    """The shape of a canonical tensor of a model of this config."""
    width, query, key = config.hidden_size, config.heads * config.head_dim, config.kv_heads * config.head_dim
    part, kind = name.split(".")[-2:]
    if name in ("embed.weight", "head.weight"):
        return config.vocab_size, width
    if part in ("q_norm", "k_norm"):
        whole = query if part == "q_norm" else key
        return (config.head_dim if config.qk_norm == "head" else whole,)
    if part.endswith("norm"):
        return (width,)
    inner = config.intermediate_size
    if config.experts is not None and ".experts." in name:
        inner = config.experts.intermediate_size
    if config.experts is not None and ".shared_expert." in name:
        inner = config.experts.shared_intermediate_size
    sizes = {
        "q": (query, width),
        "k": (key, width),
        "v": (key, width),
        "o": (width, query),
        "gate": (inner, width),
        "up": (inner, width),
        "down": (width, inner),
        "shared_expert_gate": (1, width),
        "router": (config.experts.count if config.experts else 0, width),
    }
    return sizes[part] if kind == "weight" else sizes[part][:1]


def random_transformer(
    config: ModelConfig = CONFIG,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    quantize: Callable[[str, Tensor], WeightFormat] | None = None,
    spread: float = 2.0,
) -> Transformer:
    """The same weights for the same config, seed and spread, dense in `dtype` unless `quantize` says otherwise."""
    weights = random_weights(config, seed, spread)

    def matrix(name: str) -> WeightFormat:
        return DenseFormat(weights(name).to(dtype)) if quantize is None else quantize(name, weights(name))

    return Transformer(config, matrix, weights, dtype, CPU)


def new_session(
    model: Transformer,
    batch: int = 1,
    make_cache: Callable[..., KVCache] = FullCache,
    *settings: object,
    context: int | None = None,
    runner: Runner | None = None,
) -> Session:
    """An empty session whose cache starts with room for 8 tokens, so that it has to grow."""
    cache = make_cache(model.config, batch, 8, model.dtype, CPU, *settings)
    return Session(runner or Runner(model), cache, context)


def random_tokens(count: int, seed: int = 0, vocab_size: int = CONFIG.vocab_size) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (count,), generator=generator).tolist()
