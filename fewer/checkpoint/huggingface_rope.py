"""The rotary settings of a config.json, in the form of transformers 5 (`rope_parameters`) and the older one
(`rope_theta`, `rope_scaling`, `rope_local_base_freq`)."""

from __future__ import annotations

import math
from dataclasses import replace

from fewer.checkpoint.huggingface_fields import Fields
from fewer.errors import CheckpointError
from fewer.model.config import ModelConfig, RopeScaling

KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
FULL, SLIDING = "full_attention", "sliding_attention"


def with_rope(config: ModelConfig, fields: Fields, default_theta: float, local_theta: float | None) -> ModelConfig:
    """`config` with its rotary embedding. `local_theta` (Gemma 3): the default base of the windowed layers."""
    settings = fields.inner("rope_scaling") or fields.inner("rope_parameters") or Fields(fields.path, {})
    local = settings.inner(SLIDING) if local_theta is not None else None
    whole = settings.inner(FULL) or settings
    rotary_dim = _rotary_dim(config, fields, whole)
    if local is not None and _kind(local, config) != "default":
        raise CheckpointError(
            f"'{fields.path}': the windowed layers ask for the rope scaling '{_kind(local, config)}', and only layers "
            "with full attention may be scaled"
        )
    if local_theta is not None:
        local_theta = fields.number("rope_local_base_freq", local_theta, above=1.0)
        local_theta = local_theta if local is None else local.number("rope_theta", local_theta, above=1.0)
    return replace(
        config,
        rope_theta=whole.number("rope_theta", fields.number("rope_theta", default_theta, above=1.0), above=1.0),
        rope_scaling=_scaling(config, fields, whole, rotary_dim),
        rotary_dim=0 if rotary_dim == config.head_dim else rotary_dim,
        local_rope_theta=local_theta,
    )


def _rotary_dim(config: ModelConfig, fields: Fields, settings: Fields) -> int:
    key = "partial_rotary_factor"
    part = settings.number(key, fields.number(key, 1.0))
    rotary_dim = int(config.head_dim * part)
    if part > 1 or rotary_dim == 0 or rotary_dim % 2:
        raise CheckpointError(
            f"'{fields.path}': {part:g} of a head size of {config.head_dim} cannot be rotated in pairs; the product of "
            "head size and 'partial_rotary_factor' must be even and at most the head size"
        )
    return rotary_dim


def _kind(settings: Fields, config: ModelConfig) -> str:
    kind = settings.text("rope_type") or settings.text("type", "default")
    if config.architecture == "phi3" and kind in ("su", "yarn"):  # how early Phi-3 files call it
        return "longrope"
    if kind not in KINDS:
        raise CheckpointError(
            f"'{settings.path}': the rope scaling {kind[:40]!r} is unknown: allowed are {', '.join(KINDS)}"
        )
    return kind


def _scaling(config: ModelConfig, fields: Fields, settings: Fields, rotary_dim: int) -> RopeScaling | None:
    kind, context = _kind(settings, config), config.context_length
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", settings.number("factor"))
    if kind == "dynamic":  # acts beyond the context that the config names
        return RopeScaling("dynamic", settings.number("factor"), original_context=context)
    key = "original_max_position_embeddings"
    original = fields.count(key, settings.count(key, context, least=2), least=2)  # Phi-3 names it outside
    if kind == "llama3":
        low, high = settings.number("low_freq_factor"), settings.number("high_freq_factor")
        if low >= high:
            raise settings.fault("high_freq_factor", f"a number above the 'low_freq_factor' of {low:g}")
        return RopeScaling("llama3", settings.number("factor"), original, low, high)
    factor = settings.number("factor", context / original)
    if kind == "yarn":
        return RopeScaling(
            "yarn",
            factor,
            original,
            beta_fast=settings.number("beta_fast", 32.0),
            beta_slow=settings.number("beta_slow", 1.0),
            attention_factor=_yarn_magnitude(settings, factor),
            truncate=settings.flag("truncate", True),
        )
    magnitude = settings.number_or_none("attention_factor")
    if magnitude is None:
        magnitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    short, long = (settings.numbers(f"{which}_factor", rotary_dim // 2) for which in ("short", "long"))
    return RopeScaling("longrope", factor, original, attention_factor=magnitude, short_factor=short, long_factor=long)


def _yarn_magnitude(settings: Fields, factor: float) -> float | None:
    """The factor on cos and sin, None for the paper's 0.1·ln(factor) + 1; `mscale` bends the 0.1."""
    given, over, under = (settings.number_or_none(key) for key in ("attention_factor", "mscale", "mscale_all_dim"))
    if given is not None or over is None or under is None or factor <= 1:
        return given
    return (0.1 * over * math.log(factor) + 1) / (0.1 * under * math.log(factor) + 1)
