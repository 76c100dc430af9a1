"""Adapters: what a method has fitted, as one small safetensors file that says where it came from."""

from __future__ import annotations

import dataclasses
import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fewer
from fewer.errors import CheckpointError, UsageError
from fewer.training.tensor_file import read_tensors, write_tensors

KIND = "fewer.adapter"
VERSION = 1


def versions() -> dict[str, str]:
    """What an adapter is fitted with on this machine."""
    return {"fewer": fewer.__version__, "torch": torch.__version__, "python": platform.python_version()}


@dataclass(frozen=True)
class Provenance:
    """Where an adapter came from: enough to fit it again, and to refuse it elsewhere."""

    method: str  # the registered name, such as "duo-attention"
    config: Mapping[str, Any]  # the settings it was fitted with
    model: str  # Checkpoint.fingerprint() of the model it was fitted to
    data: str  # fingerprint of the tokens it was fitted on
    seed: int
    metrics: Mapping[str, float] = field(default_factory=dict)  # measured on held-out text
    versions: Mapping[str, str] = field(default_factory=versions)


@dataclass(frozen=True)
class Adapter:
    tensors: Mapping[str, Tensor]
    provenance: Provenance


def save_adapter(path: Path, adapter: Adapter) -> int:
    """Write the adapter atomically; returns its bytes. Raises UsageError, FewerError."""
    for name, value in adapter.provenance.metrics.items():
        if not math.isfinite(value):
            raise UsageError(f"the adapter's metric '{name}' is {value}: fit it again before saving it")
    if not adapter.tensors:
        raise UsageError("the adapter holds no tensors: fit it before saving it")
    write_tensors(path, adapter.tensors, KIND, {"version": VERSION, **dataclasses.asdict(adapter.provenance)})
    return path.stat().st_size


def load_adapter(path: Path, method: str | None = None, model: str | None = None) -> Adapter:
    """Read an adapter of `method`, fitted to the model of this fingerprint. Raises CheckpointError."""
    tensors, description = read_tensors(path, KIND)
    version = description.pop("version", None)
    if version != VERSION:
        raise CheckpointError(
            f"{path} has adapter version {version!r}, this fewer reads {VERSION}: update fewer or refit"
        )
    provenance = _provenance(path, description)
    if method is not None and provenance.method != method:
        raise CheckpointError(
            f"{path} is an adapter of the method '{provenance.method}', not of '{method}': give one fitted for that"
        )
    if model is not None and provenance.model != model:
        raise CheckpointError(
            f"{path} was fitted to another model (fingerprint {provenance.model[:12]}…, this one has {model[:12]}…): "
            "give the model it belongs to, or fit it again"
        )
    return Adapter(tensors, provenance)


_KINDS: dict[str, type] = {
    "method": str,
    "config": dict,
    "model": str,
    "data": str,
    "seed": int,
    "metrics": dict,
    "versions": dict,
}


def _provenance(path: Path, description: Mapping[str, Any]) -> Provenance:
    for key, kind in _KINDS.items():
        if not isinstance(description.get(key), kind):
            raise CheckpointError(f"{path} is a damaged adapter ('{key}' is missing or wrong): fit or fetch it again")
    if set(description) - set(_KINDS):
        unknown = sorted(set(description) - set(_KINDS))[0]
        raise CheckpointError(f"{path} is a damaged adapter (unknown key '{unknown[:40]}'): fit or fetch it again")
    return Provenance(**{key: description[key] for key in _KINDS})
