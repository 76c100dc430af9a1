"""The slots: one page to read before adding a method.

Every method removes one kind of work, so it plugs into one slot, implements that slot's protocol below, and
registers itself with `@method`. A spec such as ``sink-window:sinks=4,window=508`` names a method and sets fields of
its frozen config dataclass; `parse_spec` checks both.

    slot       what a method supplies                     where the engine calls it
    weights    WeightMethod -> WeightFormat               once, while loading
    cache      KVCache, with one LayerCache a layer       inside every attention layer
    decoding   Strategy or Drafter                        around every target pass
    experts    ExpertsMethod -> Router, ExpertStore       inside every mixture-of-experts layer
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import typing
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from fewer.errors import UsageError
from fewer.formats.base import WeightFormat
from fewer.model.config import ExpertsConfig, ModelConfig
from fewer.model.experts import ExpertStore, Router
from fewer.model.feed_forward import FeedForward
from fewer.model.step import LayerCache, Step

Slot = Literal["weights", "cache", "experts", "decoding"]
SLOTS: tuple[Slot, ...] = ("weights", "cache", "experts", "decoding")
DEFAULTS: dict[Slot, str] = {"weights": "auto", "cache": "full", "experts": "resident", "decoding": "plain"}


# ── cache: fewer keys and values ────────────────────────────────────────────────────────────────────────────────────


class KVCache(Protocol):
    """Keys and values of B sequences. State that layers share lives here, never on modules.

    What a step appends is tentative until `commit`. `layers[i].attend` is all that the network sees.
    """

    slack: int | None  # tokens that can always be taken back; None: any number, 0: none. A class says it for any model
    keys_rotated: bool  # keys are stored turned to their positions; False: they are turned whenever they are read
    renumbers: bool  # positions count what the cache holds, so the text may outgrow the model's context

    @property
    def layers(self) -> Sequence[LayerCache]: ...

    @property
    def max_step(self) -> int | None:
        """The most tokens one step may bring, None for any number."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors really allocated."""
        ...

    @property
    def lengths(self) -> list[int]:
        """Committed tokens of each row (logical: as many as were ever committed)."""
        ...

    @property
    def physical_lengths(self) -> list[int]:
        """Slots of each row that hold a key now."""
        ...

    def positions(self, row: int, layer: int = 0) -> Tensor:
        """Absolute position of each key that `row` still holds in `layer`: [physical length] int64."""
        ...

    def commit(self, kept: Sequence[int] | Sequence[Sequence[int]]) -> None:
        """End a step. For each row, `kept` is how many of its new slots stay (a prefix), or the list of those that
        stay, in ascending order; the others are dropped and the survivors moved together."""
        ...

    def truncate(self, row: int, length: int) -> None:
        """Forget the tokens of `row` from position `length` on."""
        ...

    def reserve(self, tokens: int) -> None:
        """Make room for this many tokens a row in all, or raise a FewerError."""
        ...


@runtime_checkable
class CorrectedCache(Protocol):
    """A KVCache that generated tokens fill with keys of sparse passes, and that wants them computed again now and then.
    The session asks before every pass over generated tokens."""

    def due(self) -> list[list[int]] | None:
        """The last tokens of each row that are to be fed again as a prompt, from where they stand; None: none now."""
        ...

    def before_due(self, row: int) -> int | None:
        """The most tokens that one pass may bring to `row` without running past the place where some become due, so
        that drafts see the keys that plain decoding would; None: any number."""
        ...


@runtime_checkable
class SharingCache(Protocol):
    """A KVCache that computes and stores once what several prompts begin with. The session asks before it feeds any."""

    def shared_runs(self, prompts: Sequence[Sequence[int]]) -> Generator[tuple[KVCache, list[list[int]]]]:
        """Yields caches and, for each row of them, the tokens to feed to it before the next are asked for. In the end
        the batch's `lengths` include what each row then holds of its prompt, never all of it. Closed early, because a
        pass failed, it leaves the batch as it was."""
        ...


class ContiguousCache(KVCache, Protocol):
    """A cache whose `contiguous` is true offers its pool to the engine's fast paths: slot s holds position s."""

    contiguous: bool  # may change from step to step, as when a window begins to drop tokens
    contiguous_room: int | None  # tokens that every row may still take before that; None: any number
    pools: list[Tensor]  # one: [L, 2 (keys, values), B, Hk, capacity, D], keys rotated

    def begin(self, step: Step) -> None:
        """Place the step's new tokens, whose keys and values the caller stores; they are tentative until `commit`."""
        ...

    def advance_one(self, position: int) -> int:
        """Commit one token of a single row whose keys and values the caller stores; returns its slot."""
        ...


class Place(NamedTuple):
    """Where the heads of one kind put a single row's new tokens, and what these see of the older ones."""

    slot: int  # of the first; the others follow
    stop: int  # behind the last slot in use, the new ones included
    first: Sequence[int]  # for each new token, the first slot that it sees …
    sinks: int = 0  # … beside slots 0..sinks-1


class Placement(NamedTuple):
    """A step's tokens in the stores of a `Layout`."""

    places: Sequence[Place]  # one a store
    slots: Tensor | None = None  # [L, Hk] int32: each head's own slot for the only token, in place of `slot`
    weights: Tensor | None = None  # [L, H, width] float32, to be filled with the only token's attention to each slot;
    # width is a multiple of 16, and what lies behind `stop` is undefined


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class Layout:
    """Where a single row's keys and values lie: heads are of a few kinds, and each kind has a store."""

    stores: Sequence[tuple[Tensor, Tensor]]  # keys (rotated) and values, of equal strides; a head's slots are rows of D
    homes: Tensor  # [L, Hk, 2] int64: the head's kind, and elements from the store's beginning to the head's first slot


class PlacedCache(KVCache, Protocol):
    """A cache that lets a fast path write the keys and values of a single row into its stores, windows or not."""

    layout: Layout  # another object whenever a tensor was replaced
    places_prompts: bool  # False: the fast path is for generated tokens, because the cache looks at a prompt's queries

    def can_place(self, tokens: int) -> bool:
        """Whether the next `tokens` of the row can be placed; it may change from step to step."""
        ...

    def place_one(self, position: int) -> Placement:
        """Commit one token whose keys and values the caller stores."""
        ...

    def place(self, step: Step) -> Placement:
        """Place a step's tokens likewise; they are tentative until `commit`."""
        ...


# ── weights: fewer bits ─────────────────────────────────────────────────────────────────────────────────────────────


class WeightMethod(Protocol):
    """Turns the matrix called `name` into a format. `hessian` [K, K] is given to methods that ask for calibration."""

    needs_calibration: bool
    keeps_file_format: bool  # matrices that the file already holds in a format of ours stay as they are

    @property
    def reads(self) -> torch.dtype:
        """The dtype in which `quantize` wants the decoded matrix."""
        ...

    def quantize(self, name: str, weight: Tensor, hessian: Tensor | None = None) -> WeightFormat: ...


# ── experts: fewer experts ──────────────────────────────────────────────────────────────────────────────────────────


class ExpertsMethod(Protocol):
    """Builds the two halves of each mixture-of-experts layer, once, while loading. A method that changes only one half
    returns the plain other one (`TopKRouter`, `ResidentStore` of `fewer.model.experts`); models without experts call
    neither. `Router` and `ExpertStore` are declared where the network calls them:

        Router.route(x [n, d], step) -> experts [n, k] int64, weights [n, k]
        ExpertStore.run(x [n, d], experts [n, k], weights [n, k]) -> [n, d] float32
    """

    def router(self, matrix: WeightFormat, settings: ExpertsConfig) -> Router:
        """`matrix` [E, d] scores the E experts of a layer; `settings` says how many the model takes a token."""
        ...

    def store(self, experts: list[FeedForward]) -> ExpertStore:
        """`experts` are the layer's E blocks, on the model's device, in the formats that the weights slot chose."""
        ...


# ── decoding: fewer steps ───────────────────────────────────────────────────────────────────────────────────────────

Origin = Literal["deterministic", "iid", "without-replacement"]


@dataclass(slots=True)
class DraftTree:
    """Guessed continuations of one sequence. Node 0 is the last committed token, which the target has not seen yet.

    `parents[i] < i`, `parents[0] = -1`; a chain has `parents[i] = i - 1`. `origin` says how siblings were produced, and
    with it which rule is exact. `probabilities` [n + 1, V] holds, for each node, the law its children were drawn from
    (after warping); "deterministic" needs none.
    """

    tokens: list[int]
    parents: list[int]
    origin: Origin = "deterministic"
    probabilities: Tensor | None = None

    @property
    def depth(self) -> list[int]:
        depth = [0] * len(self.tokens)
        for node in range(1, len(self.tokens)):
            depth[node] = depth[self.parents[node]] + 1
        return depth

    @property
    def is_chain(self) -> bool:
        return all(parent == node - 1 for node, parent in enumerate(self.parents))


class Drafter(Protocol):
    """Proposes draft trees and learns what was accepted. One drafter serves one sequence.

    The config of a drafting method has a field `tokens`: the most guesses it makes a round.
    """

    lossless: bool

    def start(self, prompt: Sequence[int]) -> None:
        """Begin a sequence: the prompt's tokens, without the first generated one."""
        ...

    def propose(self, context: Sequence[int], limit: int) -> DraftTree:
        """A tree whose root is context[-1], with at most `limit` nodes below the root (none is fine)."""
        ...

    def accept(self, tokens: Sequence[int]) -> None:
        """The tokens that the round emitted: accepted draft tokens, then the target's own."""
        ...


class LayerPlan(Protocol):
    """Which layers run for a token."""

    def plan(self, step: Step, config: ModelConfig) -> Tensor | None:
        """[B, T, L] bool, or None for all layers."""
        ...


# ── fitting: what a method learns before it runs ────────────────────────────────────────────────────────────────────

Fit = Callable[..., Any]
"""`fit(model, data, config, run) -> Adapter`: what `fewer train METHOD` calls, once a model.

The types are those of `fewer.training`: a `FittedModel`, a `TrainingText`, the method's `fit_config` filled in, and a
`TrainingRun`, which trains, resumes, shows progress and makes the adapter. The method's target is then called with the
keyword `adapter`: the one that fits the model, or the file that a field `adapter: str | None` of its config names.
"""


# ── the registry ────────────────────────────────────────────────────────────────────────────────────────────────────


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
