"""The registry of methods: what `@method` records, and how a spec such as ``sink-window:sinks=4`` becomes a choice."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from fewer.errors import UsageError

Slot = Literal["weights", "cache", "experts", "decoding"]
SLOTS: tuple[Slot, ...] = ("weights", "cache", "experts", "decoding")
DEFAULTS: dict[Slot, str] = {"weights": "auto", "cache": "full", "experts": "resident", "decoding": "plain"}

Fit = Callable[..., Any]
"""`fit(model, data, config, run) -> Adapter`: what `fewer train METHOD` calls, once a model.

The types are those of `fewer.training`: a `FittedModel`, a `TrainingText`, the method's `fit_config` filled in, and a
`TrainingRun`, which trains, resumes, shows progress and makes the adapter. The method's target is then called with the
keyword `adapter`: the one that fits the model, or the file that a field `adapter: str | None` of its config names.
"""


@dataclass(frozen=True)
class Method:
    """One registered method: what `fewer methods` prints and a spec refers to."""

    name: str
    slot: Slot
    paper: str | None  # arXiv id
    lossless: bool  # the output equals the same model's without this method
    target: Any  # the class or function that fills the seam
    config: type | None  # its frozen config dataclass
    summary: str = ""
    fit: Fit | None = None  # None: it learns nothing, and its target takes no adapter
    fit_config: type | None = None  # the frozen dataclass of what `fit` can be told
    adapter_of: str | None = None  # the method whose adapter the target takes; None: its own, if it is fitted
    conflicts: Mapping[str, str] = field(default_factory=dict)  # "slot:name" -> the reason they exclude each other

    @property
    def learnt_by(self) -> str | None:
        """The method that fits what the target takes as `adapter`; None: it takes none."""
        return self.adapter_of or (self.name if self.fit is not None else None)


_METHODS: dict[tuple[Slot, str], Method] = {}
_PACKAGES = {
    "weights": "fewer.weights",
    "cache": "fewer.cache",
    "experts": "fewer.experts",
    "decoding": "fewer.decoding",
}


def method(
    name: str,
    *,
    slot: Slot,
    paper: str | None = None,
    lossless: bool,
    config: type | None = None,
    conflicts: Mapping[str, str] | None = None,
    fit: Fit | None = None,
    fit_config: type | None = None,
    adapter_of: str | None = None,
) -> Callable[[Any], Any]:
    """Register a method under `name` in `slot`. The first line of its module's docstring becomes the summary."""

    def register(target: Any) -> Any:
        documentation = importlib.import_module(target.__module__).__doc__ or target.__doc__ or ""
        summary = documentation.strip().splitlines()[0].rstrip(".") if documentation.strip() else ""
        _METHODS[slot, name] = Method(
            name, slot, paper, lossless, target, config, summary, fit, fit_config, adapter_of, dict(conflicts or {})
        )
        return target

    return register


def methods(slot: Slot | None = None) -> Iterator[Method]:
    """Every method, or those of one slot, in the order of their registration."""
    for each in SLOTS if slot is None else (slot,):
        importlib.import_module(_PACKAGES[each])  # a slot's __init__ imports its method files
    return iter([entry for (where, _), entry in _METHODS.items() if slot is None or where == slot])


def find(slot: Slot, name: str) -> Method:
    known = {entry.name: entry for entry in methods(slot)}
    if name not in known:
        raise UsageError(f"unknown {slot} method '{name}': allowed are {', '.join(known)}{_hint(name, known)}")
    return known[name]


@dataclass(frozen=True)
class Choice:
    """A method with its settings: one parsed spec."""

    method: Method
    config: Any = None

    def with_adapter(self, adapter: Any) -> Choice:
        """The same choice, whose target is always called with this `fewer.training.Adapter`."""
        target = functools.partial(self.method.target, adapter=adapter)
        return dataclasses.replace(self, method=dataclasses.replace(self.method, target=target))

    def __str__(self) -> str:
        if self.config is None:
            return self.method.name
        changed = [
            f"{f.name}={getattr(self.config, f.name)}"
            for f in dataclasses.fields(self.config)
            if getattr(self.config, f.name) != f.default
        ]
        return self.method.name + (":" + ",".join(changed) if changed else "")


def parse_spec(slot: Slot, spec: str) -> Choice:
    """`name` or `name:key=value,key=value` -> Choice. Raises UsageError naming what is allowed."""
    name, _, rest = spec.partition(":")
    entry = find(slot, name.strip())
    values: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in rest.split(","))):
        key, equals, value = item.partition("=")
        if not equals:
            raise UsageError(f"'{item}' in the spec '{spec}' is not key=value, as in '{name}:key=value,key=value'")
        if key.strip() in values:
            raise UsageError(f"the spec '{spec}' sets '{key.strip()}' twice: give it once")
        values[key.strip()] = value.strip()
    if entry.config is None:
        if values:
            raise UsageError(
                f"{slot} method '{name}' takes no settings, but the spec '{spec}' sets {', '.join(values)}"
            )
        return Choice(entry)
    return Choice(entry, parse_settings(f"{slot} method '{name}'", f"{name}:", entry.config, values))


def parse_settings(owner: str, prefix: str, config: type, values: Mapping[str, str]) -> Any:
    """The dataclass `config` with the fields that `values` has as text. Raises UsageError, as the config's own
    `__post_init__` does for what is out of range; `owner` and `prefix` are how its sentences begin."""
    hints = typing.get_type_hints(config)
    known = [f.name for f in dataclasses.fields(config)]
    parsed = {}
    for key, value in values.items():
        if key not in known:
            raise UsageError(f"unknown key '{key}' for {owner}: allowed are {', '.join(known)}{_hint(key, known)}")
        parsed[key] = _parse_value(f"{prefix}{key}", value, hints[key])
    return config(**parsed)


def check_drafts(cache: Choice, decoding: Choice) -> None:
    """Raise UsageError where the decoding method may guess more than the cache can take back."""
    guesses: int = getattr(decoding.config, "tokens", 0)
    slack: int | None = getattr(cache.method.target, "slack", None)
    if slack is None or guesses <= slack:
        return
    fewer_guesses = f"{decoding.method.name}:tokens={slack}" if slack else "plain"
    raise UsageError(
        f"decoding={decoding.method.name} guesses up to {guesses} tokens a round, but cache={cache.method.name} can "
        f"take back {slack or 'none'}: use decoding={fewer_guesses} or cache=full"
    )


def _parse_value(where: str, text: str, kind: Any) -> Any:
    if typing.get_origin(kind) is Literal:
        options = [str(option) for option in typing.get_args(kind)]
        if text not in options:
            raise UsageError(f"'{where}={text}' is not allowed: choose one of {', '.join(options)}")
        return typing.get_args(kind)[options.index(text)]
    alternatives = typing.get_args(kind)
    if type(None) in alternatives:
        if text.lower() == "none":
            return None
        kind = next(option for option in alternatives if option is not type(None))
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise UsageError(f"'{where}={text}' is not true or false")
        return text.lower() in ("true", "1", "yes")
    try:
        return kind(text)
    except ValueError:
        wanted = {int: "a whole number", float: "a number"}.get(kind, kind.__name__)
        raise UsageError(f"'{where}={text}' is not {wanted}") from None


def _hint(wrong: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(wrong, list(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
