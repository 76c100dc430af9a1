"""The slots: one page to read before adding a method.

Every method removes one kind of work, so it plugs into one slot, implements that slot's protocol below, and
registers itself with `@method` of `fewer.registry`. A spec such as ``sink-window:sinks=4,window=508`` names a method
and sets fields of its frozen config dataclass.

    slot       what a method supplies                     where the engine calls it
    weights    WeightMethod -> WeightFormat               once, while loading
    cache      KVCache, with one LayerCache a layer       inside every attention layer
    decoding   Strategy or Drafter                        around every target pass
    experts    ExpertsMethod -> Router, ExpertStore       inside every mixture-of-experts layer
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from fewer.formats.base import WeightFormat
from fewer.kernels.new_tokens import NewTokens
from fewer.model.config import ExpertsConfig, ModelConfig
from fewer.model.experts import ExpertStore, Router
from fewer.model.feed_forward import FeedForward
from fewer.model.step import LayerCache, Step

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

    def contiguous_capture(self) -> Capture:
        """What one token a row launches on CUDA, wherever in the pool the rows' positions are."""
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


@dataclass(frozen=True)
class Capture:
    """How one new token a row runs through a cache's layers on CUDA: launches that a graph records once and replays.

    `key` has whatever the launches depend on: the address and shape of each tensor, and every number that is not read
    from one. Passes of equal keys are one graph. Tensors that `attend` makes itself live as long as the graph.
    """

    key: Hashable
    attend: Callable[[int, NewTokens], None]  # of the layer with this number; keys and values are stored, too


@runtime_checkable
class CapturedCache(Protocol):
    """A KVCache whose layers are, for one generated token a row, the same launches again and again."""

    def capture(self, step: Step) -> Capture | None:
        """Place the step's tokens, one in every row, tentative until `commit`, and bring what the launches read up to
        date. None, and nothing has changed: this step is for the layers' `attend`."""
        ...


class Ahead(NamedTuple):
    """Launches for several tokens of a single row: what changes between them is read on the device."""

    capture: Capture
    room: int | None  # how many tokens; None: any number


@runtime_checkable
class AheadCache(Protocol):
    """A KVCache whose passes may be launched before the tokens of those in front have arrived; each is then committed
    by `advance_one`, as in a `ContiguousCache`."""

    def ahead(self) -> Ahead | None: ...  # None: not now


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
    drafter: str = ""  # what made it, where a method has several ways: shown beside the text

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


@runtime_checkable
class HiddenDrafter(Protocol):
    """A Drafter that reads the target's hidden states. Passes then run where these come out, not as CUDA graphs."""

    def observe(self, hidden: Tensor) -> None:
        """hidden [n, d]: the final norm's output at the n tokens committed just now, in order. After the prompt (in
        pieces, if it is long; what the session held before is not told), and after each round those of its root and
        accepted tokens. `accept` may come before or after."""
        ...


class LayerPlan(Protocol):
    """Which layers run for a token."""

    def plan(self, step: Step, config: ModelConfig) -> Tensor | None:
        """[B, T, L] bool, or None for all layers."""
        ...
