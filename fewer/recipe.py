"""`Recipe`: at most one choice for each slot, from Python, the command line or a YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, cast

import yaml

from fewer.errors import UsageError
from fewer.registry import DEFAULTS, SLOTS, Choice, Slot, check_drafts, parse_spec


@dataclass(frozen=True)
class Recipe:
    """One way to run a model: a spec (`name:key=value,…`) for each slot, and the numeric type."""

    weights: str = DEFAULTS["weights"]
    cache: str = DEFAULTS["cache"]
    experts: str = DEFAULTS["experts"]
    decoding: str = DEFAULTS["decoding"]
    dtype: str | None = None  # float32, bfloat16, float16; None: what suits the device
    name: str | None = None  # how reports call it
    choices: Mapping[Slot, Choice] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check every spec and the combination. Raises UsageError."""
        chosen = {slot: parse_spec(slot, getattr(self, slot)) for slot in SLOTS}
        object.__setattr__(self, "choices", chosen)
        for slot, choice in chosen.items():
            for other_slot, other in chosen.items():
                reason = choice.method.conflicts.get(f"{other_slot}:{other.method.name}")
                if reason:
                    raise UsageError(
                        f"{slot}={choice.method.name} cannot be combined with {other_slot}={other.method.name}: "
                        f"{reason}"
                    )
        check_drafts(chosen["cache"], chosen["decoding"])

    def __str__(self) -> str:
        if self.name:
            return self.name
        parts = [str(self.choices["weights"])]
        if self.dtype:
            parts[0] += f" ({self.dtype})"
        parts += [str(self.choices[slot]) for slot in SLOTS[1:] if str(self.choices[slot]) != DEFAULTS[slot]]
        return " + ".join(parts)

    @classmethod
    def parse(cls, text: str) -> Self:
        """`weights=int4:group=64 cache=sink-window decoding=prompt-lookup`, in any order."""
        values: dict[str, str] = {}
        for item in text.split():
            key, equals, value = item.partition("=")
            if not equals:
                raise UsageError(f"'{item}' in the recipe '{text}' is not slot=method, as in 'weights=int4 cache=full'")
            values[key] = value
        return cls.from_mapping(values)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        allowed = [*SLOTS, "dtype", "name"]
        for key, value in values.items():
            if key not in allowed:
                raise UsageError(f"unknown slot '{key}' in a recipe: allowed are {', '.join(allowed)}")
            if not isinstance(value, str):
                raise UsageError(f"the recipe's '{key}' is {value!r}: give text such as 'int4:group=64'")
        return cls(**cast(dict[str, str], dict(values)))

    @classmethod
    def from_yaml(cls, path: Path) -> list[Self]:
        """One recipe, or a list of recipes, from a YAML file."""
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as fault:
            raise UsageError(f"cannot read the recipe file {path}: {fault.strerror}") from None
        except UnicodeDecodeError:
            raise UsageError(f"the recipe file {path} is no UTF-8 text: give a YAML file") from None
        except yaml.YAMLError as fault:
            raise UsageError(f"{path} is not valid YAML: {str(fault).splitlines()[0]}") from None
        entries = content.get("recipes", content) if isinstance(content, dict) else content
        entries = [entries] if isinstance(entries, dict) else entries
        if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
            raise UsageError(f"{path} holds no recipe: write slots such as 'weights: int4', or a list of them")
        return [cls.from_mapping(entry) for entry in entries]

    def to_mapping(self) -> dict[str, str]:
        values: dict[str, str] = {slot: getattr(self, slot) for slot in SLOTS if getattr(self, slot) != DEFAULTS[slot]}
        extra = {"dtype": self.dtype, "name": self.name}
        return {**values, **{key: value for key, value in extra.items() if value}}
