"""Medusa: heads on the target's last hidden state guess the tokens at several offsets, each by itself.

Paper: Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads, arXiv 2401.10774, the heads of
Medusa-1, trained beside a frozen target:

    y_k = h + SiLU(W_k h + b_k)     W_k = 0 at first     logits of guess k: W_lm y_k, or of a trained copy (`head=own`)

Differs from it: heads share by default the target's output matrix, over the most frequent tokens; the tree grows from
this round's probabilities, where the paper has a fixed one; verification is exact, without typical acceptance; and a
gate of our own leaves out what does not pay on this machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewer.decoding import draft_growth, tree
from fewer.decoding.draft_heads import HeadKind
from fewer.decoding.draft_layer import product
from fewer.decoding.draft_training import (
    VOCABULARY,
    DraftFitConfig,
    DraftNetwork,
    Lesson,
    classes_of,
    cross_entropy,
    fit_drafter,
    for_drafting,
)
from fewer.decoding.frozen_target import FrozenTarget
from fewer.decoding.observed_states import ObservedStates
from fewer.decoding.sampling import SamplingConfig
from fewer.errors import UsageError
from fewer.model.transformer import Transformer
from fewer.registry import method
from fewer.slots import Drafter, DraftTree

if TYPE_CHECKING:
    from fewer.training import Adapter, FittedModel, TrainingRun, TrainingText


@dataclass(frozen=True)
class MedusaConfig:
    tokens: int = 6  # guessed tokens a round, at most
    width: int = 4  # likeliest tokens of a head that are looked at
    branches: int = 4  # guesses of a level that others are put behind
    gate: bool = True  # guess only as much as pays by the measured times; false: always `tokens`
    adapter: str | None = None  # file of trained heads; none: those for the model

    def __post_init__(self) -> None:
        for name in ("tokens", "width", "branches"):
            if not 1 <= getattr(self, name) <= 63:
                raise UsageError(f"medusa: {name}={getattr(self, name)} is out of range: use 1 to 63")


@dataclass(frozen=True)
class MedusaFitConfig(DraftFitConfig):
    heads: int = 4  # offsets
    head: HeadKind = "shared"  # the target's output matrix, or a trained copy of it for each head

    def __post_init__(self) -> None:
        DraftFitConfig.__post_init__(self)
        if not 1 <= self.heads <= 15:
            raise UsageError(f"medusa: heads={self.heads} is out of range: use 1 to 15")


class MedusaNetwork(DraftNetwork):
    def __init__(self, target: FrozenTarget, config: MedusaFitConfig):
        super().__init__()
        self.target, self.config = target, config
        width = target.config.hidden_size
        self.weight = nn.Parameter(torch.zeros(config.heads, width, width))
        self.bias = nn.Parameter(torch.zeros(config.heads, width))
        if config.head == "own":
            self.output = nn.Parameter(target.head.dequantize(torch.float32).repeat(config.heads, 1, 1))

    def forward(self, offset: int, h: Tensor) -> Tensor:
        """h [.., d] -> the logits of guess number `offset` [.., V'] float32."""
        h = h.to(self.dtype)
        y = h + functional.silu(product(h, self.weight[offset]) + self.bias[offset])
        if self.config.head == "own":
            return self.target.scaled(product(y, self.output[offset]).float())
        return self.target.logits(y)

    def losses(self, lesson: Lesson) -> dict[str, Tensor]:
        table = self.target.class_of()
        return {
            f"guess_{offset}": cross_entropy(
                self(offset, lesson.hidden[:, :-1]), classes_of(table, lesson.right(offset))
            )
            for offset in range(self.config.heads)
        }

    def guesses(self, lesson: Lesson) -> list[Tensor]:
        h = lesson.hidden[:, :-1]
        return [self.target.tokens(self(offset, h).argmax(-1)) for offset in range(self.config.heads)]


class Context(Protocol):
    """What is asked of the target."""

    @property
    def transformer(self) -> Transformer: ...


def fit_medusa(model: FittedModel, data: TrainingText, config: MedusaFitConfig, run: TrainingRun) -> Adapter:
    return fit_drafter(model, data, config, run, lambda target: MedusaNetwork(target, config))


@method(
    "medusa",
    slot="decoding",
    paper="2401.10774",
    lossless=True,
    config=MedusaConfig,
    fit=fit_medusa,
    fit_config=MedusaFitConfig,
)
class Medusa:
    """The strategy: the heads, and what the gate has learnt."""

    lossless = True

    def __init__(self, config: MedusaConfig | None, context: Context, *, adapter: Adapter):
        self.config = config or MedusaConfig()
        self.network = load_medusa(context.transformer, adapter)
        self.gate = draft_growth.Gate(self.config.gate)

    def drafter(self, sampling: SamplingConfig, row: int) -> Drafter | None:
        return MedusaDrafter(self.network, self.gate, self.config)


@torch.inference_mode()
def load_medusa(model: Transformer, adapter: Adapter) -> MedusaNetwork:
    known = {field.name for field in fields(MedusaFitConfig)}
    fitted = MedusaFitConfig(**{key: value for key, value in adapter.provenance.config.items() if key in known})
    network = MedusaNetwork(FrozenTarget(model, adapter.tensors.get(VOCABULARY)), fitted)
    return for_drafting(network, adapter.tensors)


class MedusaDrafter:
    """The cartesian product of the heads' guesses, the most likely paths of it."""

    lossless = True

    def __init__(self, network: MedusaNetwork, gate: draft_growth.Gate, config: MedusaConfig):
        self.network = network
        shape = draft_growth.Shape(config.tokens, network.config.heads, config.width, config.branches)
        self.grower = draft_growth.Grower(gate, shape)
        self.start(())

    def start(self, prompt: Sequence[int]) -> None:
        self.states = ObservedStates()
        self.offset = 0

    def observe(self, hidden: Tensor) -> None:
        self.states.observe(hidden[-1:])

    def propose(self, context: Sequence[int], limit: int) -> DraftTree:
        if self.states.take(len(context)) is None:
            return tree.root(context[-1])
        self.offset = 0
        return self.grower.grow(context[-1], limit, self._expand)

    def accept(self, tokens: Sequence[int]) -> None:
        self.grower.accepted(tokens)

    @torch.inference_mode()
    def _expand(self, parents: list[int], tokens: list[int]) -> draft_growth.Level:
        """The next head's guesses are the same below every node."""
        assert self.states.last is not None
        logits = self.network(self.offset, self.states.last)
        self.offset += 1
        level = draft_growth.children(logits, self.network.target.tokens, self.grower.shape.width)
        return level * len(tokens)
