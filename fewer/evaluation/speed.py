"""Rates of one model: time to first token, prefill and decoding, each from wall-clock times of real runs."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fewer.decoding.generate import generate
from fewer.decoding.sampling import SamplingConfig
from fewer.evaluation.memory import kv_bytes_read, weight_bytes_read
from fewer.language_model import LanguageModel


@dataclass(frozen=True)
class Spread:
    """A median with the lowest and highest of its rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Run:
    """One greedy answer, or a batch of them. Times in seconds; `passes` are target passes after the prefill."""

    tokens: list[int]  # of all answers
    first_seconds: float
    decode_seconds: float
    passes: int
    bytes_a_pass: int | None  # weights and keys and values, at the run's middle; None of a batch, where rows may share
    rows: int = 1
    kv_bytes: int = 0  # allocated at the end

    @property
    def decoded(self) -> int:
        """Tokens that passes after the prefill brought."""
        return len(self.tokens) - self.rows


def run(model: LanguageModel, prompt: Sequence[int], max_tokens: int, stop: bool = True) -> Run:
    """Answer one tokenised prompt, until `max_tokens` or, with `stop`, a token that ends the answer."""
    session = model.session(1, len(prompt) + max_tokens + 1)
    stops = model.tokenizer.eos_tokens if stop else frozenset()
    strategy = model.strategy  # before the clock starts: a draft model is loaded on first use
    tokens: list[int] = []
    keys_at_start = 0
    start = first = time.perf_counter()
    for event in generate(session, [prompt], SamplingConfig(), strategy, max_tokens, stops):
        if not tokens:
            first, keys_at_start = time.perf_counter(), session.cache.physical_lengths[0]
        tokens += event.tokens
    end = time.perf_counter()
    keys = (keys_at_start + session.cache.physical_lengths[0]) / 2
    read = weight_bytes_read(model) + kv_bytes_read(model, keys)
    return Run(tokens, first - start, end - first, session.passes, read, kv_bytes=session.cache.nbytes)


def run_batch(model: LanguageModel, prompts: Sequence[Sequence[int]], max_tokens: int) -> Run:
    """Answer several tokenised prompts at once, until each has ended."""
    session = model.session(len(prompts), max(map(len, prompts)) + max_tokens + 1)
    strategy = model.strategy
    tokens: list[int] = []
    waiting = set(range(len(prompts)))  # rows without a first token
    start = first = time.perf_counter()
    for event in generate(session, prompts, SamplingConfig(), strategy, max_tokens, model.tokenizer.eos_tokens):
        if event.row in waiting:
            waiting.remove(event.row)
            first = time.perf_counter()
        tokens += event.tokens
    seconds = time.perf_counter() - first
    return Run(tokens, first - start, seconds, session.passes, None, len(prompts), session.cache.nbytes)


def prefill_seconds(model: LanguageModel, prompt: Sequence[int]) -> tuple[float, int]:
    """Seconds until the logits after `prompt` are there, and the bytes that the cache has allocated for it."""
    session = model.session(1, len(prompt))
    start = time.perf_counter()
    session.prefill([list(prompt)])
    if model.transformer.device.type == "cuda":
        torch.cuda.synchronize(model.transformer.device)
    return time.perf_counter() - start, session.cache.nbytes


def decode_rate(runs: Sequence[Run]) -> float:
    """Tokens a second after the first, over several answers."""
    seconds = sum(each.decode_seconds for each in runs)
    return sum(each.decoded for each in runs) / seconds if seconds else 0.0


def read_rate(runs: Sequence[Run]) -> float:
    """Bytes a second that the target passes needed from memory; not a number where a run does not know."""
    seconds = sum(each.decode_seconds for each in runs)
    needed = sum(each.passes * (math.nan if each.bytes_a_pass is None else each.bytes_a_pass) for each in runs)
    return needed / seconds if seconds else 0.0


def tokens_a_pass(runs: Sequence[Run]) -> float:
    """Of all answers of a batch together."""
    passes = sum(each.passes for each in runs)
    return sum(each.decoded for each in runs) / passes if passes else 1.0
