"""Typed access to a config.json: a field that is missing, ill-typed or absurd is named in one sentence."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewer.errors import CheckpointError

MAX_JSON_BYTES = 100_000_000  # the index of the largest models takes about 10 million
MAX_COUNT = (1 << 31) - 1


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError where it is unreadable, too long or something else."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"'{path}' has {size} bytes, more than the {MAX_JSON_BYTES} allowed")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as fault:
        raise CheckpointError(f"cannot read '{path}': {fault.strerror or fault}; check the folder") from None
    except (ValueError, RecursionError) as fault:  # not UTF-8, not JSON, absurd numbers, absurd nesting
        raise CheckpointError(f"'{path}' is not JSON that can be read ({str(fault)[:100]})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"'{path}' holds a JSON {type(value).__name__}, and an object is needed")
    return value


class Fields:
    """The settings of one JSON object of config.json. Null counts as missing; `defaults` fill what is missing."""

    def __init__(self, path: Path, values: Mapping[str, Any], defaults: Mapping[str, Any] | None = None):
        self.path, self.values, self.defaults = path, values, defaults or {}

    def get(self, key: str) -> Any:
        value = self.values.get(key)
        return self.defaults.get(key) if value is None else value

    def fault(self, key: str, wanted: str) -> CheckpointError:
        value = self.get(key)
        state = "is missing" if value is None else f"is {str(value)[:60]!r}"
        return CheckpointError(f"'{self.path}': '{key}' {state}, and {wanted} is needed")

    def count(self, key: str, default: int | None = None, least: int = 1, most: int = MAX_COUNT) -> int:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not least <= value <= most:
            raise self.fault(key, f"a whole number from {least} to {most}")
        return value

    def number(self, key: str, default: float | None = None, above: float = 0.0) -> float:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not _is_number(value) or value <= above:
            raise self.fault(key, f"a number above {above:g}")
        return float(value)

    def number_or_none(self, key: str) -> float | None:
        return None if self.get(key) is None else self.number(key)

    def numbers(self, key: str, length: int) -> tuple[float, ...]:
        value = self.get(key)
        if not isinstance(value, list) or len(value) != length or not all(_is_number(n) and n > 0 for n in value):
            raise self.fault(key, f"a list of {length} numbers above 0")
        return tuple(float(n) for n in value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fault(key, "true or false")
        return value

    def counts(self, key: str) -> tuple[int, ...]:
        """A list of whole numbers, () where it is missing."""
        value = self.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(type(n) is int and 0 <= n <= MAX_COUNT for n in value):
            raise self.fault(key, "a list of whole numbers")
        return tuple(value)

    def text(self, key: str, default: str = "") -> str:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.fault(key, "a text")
        return value

    def inner(self, key: str) -> Fields | None:
        """The object under `key`, or None."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.fault(key, "an object")
        return Fields(self.path, value)


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False
