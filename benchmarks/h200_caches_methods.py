"""The caches that are measured, with the settings of their papers, and what each has to read in a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks import h200_caches_bytes as reads
from benchmarks.h200_caches_bytes import Shape
from benchmarks.h200_report import Results
from fewer import cache as caches
from fewer.cache.head_gates import GATES, random_gates
from fewer.cache.quantised_pages import Bits, RowLayout
from fewer.model.config import ModelConfig
from fewer.training import Adapter, Provenance

Make = Callable[[ModelConfig, int, int, torch.dtype, torch.device], Any]


@dataclass(frozen=True)
class Kind:
    """One cache with its settings."""

    make: Make
    read_bytes: Callable[[Shape, int], float]  # keys and values that a step at this context reads
    settings: Results
    interval: int = 1  # steps that one choice of pages serves


def shape_of(config: ModelConfig) -> Shape:
    return Shape(config.layers, config.heads, config.kv_heads, config.head_dim)


def half_streaming(config: ModelConfig) -> Adapter:
    """Gates by lot, of which exactly half are below the median: no model has learnt them, and time does not tell."""
    provenance = Provenance("duo-attention", {}, "random weights", "none", 0)
    return Adapter({GATES: random_gates(config)}, provenance)


def _kind(make: Any, settings: Any, read: Callable[[Shape, int], float], interval: int = 1, **extra: Any) -> Kind:
    """`make(…, settings)`, which every cache with settings takes."""
    known = {name: value for name, value in asdict(settings).items() if value is not None}
    return Kind(lambda *sizes: make(*sizes, settings, **extra), read, known, interval)


def dense() -> Kind:
    return Kind(caches.FullCache, reads.everything, {})


def duo_attention(config: ModelConfig, tiny: bool) -> Kind:
    settings = caches.DuoAttentionConfig(sinks=4, window=12) if tiny else caches.DuoAttentionConfig()
    kept = settings.sinks + settings.window

    def read(shape: Shape, context: int) -> float:
        return reads.split_heads(shape, context, settings.sparsity, kept)

    return _kind(caches.DuoAttentionCache, settings, read, adapter=half_streaming(config))


def lserve(config: ModelConfig, bits: Bits, tiny: bool) -> Kind:
    settings = caches.LServeConfig(bits=bits)
    if tiny:
        settings = caches.LServeConfig(
            sinks=4, window=8, prefill_window=20, budget=48, page_size=16, logical_size=4, interval=4, bits=bits
        )
    row_bytes = 2 * RowLayout(config.head_dim, bits, torch.bfloat16).width * (1 if bits != 16 else 2)
    lists = config.heads if settings.sets == "query-head" else config.kv_heads

    def read(shape: Shape, context: int) -> float:
        return reads.chosen_pages(
            shape, context, settings.sparsity, settings.sinks + settings.window, settings.budget, lists, row_bytes,
            settings.logical_size, settings.interval,
        )  # fmt: skip

    return _kind(caches.LServeCache, settings, read, settings.interval, adapter=half_streaming(config))


def tidal_decode(config: ModelConfig, budget: int) -> Kind:
    """Layers 0 and 1 read everything, 2 and 13 read everything and choose; a shallow model chooses again half way."""
    again = 13 if config.layers > 14 else max(3, config.layers // 2)
    settings = caches.TidalDecodeConfig(budget=budget, reselect=str(again))

    def read(shape: Shape, context: int) -> float:
        lists = shape.heads if settings.sets == "query-head" else shape.kv_heads
        return reads.chosen_tokens(shape, context, budget, settings.start + 2, lists)

    return _kind(caches.TidalDecodeCache, settings, read)


def quest(tiny: bool) -> Kind:
    settings = caches.QuestConfig(budget=32) if tiny else caches.QuestConfig()

    def read(shape: Shape, context: int) -> float:
        return reads.chosen_by_bounds(shape, context, settings.budget, settings.start, settings.page_size)

    return _kind(caches.QuestCache, settings, read)


def a2sf(budget: int) -> Kind:
    read = lambda shape, context: reads.kept_tokens(shape, context, budget)  # noqa: E731
    return _kind(caches.A2sfCache, caches.A2sfConfig(budget=budget), read)


def h2o(budget: int) -> Kind:
    read = lambda shape, context: reads.kept_tokens(shape, context, budget)  # noqa: E731
    return _kind(caches.H2OCache, caches.H2OConfig(budget=budget), read)


def sink_window(budget: int) -> Kind:
    """As many keys as an evicting cache of this budget holds."""
    read = lambda shape, context: reads.kept_tokens(shape, context, budget)  # noqa: E731
    return _kind(caches.SinkWindowCache, caches.SinkWindowConfig(sinks=4, window=budget - 4), read)
