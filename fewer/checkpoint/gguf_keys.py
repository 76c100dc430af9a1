"""Typed access to the metadata keys of one architecture: a value of the wrong kind is named, never passed on."""

from __future__ import annotations

import math
from pathlib import Path

from fewer.checkpoint.gguf_header import Metadata
from fewer.errors import CheckpointError

MAX_LAYERS = 4096


class Keys:
    """`{architecture}.{key}`, with the value that a missing key stands for. Raises `CheckpointError`."""

    def __init__(self, metadata: Metadata, path: Path, architecture: str):
        self.metadata, self.path, self.architecture = metadata, path, architecture

    def _fail(self, key: str, value: object, wanted: str) -> CheckpointError:
        state = "is missing" if value is None else f"is {str(value)[:60]!r}"
        return CheckpointError(f"'{self.path}': the metadata key '{key}' {state}, and {wanted} is needed")

    def get(self, key: str) -> object:
        name = f"{self.architecture}.{key}"
        length = self.metadata.array_length(name) or 0
        if length > MAX_LAYERS:  # decoding it would cost memory for nothing
            raise self._fail(name, f"an array of {length} items", f"one value, or one for each of {MAX_LAYERS} layers")
        return self.metadata.get(name)

    def number(self, key: str, default: float | None = None, least: float = 0.0) -> float:
        name, value = f"{self.architecture}.{key}", self.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < least:
            raise self._fail(name, value, f"a number of at least {least:g}")
        return float(value)

    def count(self, key: str, default: int | None = None, least: int = 1) -> int:
        name, value = f"{self.architecture}.{key}", self.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]  # one for each layer, all alike
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 1 << 31:
            raise self._fail(name, value, f"a whole number from {least} to {(1 << 31) - 1}")
        return value

    def token(self, name: str, vocab_size: int) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        value = self.metadata.scalar(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocab_size):
            raise self._fail(key, value, f"a token from 0 to {vocab_size - 1}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        return value if isinstance(value, bool) else default
