"""The state of a run on disk: trained parameters, AdamW's moments, settings, history; in one safetensors file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewer.errors import CheckpointError
from fewer.training.tensor_file import read_tensors, write_tensors

KIND = "fewer.training_state"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of a parameter


def save_state(
    path: Path,
    trained: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    config: Any,
    data: str,
    history: Sequence[Any],
) -> None:
    """Write everything that continuing needs, atomically."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in trained.items():
        tensors[f"parameter/{name}"] = parameter
        for moment, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{moment}/{name}"] = value
    records = [dataclasses.asdict(record) for record in history]
    write_tensors(path, tensors, KIND, {"config": _plain(config), "data": data, "history": records})


def load_state(
    path: Path, trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, config: Any, data: str
) -> list[dict[str, Any]]:
    """Put parameters and moments back; returns the history. Raises CheckpointError when the file is of another run."""
    tensors, description = read_tensors(path, KIND)
    stored, wanted = description.get("config"), _plain(config)
    if not isinstance(stored, dict) or not isinstance(description.get("history"), list):
        raise CheckpointError(f"{path} is a damaged training state: remove it and start again")
    for key, value in wanted.items():
        if stored.get(key) != value:
            raise CheckpointError(
                f"{path} is of a run with {key}={stored.get(key)!r}, this one has {value!r}: use the same settings, or "
                "remove the file to start again"
            )
    if description.get("data") != data:
        raise CheckpointError(f"{path} is of a run on other data: give the same text and seed, or remove the file")
    _check_tensors(path, tensors, trained, bool(description["history"]))
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors[f"parameter/{name}"])
            moments = {key: tensors[f"{key}/{name}"] for key in MOMENTS if f"{key}/{name}" in tensors}
            if moments:  # the step count stays on the CPU, as AdamW has it
                on = {key: value if key == "step" else value.to(parameter.device) for key, value in moments.items()}
                optimizer.state[parameter] = on
    return list(description["history"])


def _check_tensors(path: Path, tensors: Mapping[str, Tensor], trained: Mapping[str, nn.Parameter], begun: bool) -> None:
    names = {key.partition("/")[2] for key in tensors}
    if names != set(trained):
        odd = sorted(names ^ set(trained))[0]
        raise CheckpointError(f"{path} does not fit: '{odd}' is trained in only one of the two runs")
    for name, parameter in trained.items():
        for key in ("parameter", *(MOMENTS if begun else ())):
            stored = tensors.get(f"{key}/{name}")
            shape, dtype = ((), torch.float32) if key == "step" else (parameter.shape, parameter.dtype)
            if stored is None or stored.shape != shape or stored.dtype != dtype:
                raise CheckpointError(
                    f"{path} does not fit: {key} of '{name}' is not {dtype} of shape {tuple(shape)}: remove the file"
                )


def _plain(config: Any) -> dict[str, Any]:
    """As it looks after a trip through JSON: tuples are lists."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return values
