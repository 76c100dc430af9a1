"""Needles in a haystack: can a recipe still find one sentence of a long text, wherever it stands?

A passkey or a plain fact is hidden at each depth of texts of each length, and asked for at their end. The prompt is
prefilled in chunks through the recipe's cache. The answer's tokens are then fed one at a time, as generation does, and
scored; and the recipe's own decoding answers greedily, which is right when its words begin with the hidden ones.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewer.decoding.generate import generate
from fewer.decoding.sampling import SamplingConfig, argmax
from fewer.engine.session import Session
from fewer.errors import UsageError
from fewer.evaluation.perplexity import surprise
from fewer.language_model import LanguageModel
from fewer.training.haystack import Haystack
from fewer.training.passkeys import KINDS, HiddenAnswer, Kind, hidden_answer, question

DEFAULT_LENGTHS = (1024, 2048, 4096)


@dataclass(frozen=True)
class NeedleSettings:
    lengths: tuple[int, ...] = ()  # tokens of prompt and answer together; none: `DEFAULT_LENGTHS` that fit the context
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)  # share of the text before the needle
    samples: int = 1  # texts of each length and depth
    kind: Kind = "passkey"
    words: int = 8  # of a passkey
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"unknown kind '{self.kind}': choose one of {', '.join(KINDS)}")
        for name in ("samples", "words"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}: use 1 or more")
        if self.lengths and min(self.lengths) < 1:
            raise UsageError(f"the lengths are {list(self.lengths)}: use 1 token or more")
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise UsageError(f"the depths are {list(self.depths)}: give at least one, each from 0 to 1")


@dataclass(frozen=True)
class Trial:
    """One text with one hidden sentence."""

    length: int  # tokens of prompt and answer together
    depth: float
    sample: int
    exact: bool  # the words of the greedy answer begin with the hidden ones
    nll: float  # natural, mean over the answer's tokens
    answer: str
    generated: str
    kv_bytes: int  # allocated by the cache
    seconds: float


@dataclass(frozen=True)
class Cell:
    """All trials of one length and depth, or of several."""

    trials: int
    exact: float  # share, 0 to 1
    nll: float  # mean over trials, nats a token
    kv_bytes: int  # the most of any trial

    @classmethod
    def of(cls, trials: Sequence[Trial]) -> Cell | None:
        """None where nothing was tried."""
        if not trials:
            return None
        count = len(trials)
        return cls(
            count,
            sum(trial.exact for trial in trials) / count,
            sum(trial.nll for trial in trials) / count,
            max(trial.kv_bytes for trial in trials),
        )


def needle(
    model: LanguageModel,
    haystack: Haystack,
    settings: NeedleSettings,
    on_trial: Callable[[int, int, int], None] | None = None,
) -> Iterator[Trial]:
    """Every trial as it is done, short texts first. The same settings give every recipe the same texts.

    `on_trial(length, done, total)` is called before each. Raises UsageError for lengths that the context cannot hold.
    """
    settings = with_lengths(settings, model.context_length)
    check_lengths(model, settings)
    total, done = len(settings.lengths) * len(settings.depths) * settings.samples, 0
    for length in sorted(settings.lengths):
        for depth in settings.depths:
            for sample in range(settings.samples):
                if on_trial is not None:
                    on_trial(length, done, total)
                hidden = hide(haystack, settings, length, depth, sample)
                yield _try(model, hidden, length, depth, sample)
                done += 1
    if on_trial is not None:
        on_trial(max(settings.lengths), total, total)


def with_lengths(settings: NeedleSettings, context: int) -> NeedleSettings:
    """The settings, with default lengths that fit the context where they have none: at least one of them."""
    fitting = tuple(length for length in DEFAULT_LENGTHS if length <= context)
    return settings if settings.lengths else replace(settings, lengths=fitting or (context,))


def check_lengths(model: LanguageModel, settings: NeedleSettings) -> None:
    """Raises UsageError for a text beyond the context, except where the cache renumbers positions."""
    longest, context = max(settings.lengths), model.context_length
    if longest > context and not model.new_cache(1, 1).renumbers:
        raise UsageError(
            f"a text of {longest} tokens does not fit the model's context of {context}: use shorter --lengths"
        )


def hide(haystack: Haystack, settings: NeedleSettings, length: int, depth: float, sample: int) -> HiddenAnswer:
    """The text of one trial. Its needle and its part of the haystack depend on seed, length, depth and sample alone."""
    generator = random.Random(f"{settings.seed}/{length}/{depth}/{sample}")
    asked = question(settings.kind, generator, settings.words)
    return hidden_answer(haystack, asked, depth, length, generator.randrange(len(haystack)))


@torch.inference_mode()
def _try(model: LanguageModel, hidden: HiddenAnswer, length: int, depth: float, sample: int) -> Trial:
    start = time.perf_counter()
    session = model.session(1, length)
    after_prompt = session.prefill([hidden.prompt])  # [1, V]
    nll = _answer_nll(session, hidden.answer, after_prompt)
    kv_bytes = session.cache.nbytes
    tokens = _greedy(model, session, hidden, int(argmax(after_prompt[0])))
    said = model.tokenizer.decode(tokens)
    exact, seconds = begins_with(said, hidden.text), time.perf_counter() - start
    return Trial(length, depth, sample, exact, nll, hidden.text, said.strip(), kv_bytes, seconds)


def _answer_nll(session: Session, answer: Sequence[int], logits: Tensor) -> float:
    """Mean negative log-likelihood of `answer`, fed through the decode path; `logits` [1, V] stand before it."""
    total = 0.0
    for place, token in enumerate(answer):
        total += float(surprise(logits, [token]))
        if place + 1 < len(answer):
            logits = session.decode([token])
    return total / len(answer)


def _greedy(model: LanguageModel, session: Session, hidden: HiddenAnswer, first: int) -> list[int]:
    """The recipe's greedy answer, at most as long as the hidden one. A lossless way of decoding emits what plain
    decoding does, which can go on from the prompt that is there; any other one starts from the front."""
    limit, stops = len(hidden.answer), model.tokenizer.eos_tokens
    if not model.strategy.lossless:
        fresh = model.session(1, len(hidden.prompt) + limit)
        events = generate(fresh, [hidden.prompt], SamplingConfig(), model.strategy, limit, stops)
        return [token for event in events for token in event.tokens]
    tokens = [first]
    following = _back_to(session, model, hidden).greedy(first, limit - 1)
    while tokens[-1] not in stops and len(tokens) < limit:
        tokens.append(next(following))
    return tokens


def _back_to(session: Session, model: LanguageModel, hidden: HiddenAnswer) -> Session:
    """A session that holds the prompt and nothing else: this one if its cache can forget the answer, or a new one."""
    slack = session.cache.slack
    if slack is None or slack >= len(hidden.answer):
        session.rollback([len(hidden.prompt)])
        return session
    fresh = model.session(1, len(hidden.prompt) + len(hidden.answer))
    fresh.prefill([hidden.prompt])
    return fresh


def begins_with(said: str, answer: str) -> bool:
    """Whether the words of `said` begin with those of `answer`; case and punctuation do not count."""
    wanted = _words(answer)
    return _words(said)[: len(wanted)] == wanted


def _words(text: str) -> list[str]:
    kept = "".join(character if character.isalnum() or character.isspace() else " " for character in text.lower())
    return kept.split()
