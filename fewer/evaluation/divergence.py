"""How far a compressed model is from the uncompressed one: KL divergence, and greedy tokens that stay the same.

Both are measured on text that the uncompressed model writes, fed to both models one token at a time through the decode
path, so that weights and cache methods act as they do in use.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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

    @property
    def kl(self) -> float:
        """Mean, in nats a token."""
        return self.kl_sum / self.tokens if self.tokens else 0.0

    @property
    def agreement(self) -> float:
        """Share of greedy tokens unchanged, 0 to 1."""
        return self.unchanged / self.tokens if self.tokens else 1.0

    def __add__(self, other: Divergence) -> Divergence:
        return Divergence(
            self.kl_sum + other.kl_sum, self.unchanged + other.unchanged, self.tokens + other.tokens
        )


@torch.inference_mode()
def reference(
    model: LanguageModel, prompt: Sequence[int], max_tokens: int, stop_tokens: Collection[int] = ()
) -> Reference:
    """Let the uncompressed model write up to `max_tokens` greedy tokens."""
    session = model.session(1, len(prompt) + max_tokens)
    logits, rows, tokens = session.prefill([list(prompt)]), [], []
    while True:
        rows.append(logits[0].float().log_softmax(-1).cpu())
        tokens.append(int(rows[-1].argmax()))
        if len(tokens) == max_tokens or tokens[-1] in stop_tokens:
            return Reference(list(prompt), tokens, torch.stack(rows))
        logits = session.decode([tokens[-1]])


@torch.inference_mode()
def divergence(model: LanguageModel, text: Reference) -> Divergence:
    """Feed the reference's tokens to `model` and compare the laws before each of them."""
    session = model.session(1, len(text.prompt) + len(text.tokens))
    logits, total, unchanged = session.prefill([text.prompt]), 0.0, 0
    for place, (token, p) in enumerate(zip(text.tokens, text.log_probabilities, strict=True)):
        q = logits[0].float().log_softmax(-1).cpu()
        # A sum of terms of both signs: rounding may leave it a hair below zero.
        total += max(0.0, float((p.exp() * (p - q)).sum(dtype=torch.float64)))
        unchanged += int(q.argmax()) == token
        if place + 1 < len(text.tokens):
            logits = session.decode([token])
    return Divergence(total, unchanged, len(text.tokens))
