"""Training drafters that read the target's hidden states: what the target teaches, the run, and what is measured.

A lesson is a batch of the target's text with its hidden states. Row i of a drafter knows the hidden states up to h_i
and the token x_{i+1} behind it, and guesses x_{i+2}, x_{i+3}, … at once; guess k of row i is right when it is what the
target says behind x_0 .. x_{i+1+k}. Labels are by default the target's own most likely tokens, which is what greedy
verification accepts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from torch import Tensor, nn

from fewer.decoding.draft_layer import narrow
from fewer.decoding.frozen_target import FrozenTarget, frequent_tokens
from fewer.errors import UsageError
from fewer.model.step import Step

if TYPE_CHECKING:
    from fewer.training import Adapter, FittedModel, TrainingRun, TrainingText
    from fewer.training.answers import Answer, AnswerBatch

VOCABULARY = "vocabulary"  # the adapter's tensor of tokens that are guessed
HELD_OUT = 64  # answers that are not trained on, at most; a tenth of few
CHUNK = {"cpu": 512, "cuda": 8192}  # tokens whose logits are computed at once


@dataclass(frozen=True)
class DraftFitConfig:
    """What all of these drafters can be told."""

    steps: int = 4000  # updates
    batch: int = 16  # answers in an update
    learning_rate: float = 1e-3  # at its height; it falls as a cosine
    length: int = 256  # tokens of an answer, or of a block of a text
    source: Literal["answers", "text"] = "answers"  # the target's answers to prompts of the text, or the text itself
    answers: int = 16_000  # that the target writes
    temperature: float = 0.6  # that it samples them with; 0: the most likely tokens
    labels: Literal["argmax", "text"] = "argmax"  # what is right: what the target finds most likely, or what is there
    vocabulary: int = 8192  # most frequent tokens, which alone are guessed; 0: all
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("steps", 1), ("batch", 1), ("learning_rate", 1e-8), ("length", 16), ("answers", 2)):
            if getattr(self, name) < low:
                raise UsageError(f"drafters: {name}={getattr(self, name)} is not allowed: use {low} or more")
        if self.vocabulary < 0 or self.temperature < 0:
            raise UsageError("drafters: vocabulary and temperature cannot be negative: use 0 or more")


@dataclass(frozen=True)
class Lesson:
    """What the target says of a batch of its text."""

    tokens: Tensor  # [B, T] int64
    hidden: Tensor  # [B, T, d] float32, after the final norm
    following: Tensor  # [B, T] int64: the right token behind each, -1 where it is not scored

    @property
    def rows(self) -> int:
        """R = T - 1 rows, of which the last knows all tokens and all hidden states but the last."""
        return self.tokens.shape[1] - 1

    def right(self, guess: int) -> Tensor:
        """[B, R] int64: the token that guess number `guess` of each row should be; -1: not scored, or behind the
        end."""
        labels = self.following[:, 1 + guess :]
        return nn.functional.pad(labels, (0, self.rows - labels.shape[1]), value=-1)


class DraftNetwork(nn.Module):
    """What a method trains. `target` is frozen and no part of the state."""

    target: FrozenTarget

    @property
    def dtype(self) -> torch.dtype:
        """That it computes in."""
        return next(self.parameters()).dtype

    def losses(self, lesson: Lesson) -> dict[str, Tensor]:
        """Named scalars, to be added up."""
        raise NotImplementedError

    def guesses(self, lesson: Lesson) -> list[Tensor]:
        """Tokens [B, R] that each row guesses, one tensor an offset, from its own earlier guesses as in drafting."""
        raise NotImplementedError


class Teacher:
    """The target, saying what follows its own text."""

    def __init__(self, model: FittedModel, labels: Literal["argmax", "text"]):
        self.model, self.labels = model, labels
        self.device = model.transformer.device

    def lesson(self, batch: AnswerBatch) -> Lesson:
        tokens = batch.tokens.to(self.device)
        count, width = tokens.shape
        places = torch.arange(width, device=self.device)
        step = Step(tokens, places.expand(count, width), logits="none", hidden=True)
        hidden = self.model.runner.step(step, self.model.new_cache(count, width)).hidden
        assert hidden is not None
        if self.labels == "text":
            following = nn.functional.pad(tokens[:, 1:], (0, 1), value=-1)
        else:
            following = self._most_likely(hidden)
        prompts, lengths = batch.prompts.to(self.device)[:, None], batch.lengths.to(self.device)[:, None]
        scored = (places >= prompts - 1) & (places < lengths - 1)
        return Lesson(tokens, hidden.float().clone(), following.masked_fill(~scored, -1))

    @torch.inference_mode()
    def _most_likely(self, hidden: Tensor) -> Tensor:
        """hidden [B, T, d] -> [B, T]."""
        parts = hidden.flatten(0, 1).split(CHUNK.get(self.device.type, 512))
        return torch.cat([self.model.transformer.logits(part).argmax(-1) for part in parts]).view(hidden.shape[:2])


Network = TypeVar("Network", bound=DraftNetwork)
Build = Callable[[FrozenTarget], DraftNetwork]


def fit_drafter(
    model: FittedModel, data: TrainingText, config: DraftFitConfig, run: TrainingRun, build: Build
) -> Adapter:
    """Gather text, train what `build` makes, and measure it on answers that were not trained on."""
    from fewer.training.answers import AnswerBatches
    from fewer.training.trainer import TrainerConfig

    answers = training_answers(model, data, config, run)
    held_out = min(HELD_OUT, max(1, len(answers) // 10))
    answers, checked = answers[:-held_out], answers[-held_out:]
    batches = AnswerBatches(answers, min(config.batch, len(answers)), model.context_length, config.seed)
    vocabulary = frequent_tokens((tokens for tokens, _ in batches.rows), config.vocabulary, model.config.vocab_size)
    teacher = Teacher(model, config.labels)
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = build(FrozenTarget(model.transformer, vocabulary, training=True)).to(teacher.device)

    def loss(batch: AnswerBatch) -> dict[str, Tensor]:
        lesson = teacher.lesson(batch)
        with narrowed(teacher.device):
            return network.losses(lesson)

    warmup = max(1, config.steps // 50)
    began = time.perf_counter()
    settings = TrainerConfig(config.steps, config.learning_rate, warmup=warmup, seed=config.seed)
    history = run.train(network, loss, batches, settings)
    seconds = time.perf_counter() - began
    found = measured(network, teacher, AnswerBatches(checked, min(4, held_out), model.context_length, config.seed))
    metrics = {
        "loss": sum(record.loss for record in history[-20:]) / len(history[-20:]),
        "seconds_per_step": seconds / len(history),
        "answer_tokens": float(batches.tokens),
        **found,
    }
    return run.adapter(stored(network), metrics)


def training_answers(model: FittedModel, data: TrainingText, config: DraftFitConfig, run: TrainingRun) -> list[Answer]:
    from fewer.training.answers import Answer, AnswerConfig, generated_answers

    if config.source == "answers":
        wanted = AnswerConfig(config.answers, config.length, config.temperature, config.seed)
        return generated_answers(model, None if data.is_built_in else data, wanted, run.on_part)
    tokens, length = model.tokenizer.encode(data.text), min(config.length, model.context_length)
    blocks = [Answer(tokens[start : start + length], 0) for start in range(0, len(tokens) - length + 1, length)]
    if len(blocks) < 2:
        raise UsageError(f"{data.name} has {len(tokens)} tokens, less than two blocks of {length}: give more text")
    return blocks


def stored(network: DraftNetwork) -> dict[str, Tensor]:
    """What the adapter keeps: matrices and norms in bfloat16, and the vocabulary."""
    tensors = {name: parameter.detach().bfloat16() for name, parameter in network.named_parameters()}
    if network.target.vocabulary is not None:
        tensors[VOCABULARY] = network.target.vocabulary.int()
    return tensors


def narrowed(device: torch.device) -> AbstractContextManager[object]:
    """On CUDA products run in bfloat16."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


@torch.inference_mode()
def measured(network: DraftNetwork, teacher: Teacher, batches: object) -> dict[str, float]:
    """Share of right guesses at each offset from the last hidden state's token, and tokens a round if each round
    drafted the chain: both over all rows whose guesses are all scored."""
    right: list[Tensor] = []
    for index in range(len(batches)):  # type: ignore[arg-type]
        lesson = teacher.lesson(batches.batch(index))  # type: ignore[attr-defined]
        with narrowed(teacher.device):
            guesses = network.guesses(lesson)
        wanted = [lesson.right(number) for number in range(len(guesses))]
        rows = torch.stack([each >= 0 for each in wanted]).all(0)
        right.append(torch.stack([(g == w)[rows] for g, w in zip(guesses, wanted, strict=True)]))
    return accuracies(torch.cat(right, dim=1))


def accuracies(right: Tensor) -> dict[str, float]:
    """right [offsets, rows] bool."""
    found = {f"right_at_{2 + offset}": float(each.float().mean()) for offset, each in enumerate(right)}
    return {**found, "chain_tau": 1 + float(right.long().cumprod(0).sum(0).float().mean())}


def cross_entropy(logits: Tensor, classes: Tensor) -> Tensor:
    """Mean over the rows whose class is not negative: logits [.., V'], classes [..]."""
    losses = nn.functional.cross_entropy(
        logits.float().flatten(0, -2), classes.flatten(), ignore_index=-1, reduction="sum"
    )
    return losses / (classes >= 0).sum().clamp_min(1)


def classes_of(table: Tensor, tokens: Tensor) -> Tensor:
    """The class of each token, -1 for -1 and for those that are never guessed."""
    return torch.where(tokens >= 0, table[tokens.clamp_min(0)], -1)


def load_network(network: DraftNetwork, tensors: Mapping[str, Tensor]) -> None:
    """Put an adapter's tensors into a network of the same settings. Raises CheckpointError where they do not fit."""
    from fewer.errors import CheckpointError

    given, wanted = dict(tensors), dict(network.named_parameters())
    given.pop(VOCABULARY, None)
    if set(given) != set(wanted) or any(given[name].shape != wanted[name].shape for name in wanted):
        odd = sorted(name for name in set(given) | set(wanted) if name not in given or name not in wanted)
        raise CheckpointError(f"the adapter's tensors do not fit its settings ({(odd or ['shapes'])[0]}): fit it again")
    for name, parameter in wanted.items():
        parameter.data.copy_(given[name])


@torch.inference_mode()
def for_drafting(network: Network, tensors: Mapping[str, Tensor]) -> Network:
    """The network with an adapter's tensors, on its target's device and in its dtype; on a CPU in 8 bits, unless the
    target computes in float32. Raises CheckpointError where the tensors do not fit."""
    load_network(network, tensors)
    target = network.target
    network = network.to(device=target.device, dtype=target.dtype)
    if target.is_narrow:
        narrow(network)
    return network
