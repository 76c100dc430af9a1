"""EAGLE: one decoder layer goes on from the target's last hidden state, guessing hidden states and tokens in turn.

Papers: EAGLE: Speculative Sampling Requires Rethinking Feature Uncertainty, arXiv 2401.15077; EAGLE-2: Faster Inference
of Language Models with Dynamic Draft Trees, arXiv 2406.16858.

    z_i = W [e(x_{i+1}); f_i] + b     f_i: the target's hidden state after the final norm, later the layer's own guess
    f_{i+1} = layer(z_0 .. z_i)       causal, at position i;  logits of x_{i+2}: the target's head of f_{i+1}
    loss = SmoothL1(f_{i+1}, h_{i+1}) + 0.1 · CE(target's law, law of f_{i+1})

Differs from them: the head covers the most frequent tokens; hidden states are trained on without noise; the layer's
feed-forward block is at most twice the hidden size wide by default; both terms have weights of their own, and the loss
of hidden states is relative to their size; `unroll` trains on the layer's own guesses, as EAGLE-3's training-time test
does; and a gate of our own leaves out what does not pay on this machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from fewer.decoding import draft_growth, tree
from fewer.decoding.draft_layer import DraftCache, DraftLayer, Matrix, branch_attention, drawn, product
from fewer.decoding.draft_training import (
    VOCABULARY,
    DraftFitConfig,
    DraftNetwork,
    Lesson,
    classes_of,
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
class EagleConfig:
    tokens: int = 6  # guessed tokens a round, at most
    depth: int = 4  # levels of the tree
    width: int = 4  # likeliest tokens below a guess that are looked at
    branches: int = 1  # guesses of a level that the layer goes on from
    gate: bool = True  # guess only as much as pays by the measured times; false: always `tokens`
    adapter: str | None = None  # file of a trained layer; none: the one for the model

    def __post_init__(self) -> None:
        for name in ("tokens", "depth", "width", "branches"):
            if not 1 <= getattr(self, name) <= 63:
                raise UsageError(f"eagle: {name}={getattr(self, name)} is out of range: use 1 to 63")


@dataclass(frozen=True)
class EagleFitConfig(DraftFitConfig):
    intermediate: int = 0  # of the layer's feed-forward block; 0: the target's, at most twice the hidden size
    states: float = 1.0  # weight of the loss of hidden states
    law: float = 1.0  # weight of the loss of tokens; 0.1 in the paper, whose hidden states are larger
    unroll: int = 1  # guesses in a row that are trained; 1: from true hidden states alone
    fade: float = 0.8  # weight of each further guess of these
    checked: int = 4  # guesses in a row that are measured

    def __post_init__(self) -> None:
        DraftFitConfig.__post_init__(self)
        if min(self.intermediate, self.states, self.law, self.fade) < 0 or not self.states + self.law:
            raise UsageError("eagle: intermediate, states, law and fade are not negative, and a loss has some weight")
        if not (1 <= self.unroll <= 15 and 1 <= self.checked <= 15):
            raise UsageError("eagle: unroll and checked are out of range: use 1 to 15")


class EagleNetwork(DraftNetwork):
    def __init__(self, target: FrozenTarget, config: EagleFitConfig):
        super().__init__()
        self.target, self.config = target, config
        width = target.config.hidden_size
        self.joint: Matrix = drawn(width, 2 * width)
        self.bias = nn.Parameter(torch.zeros(width))
        self.layer = DraftLayer(target.config, config.intermediate or min(target.config.intermediate_size, 2 * width))

    def joined(self, tokens: Tensor, states: Tensor) -> Tensor:
        """Tokens [..] and the hidden states before them [.., d] -> z [.., d]."""
        both = torch.cat((self.target.embed(tokens).to(self.dtype), states.to(self.dtype)), dim=-1)
        return product(both, self.joint) + self.bias

    def stages(self, lesson: Lesson, count: int, tokens: list[Tensor] | None = None) -> list[Tensor]:
        """Hidden states [B, R, d] that rows guess, one tensor an offset. `tokens`: what is fed behind the first, by
        default the likeliest token of each guess."""
        states, found = lesson.hidden[:, :-1], []
        fed = lesson.tokens[:, 1:]
        positions = torch.arange(lesson.rows, device=fed.device).expand(fed.shape)
        causal: list[tuple[Tensor, Tensor]] = []
        own: list[tuple[Tensor, Tensor]] = []
        for offset in range(count):
            z = self.joined(fed, states)
            q, k, v = self.layer.heads(self.layer.project(z), positions + offset)
            (own if causal else causal).append((k, v))
            states = self.layer.finish(z, branch_attention(q, causal, own, self.layer.scale))
            found.append(states)
            if offset + 1 < count:
                fed = self.likeliest(states) if tokens is None else tokens[offset]
        return found

    def likeliest(self, states: Tensor) -> Tensor:
        return self.target.tokens(self.target.logits(states.detach()).argmax(-1))

    def losses(self, lesson: Lesson) -> dict[str, Tensor]:
        from fewer.training.losses import distillation

        config, found = self.config, dict[str, Tensor]()
        padded = nn.functional.pad(lesson.tokens, (0, config.unroll))
        fed = [padded[:, 2 + offset : 2 + offset + lesson.rows] for offset in range(config.unroll)]
        hidden = nn.functional.pad(lesson.hidden, (0, 0, 0, config.unroll))
        table = self.target.class_of()
        for offset, states in enumerate(self.stages(lesson, config.unroll, fed)):
            wanted = hidden[:, 1 + offset : 1 + offset + lesson.rows]
            right, weight = lesson.right(offset), config.fade**offset
            size = wanted[right >= 0].square().mean().sqrt().clamp_min(1e-6)
            distance = nn.functional.smooth_l1_loss(states.float() / size, wanted / size, reduction="none").mean(-1)
            scored = (right >= 0).float()
            found[f"states_{offset}"] = weight * config.states * (distance * scored).sum() / scored.sum().clamp_min(1)
            with torch.no_grad():
                law = self.target.logits(wanted)
            guessed = classes_of(table, right) >= 0  # what the target says is among what may be guessed
            found[f"law_{offset}"] = weight * config.law * distillation(self.target.logits(states), law, mask=guessed)
        return found

    def guesses(self, lesson: Lesson) -> list[Tensor]:
        return [self.likeliest(states) for states in self.stages(lesson, self.config.checked)]


class Context(Protocol):
    """What is asked of the target."""

    @property
    def transformer(self) -> Transformer: ...


def fit_eagle(model: FittedModel, data: TrainingText, config: EagleFitConfig, run: TrainingRun) -> Adapter:
    return fit_drafter(model, data, config, run, lambda target: EagleNetwork(target, config))


@method(
    "eagle",
    slot="decoding",
    paper="2406.16858",
    lossless=True,
    config=EagleConfig,
    fit=fit_eagle,
    fit_config=EagleFitConfig,
)
class Eagle:
    """The strategy: the layer, and what the gate has learnt."""

    lossless = True

    def __init__(self, config: EagleConfig | None, context: Context, *, adapter: Adapter):
        self.config = config or EagleConfig()
        self.network = load_eagle(context.transformer, adapter)
        self.gate = draft_growth.Gate(self.config.gate)

    def drafter(self, sampling: SamplingConfig, row: int) -> Drafter | None:
        return EagleDrafter(self.network, self.gate, self.config)


@torch.inference_mode()
def load_eagle(model: Transformer, adapter: Adapter) -> EagleNetwork:
    known = {field.name for field in fields(EagleFitConfig)}
    fitted = EagleFitConfig(**{key: value for key, value in adapter.provenance.config.items() if key in known})
    network = EagleNetwork(FrozenTarget(model, adapter.tensors.get(VOCABULARY)), fitted)
    return for_drafting(network, adapter.tensors)


class EagleDrafter:
    """One sequence: a slot of the layer for each token behind a true hidden state, and behind them those of a draft."""

    lossless = True

    def __init__(self, network: EagleNetwork, gate: draft_growth.Gate, config: EagleConfig):
        self.network = network
        self.grower = draft_growth.Grower(
            gate, draft_growth.Shape(config.tokens, config.depth, config.width, config.branches)
        )
        self.start(())

    def start(self, prompt: Sequence[int]) -> None:
        target = self.network.target
        self.states = ObservedStates()
        self.slots = DraftCache(target.config, target.dtype, target.device)
        self.guessed = torch.empty(0)  # [m, d]: hidden states behind the nodes that were expanded
        self.paths: list[list[int]] = []  # the draft's slots that each of them sees
        self.last = torch.empty(0)  # [1, 1, d]: z of the context's last token

    def observe(self, hidden: Tensor) -> None:
        self.states.observe(hidden)

    @torch.inference_mode()
    def propose(self, context: Sequence[int], limit: int) -> DraftTree:
        new = self.states.take(len(context))
        if new is None:
            return tree.root(context[-1])
        self.slots.forget_draft()
        hidden, first = new
        if len(hidden):
            tokens = torch.tensor(context[first + 1 :], device=hidden.device)
            z = self.network.joined(tokens, hidden)[None]
            places = torch.arange(first, first + len(hidden), device=hidden.device)[None]
            k, v = self.network.layer.heads(self.network.layer.keys_values(z), places, "kv")
            self.slots.append(k, v, commit=True)
            self.last = z[:, -1:]
        self.position = len(context) - 2  # of the last hidden state
        return self.grower.grow(context[-1], limit, self._expand)

    def accept(self, tokens: Sequence[int]) -> None:
        self.grower.accepted(tokens)

    def _expand(self, parents: list[int], tokens: list[int]) -> draft_growth.Level:
        layer, sees = self.network.layer, None
        paths: list[list[int]] = [[]]
        if parents == [-1]:
            z = self.last
            places = torch.tensor([[self.position]], device=z.device)
            q = layer.heads(layer.project(z), places)[0]
            self.guessed = z[0, :0]
        else:
            fed = torch.tensor(tokens, device=self.last.device)
            z = self.network.joined(fed, self.guessed[parents])[None]
            start = self.slots.used - self.slots.committed
            paths = [[*self.paths[parent], start + place] for place, parent in enumerate(parents)]
            places = torch.full((1, len(tokens)), self.position + len(paths[0]), device=z.device)
            q, k, v = layer.heads(layer.project(z), places)
            self.slots.append(k, v)
            sees = self.slots.mask(paths)
        states = layer.finish(z, self.slots.attend(q, layer.scale, sees))[0]  # [m, d]
        self.paths = paths if parents == [-1] else self.paths + paths
        self.guessed = torch.cat((self.guessed, states))
        return draft_growth.children(
            self.network.target.logits(states), self.network.target.tokens, self.grower.shape.width
        )
