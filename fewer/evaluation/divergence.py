"""How far a compressed model is from the uncompressed one: KL divergence, and greedy tokens that stay the same.

Both are measured on text that the uncompressed model writes, fed to both models one token at a time through the decode
path, so that weights and cache methods act as they do in use. The same pass scores prompt and text for perplexity.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewer.engine.session import Session
from fewer.evaluation.perplexity import prefill_logits, surprise
from fewer.language_model import LanguageModel


@dataclass(frozen=True)
class Reference:
    """Greedy text of the uncompressed model after `prompt`, with its law before each token."""

    prompt: list[int]
    tokens: list[int]
    log_probabilities: Tensor  # [n, V] float32, on the CPU


@dataclass(frozen=True)
class Divergence:
    """Sums over `tokens` places; add results of several prompts, then read the means."""

    kl_sum: float = 0.0  # KL(uncompressed || compressed), nats
    unchanged: int = 0  # places where both models' most likely token is the same
    tokens: int = 0
    nll: float = 0.0  # of prompts (without their first tokens) and texts, nats
    scored: int = 0  # tokens that `nll` sums over

    @property
    def kl(self) -> float:
        """Mean, in nats a token."""
        return self.kl_sum / self.tokens if self.tokens else 0.0

    @property
    def agreement(self) -> float:
        """Share of greedy tokens unchanged, 0 to 1."""
        return self.unchanged / self.tokens if self.tokens else 1.0

    @property
    def perplexity(self) -> float:
        mean = self.nll / self.scored if self.scored else 0.0
        return math.exp(mean) if mean < 700 else math.inf

    def __add__(self, other: Divergence) -> Divergence:
        return Divergence(
            self.kl_sum + other.kl_sum,
            self.unchanged + other.unchanged,
            self.tokens + other.tokens,
            self.nll + other.nll,
            self.scored + other.scored,
        )


@torch.inference_mode()
def reference(
    model: LanguageModel, prompt: Sequence[int], max_tokens: int, stop_tokens: Collection[int] = ()
) -> Reference:
    """Let the uncompressed model write up to `max_tokens` greedy tokens."""
    session = model.session(1, len(prompt) + max_tokens)
    (logits, _), rows, tokens = _read_prompt(model, session, list(prompt)), [], []
    while True:
        rows.append(logits.float().log_softmax(-1).cpu())
        tokens.append(int(rows[-1].argmax()))
        if len(tokens) == max_tokens or tokens[-1] in stop_tokens:
            return Reference(list(prompt), tokens, torch.stack(rows))
        logits = session.decode([tokens[-1]])[0]


@torch.inference_mode()
def divergence(model: LanguageModel, text: Reference) -> Divergence:
    """Feed the reference's tokens to `model` and compare the laws before each of them."""
    session = model.session(1, len(text.prompt) + len(text.tokens))
    logits, nll = _read_prompt(model, session, text.prompt)
    total, unchanged = 0.0, 0
    for place, (token, p) in enumerate(zip(text.tokens, text.log_probabilities, strict=True)):
        q = logits.float().log_softmax(-1).cpu()
        # A sum of terms of both signs: rounding may leave it a hair below zero.
        total += max(0.0, float((p.exp() * (p - q)).sum(dtype=torch.float64)))
        unchanged += int(q.argmax()) == token
        nll -= float(q[token])
        if place + 1 < len(text.tokens):
            logits = session.decode([token])[0]
    count = len(text.tokens)
    return Divergence(total, unchanged, count, nll, count + len(text.prompt) - 1)


def _read_prompt(model: LanguageModel, session: Session, prompt: list[int]) -> tuple[Tensor, float]:
    """Prefill, scoring the prompt on the way -> logits after its last token [V], summed negative log-likelihood."""
    nll = 0.0
    for begin, logits in prefill_logits(model, session, prompt):  # [n, V]
        following = prompt[begin + 1 : begin + 1 + len(logits)]
        nll += float(surprise(logits[: len(following)], following).double().sum())
    return logits[-1], nll
