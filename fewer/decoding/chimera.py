"""Chimera: a small network over the target's hidden states guesses a few tokens, each from those before it.

Paper: Chimera: A Lossless Decoding Method for Accelerating Large Language Models Inference by Fusing all Tokens, arXiv
2402.15758. Differs from it: verification is exact (the paper's figures accept typical tokens); heads are by default the
target's own behind a small product (`head=shared`), over the most frequent tokens, and W1 has a low rank, so that an
adapter is a few megabytes; what later guesses see in training is what they see in drafting (`mask=branch`); labels are
the target's own choices; a tree grows from the probabilities of one or a few branches, where the paper has a fixed one;
and a gate of our own leaves out what does not pay on this machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from fewer.decoding import draft_growth, tree
from fewer.decoding.chimera_network import ChimeraFitConfig, ChimeraNetwork
from fewer.decoding.draft_layer import DraftCache
from fewer.decoding.draft_training import VOCABULARY, fit_drafter, for_drafting
from fewer.decoding.frozen_target import FrozenTarget
from fewer.decoding.observed_states import ObservedStates
from fewer.decoding.sampling import SamplingConfig
from fewer.errors import CheckpointError, UsageError
from fewer.model.transformer import Transformer
from fewer.registry import method
from fewer.slots import Drafter, DraftTree

if TYPE_CHECKING:
    from fewer.training import Adapter, FittedModel, TrainingRun, TrainingText

REMEMBERED = 8192  # trigrams whose g is kept
TOGETHER = 8  # trigrams that are encoded at once, so that g does not depend on what else is encoded


@dataclass(frozen=True)
class ChimeraConfig:
    tokens: int = 6  # guessed tokens a round, at most
    width: int = 4  # likeliest tokens of a head that are looked at
    branches: int = 1  # guesses of a level that the layer goes on from
    gate: bool = True  # guess only as much as pays by the measured times; false: always `tokens`
    adapter: str | None = None  # file of a trained network; none: the one for the model

    def __post_init__(self) -> None:
        for name in ("tokens", "width", "branches"):
            if not 1 <= getattr(self, name) <= 63:
                raise UsageError(f"chimera: {name}={getattr(self, name)} is out of range: use 1 to 63")


class Context(Protocol):
    """What is asked of the target."""

    @property
    def transformer(self) -> Transformer: ...


def fit_chimera(model: FittedModel, data: TrainingText, config: ChimeraFitConfig, run: TrainingRun) -> Adapter:
    return fit_drafter(model, data, config, run, lambda target: ChimeraNetwork(target, config))


@method(
    "chimera",
    slot="decoding",
    paper="2402.15758",
    lossless=True,
    config=ChimeraConfig,
    fit=fit_chimera,
    fit_config=ChimeraFitConfig,
)
class Chimera:
    """The strategy: the network, the g of trigrams that were met, and what the gate has learnt."""

    lossless = True

    def __init__(self, config: ChimeraConfig | None, context: Context, *, adapter: Adapter):
        self.config = config or ChimeraConfig()
        self.network = load_chimera(context.transformer, adapter)
        self.memo = TrigramMemo(self.network)
        self.gate = draft_growth.Gate(self.config.gate)

    def drafter(self, sampling: SamplingConfig, row: int) -> Drafter | None:
        return ChimeraDrafter(self.network, self.memo, self.gate, self.config)


@torch.inference_mode()
def load_chimera(model: Transformer, adapter: Adapter) -> ChimeraNetwork:
    known = {field.name for field in fields(ChimeraFitConfig)}
    fitted = ChimeraFitConfig(**{key: value for key, value in adapter.provenance.config.items() if key in known})
    if not fitted.layer:
        raise CheckpointError("this adapter of chimera was trained without its layer, which is to be measured only")
    network = ChimeraNetwork(FrozenTarget(model, adapter.tensors.get(VOCABULARY)), fitted)
    return for_drafting(network, adapter.tensors)


class TrigramMemo:
    """g of three tokens, and its query, key and value before rotation: they depend on nothing else."""

    def __init__(self, network: ChimeraNetwork):
        self.network = network
        self.places: dict[tuple[int, ...], int] = {}
        self.rows = torch.empty(0)  # [REMEMBERED, d + (H + 2 Hk) D]

    def __call__(self, trigrams: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        """(g [1, n, d], its projections [1, n, (H + 2 Hk) D])."""
        missing = list(dict.fromkeys(trigram for trigram in trigrams if trigram not in self.places))
        if len(self.places) + len(missing) > REMEMBERED:
            self.places, missing = {}, list(dict.fromkeys(trigrams))
        if missing:
            self._learn(missing)
        found = self.rows[[self.places[trigram] for trigram in trigrams]]
        width = self.network.target.config.hidden_size
        return found[None, :, :width], found[None, :, width:]

    def _learn(self, trigrams: list[tuple[int, ...]]) -> None:
        encoded = []
        for first in range(0, len(trigrams), TOGETHER):
            some = trigrams[first : first + TOGETHER]
            size = len(some) if self.network.target.is_narrow else TOGETHER  # products of 8-bit rows are row by row
            padded = torch.tensor(some + [some[0]] * (size - len(some)), device=self.network.target.device)
            g = self.network.encode(padded)
            encoded.append(torch.cat((g, self.network.layer.project(g)), dim=-1)[: len(some)])
        rows = torch.cat(encoded)
        start = len(self.places)
        if start + len(rows) > len(self.rows):
            larger = rows.new_empty(max(REMEMBERED, start + len(rows)), rows.shape[1])
            if start:
                larger[:start] = self.rows[:start]
            self.rows = larger
        self.rows[start : start + len(rows)] = rows
        self.places.update((trigram, start + place) for place, trigram in enumerate(trigrams))


@dataclass(slots=True)
class Expanded:
    """A guess that the layer has run for."""

    known: tuple[int, ...]  # the last tokens of its branch, itself included
    o: Tensor  # [d]
    seen: list[int]  # slots of the draft that its branch sees
    depth: int


class ChimeraDrafter:
    """One sequence: slots of the layer for its hidden states and trigrams, and behind them those of a draft."""

    lossless = True

    def __init__(self, network: ChimeraNetwork, memo: TrigramMemo, gate: draft_growth.Gate, config: ChimeraConfig):
        self.network, self.memo = network, memo
        shape = draft_growth.Shape(config.tokens, network.config.heads, config.width, config.branches)
        self.grower = draft_growth.Grower(gate, shape)
        self.start(())

    def start(self, prompt: Sequence[int]) -> None:
        target = self.network.target
        self.states = ObservedStates()
        self.slots = DraftCache(target.config, target.dtype, target.device)
        self.expanded: list[Expanded] = []

    def observe(self, hidden: Tensor) -> None:
        self.states.observe(hidden)

    @torch.inference_mode()
    def propose(self, context: Sequence[int], limit: int) -> DraftTree:
        new = self.states.take(len(context))
        if new is None:
            return tree.root(context[-1])
        self._commit(context, *new)
        self.context = context
        return self.grower.grow(context[-1], limit, self._expand)

    def accept(self, tokens: Sequence[int]) -> None:
        self.grower.accepted(tokens)

    def _commit(self, context: Sequence[int], hidden: Tensor, first: int) -> None:
        """Slots of the hidden states from position `first` on, and of the trigrams behind them; the draft's go."""
        self.slots.forget_draft()
        self.expanded = []
        if not len(hidden):
            return
        layer = self.network.layer
        places = torch.arange(first, len(context), device=hidden.device)[None]
        k, v = layer.heads(layer.keys_values(hidden[None].to(self.network.dtype)), places[:, :-1], "kv")
        self.slots.append(k, v, commit=True)
        projected = self.memo([trigram_at(context, place) for place in range(first + 1, len(context))])[1]
        _, k, v = layer.heads(projected, places[:, 1:])
        self.slots.append(k, v, commit=True)

    def _expand(self, parents: list[int], tokens: list[int]) -> draft_growth.Level:
        network, layer, count = self.network, self.network.layer, len(tokens)
        if parents == [-1]:
            depth, above = 0, []
            trigrams = [trigram_at(self.context, len(self.context) - 1)]
            known = [tuple(self.context[-2:])]
        else:
            above = [self.expanded[parent] for parent in parents]
            depth = above[0].depth + 1
            trigrams = [(*node.known[-2:], token) for node, token in zip(above, tokens, strict=True)]
            known = trigrams
        g, projected = self.memo(trigrams)
        places = torch.full((1, count), len(self.context) - 1 + depth, device=g.device)
        q, k, v = layer.heads(projected, places)
        sees: Tensor | None = None
        seen: list[list[int]] = [[]]
        if above:
            seen = self._stand_in(parents, depth, len(self.context) - 2 + depth)
            own = self.slots.used - self.slots.committed
            self.slots.append(k, v)
            seen = [[*slots, own + place] for place, slots in enumerate(seen)]
            sees = self.slots.mask(seen)
        o = layer.finish(g, self.slots.attend(q, layer.scale, sees))[0]  # [m, d]
        assert self.states.last is not None
        logits = network.heads(depth, self.states.last.to(o.dtype).expand_as(o), o)
        for place in range(count):
            self.expanded.append(Expanded(known[place], o[place], seen[place], depth))
        return draft_growth.children(logits, network.target.tokens, self.grower.shape.width)

    def _stand_in(self, parents: list[int], depth: int, position: int) -> list[list[int]]:
        """Slots of the parents' outputs, where the hidden states they guess would be -> what each child sees."""
        if self.network.config.mask == "code":
            return [self.expanded[parent].seen for parent in parents]
        layer, distinct = self.network.layer, list(dict.fromkeys(parents))
        o = torch.stack([self.expanded[parent].o for parent in distinct])[None]
        places = torch.full((1, len(distinct)), position, device=o.device)
        own = self.slots.used - self.slots.committed
        k, v = layer.heads(layer.keys_values(o), places, "kv")
        self.slots.append(k, v)
        slot_of = {parent: own + place for place, parent in enumerate(distinct)}
        return [[*self.expanded[parent].seen, slot_of[parent]] for parent in parents]


def trigram_at(tokens: Sequence[int], place: int) -> tuple[int, ...]:
    """The trigram that ends at a place; of the first two: (0, 0, 0) and (0, 1, 1)."""
    if place >= 2:
        return tuple(tokens[place - 2 : place + 1])
    return (tokens[0], tokens[place], tokens[place])
