"""Our own folder, written by `fewer compress`: matrices in the engine's formats, loaded back bit for bit.

fewer.json          layout version, config, recipe, the format of every matrix, where the model came from
model.safetensors   `NAME/FIELD` for each field of a format, `NAME` for vectors
tokenizer.json …    as `Tokenizer.save` writes them
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fewer.checkpoint.canonical_shapes import canonical_shapes
from fewer.checkpoint.checkpoint import Checkpoint, StoredTensor, fingerprint_of
from fewer.checkpoint.safetensors_header import check_safetensors
from fewer.checkpoint.tokenizer import Tokenizer
from fewer.errors import CheckpointError
from fewer.formats import FORMATS, WeightFormat
from fewer.model.config import ExpertsConfig, ModelConfig, RopeScaling

VERSION = 1
DESCRIPTION = "fewer.json"
TENSORS = "model.safetensors"


class FewerTensor(StoredTensor):
    def __init__(self, name: str, kind: str, shape: tuple[int, ...], fields: Mapping[str, Tensor]):
        self.name, self.kind, self.shape, self.fields = name, kind, shape, fields

    @property
    def nbytes(self) -> int:
        return sum(field.nbytes for field in self.fields.values())

    def format(self) -> WeightFormat | None:
        """Raises CheckpointError where the fields do not make a matrix of this format and shape."""
        kind = FORMATS.get(self.kind)
        if kind is None:
            return None
        try:
            made = kind.from_state_dict(self.fields, torch.device("cpu"))
        except (KeyError, ValueError, RuntimeError, IndexError, TypeError) as fault:
            raise CheckpointError(
                f"'{self.name}' is damaged as {self.kind} ({fault}): compress the model again"
            ) from None
        if made.shape != self.shape:
            raise CheckpointError(
                f"'{self.name}' is stored as {list(made.shape)}, but described as {list(self.shape)}: compress the "
                "model again"
            )
        return made

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        stored = self.format()
        if stored is not None:
            return stored.dequantize(dtype)
        vector = self.fields.get("")
        if vector is None or tuple(vector.shape) != self.shape:
            raise CheckpointError(f"'{self.name}' is not stored as {list(self.shape)}: compress the model again")
        return vector.to(dtype)


class FewerCheckpoint(Checkpoint):
    """A folder with fewer.json. Raises CheckpointError where description and tensors disagree."""

    kind = "fewer"

    def __init__(self, folder: Path):
        self.path = folder
        try:
            description = json.loads((folder / DESCRIPTION).read_text())
            if description["version"] != VERSION:
                raise CheckpointError(
                    f"{folder / DESCRIPTION} has layout version {description['version']}, this fewer reads {VERSION}: "
                    "update fewer, or compress the model again"
                )
            self.config = config_from_json(description["config"])
            self.formats: dict[str, str] = dict(description["formats"])
            shapes = description["shapes"]
        except (OSError, ValueError, KeyError, TypeError) as fault:
            raise CheckpointError(f"{folder / DESCRIPTION} is damaged ({fault}): compress the model again") from None
        self.metadata = description
        check_safetensors(folder / TENSORS)
        self._file = safe_open(folder / TENSORS, framework="pt")
        present: dict[str, list[str]] = {}
        for key in self._file.keys():  # noqa: SIM118 - safe_open is no mapping
            name, _, field = key.partition("/")
            present.setdefault(name, []).append(field)
        for name, kind in self.formats.items():
            if name not in present or (kind != "vector" and kind not in FORMATS):
                raise CheckpointError(
                    f"{folder}: '{name}' should be stored as '{kind}' but is not: compress the model again"
                )
        self._fields = present
        self._shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self._check_shapes()

    def _check_shapes(self) -> None:
        """The config's tensors are there, in the config's shapes."""
        for name, shape in canonical_shapes(self.config).items():
            stored = self._shapes.get(name) if name in self.formats else None
            if stored != shape:
                found = "is missing" if stored is None else f"has the shape {list(stored)}"
                raise CheckpointError(
                    f"{self.path}: '{name}' {found}, but its config needs {list(shape)}: compress the model again"
                )

    def names(self) -> list[str]:
        return list(self.formats)

    def __contains__(self, name: object) -> bool:
        return name in self.formats

    def __getitem__(self, name: str) -> FewerTensor:
        if name not in self.formats:
            raise CheckpointError(f"{self.path} has no tensor '{name}'")
        fields = {f: self._file.get_tensor(f"{name}/{f}" if f else name) for f in self._fields[name]}
        return FewerTensor(name, self.formats[name], self._shapes[name], fields)

    def tokenizer(self) -> Tokenizer:
        from fewer.checkpoint.tokenizer_folder import read_tokenizer  # with the `tokenizers` library

        return read_tokenizer(self.path)

    def fingerprint(self) -> str:
        text = (self.path / DESCRIPTION).read_bytes()
        return fingerprint_of("fewer", text, (self.path / TENSORS).stat().st_size)


def config_from_json(values: Mapping[str, Any]) -> ModelConfig:
    """The inverse of `dataclasses.asdict` for ModelConfig: lists become tuples, nested mappings their dataclass."""
    return typing.cast(ModelConfig, _build(ModelConfig, values))


def _build(kind: type, values: Mapping[str, Any]) -> object:
    hints = typing.get_type_hints(kind)
    unknown = set(values) - set(hints)
    if unknown:
        raise ValueError(f"unknown config key {sorted(unknown)[0]!r}")
    built: dict[str, Any] = {}
    for key, value in values.items():
        nested = next((c for c in _options(hints[key]) if c in (RopeScaling, ExpertsConfig)), None)
        if nested is not None and value is not None:
            value = _build(nested, value)
        built[key] = tuple(value) if isinstance(value, list) else value
    return kind(**built)


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    return dataclasses.asdict(config)
