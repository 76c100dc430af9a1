"""Perplexity of a text over sliding windows, by prefill or one token at a time through the decode path."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fewer.engine.session import Session
from fewer.errors import UsageError
from fewer.language_model import LanguageModel
from fewer.model.step import Step

LOGITS_AT_ONCE = 1 << 24  # numbers: 64 MB of float32


@dataclass(frozen=True)
class PerplexityResult:
    """`nll`: natural, summed over the scored `tokens`."""

    perplexity: float
    tokens: int
    nll: float
    windows: int
    kv_bytes: int  # allocated for one window


@dataclass(frozen=True)
class Window:
    """Tokens begin..end of the text are fed; those from `scored` on are scored."""

    begin: int
    end: int
    scored: int


def windows(length: int, window: int, stride: int, first_is_known: bool = False) -> Iterator[Window]:
    """Cut `length` tokens into windows. No token is scored twice, nor the first of a window, because nothing predicts
    it, unless `first_is_known`: a token of the model's own (BOS) stands before it."""
    done = 0
    for begin in range(0, length, stride):
        end = min(begin + window, length)
        scored = max(done, begin + (0 if first_is_known else 1))
        if scored < end:
            yield Window(begin, end, scored)
        done = end
        if end == length:
            return


def perplexity(
    model: LanguageModel,
    text: str,
    window: int = 512,
    stride: int | None = None,
    limit: int | None = None,
    decode_path: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> PerplexityResult:
    """exp of the mean negative log-likelihood of `text`.

    Each window of `window` tokens starts `stride` (default: `window`) after the last and scores only tokens that no
    window before it has scored. A BOS is put before each window if the model wants one. `limit` cuts the text to that
    many tokens. `decode_path` feeds one token at a time, as generation does. `on_progress(done, total)` counts windows'
    tokens. Raises UsageError for a text of fewer than two tokens or windows that make no sense.
    """
    tokenizer = model.tokenizer
    bos = tokenizer.bos_token if tokenizer.adds_bos else None
    prefix = [] if bos is None else [bos]
    tokens = tokenizer.encode(text, bos=False)
    tokens = tokens if limit is None else tokens[:limit]
    stride = window if stride is None else stride
    _check(model, len(tokens), window, stride, limit)
    parts = list(windows(len(tokens), window - len(prefix), min(stride, window - len(prefix)), bool(prefix)))
    nll, scored, fed, kv_bytes = 0.0, 0, 0, 0
    total = sum(part.end - part.begin for part in parts)
    score = _by_decoding if decode_path else _by_prefill
    for part in parts:
        row = [*prefix, *tokens[part.begin : part.end]]
        first = part.scored - part.begin + len(prefix)  # the first scored token's place in `row`
        for place, values, allocated in score(model, row):
            done, kv_bytes = place + len(values), max(kv_bytes, allocated)
            nll += float(values[max(0, first - place) :].double().sum())
            if on_progress is not None:
                on_progress(min(fed + done, total), total)
        scored += part.end - part.scored
        fed += part.end - part.begin
    mean = nll / scored
    return PerplexityResult(math.exp(mean) if mean < 700 else math.inf, scored, nll, len(parts), kv_bytes)


Scores = Iterator[tuple[int, Tensor, int]]  # place of the first token, negative log-likelihoods [n], bytes of the cache


@torch.inference_mode()
def _by_prefill(model: LanguageModel, row: list[int]) -> Scores:
    session = model.session(1, len(row))
    for begin, logits in prefill_logits(model, session, row[:-1]):
        yield begin + 1, surprise(logits, row[begin + 1 : begin + 1 + len(logits)]), session.cache.nbytes


def prefill_logits(model: LanguageModel, session: Session, tokens: list[int]) -> Iterator[tuple[int, Tensor]]:
    """Feed `tokens` to an empty session in chunks: the place of each chunk's first token, logits [n, V] float32."""
    chunk = min(max(1, LOGITS_AT_ONCE // model.config.vocab_size), model.runner.chunk)
    chunk = min(chunk, session.cache.max_step or chunk)
    device = model.transformer.device
    session.cache.reserve(len(tokens))
    for begin in range(0, len(tokens), chunk):
        part = torch.tensor([tokens[begin : begin + chunk]], device=device)
        size = part.shape[1]
        positions = torch.arange(begin, begin + size, device=device)[None]
        logits = model.runner.step(Step(part, positions, logits="all"), session.cache).logits
        session.cache.commit([size])
        assert logits is not None
        yield begin, logits[0]


@torch.inference_mode()
def _by_decoding(model: LanguageModel, row: list[int]) -> Scores:
    session = model.session(1, len(row))
    logits = session.prefill([row[:1]])
    for place in range(1, len(row)):
        yield place, surprise(logits, [row[place]]), session.cache.nbytes
        if place + 1 < len(row):
            logits = session.decode([row[place]])


def surprise(logits: Tensor, tokens: list[int]) -> Tensor:
    """Negative log-likelihood of each token: logits [n, V] float32, n tokens -> [n] on the CPU."""
    wanted = torch.tensor(tokens, dtype=torch.int64, device=logits.device)[:, None]
    return (logits.logsumexp(-1) - logits.gather(-1, wanted)[:, 0]).cpu()


def _check(model: LanguageModel, length: int, window: int, stride: int, limit: int | None) -> None:
    if limit is not None and limit < 2:
        raise UsageError(f"limit is {limit}: perplexity needs at least 2 tokens")
    if length < 2:
        raise UsageError(f"the text has {length} token(s): perplexity needs at least 2")
    if window < 2:
        raise UsageError(f"window is {window}: use at least 2 tokens")
    if not 1 <= stride <= window:
        raise UsageError(f"stride is {stride}: use 1 to the window of {window}")
    if window > model.context_length and min(window, length) > model.context_length:
        raise UsageError(f"window is {window}, but the model's context holds {model.context_length}: use a smaller one")
