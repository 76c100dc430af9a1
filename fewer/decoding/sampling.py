"""From logits to a token: the warped law, and the sampler that draws from it.

Order of warping: repetition penalty, temperature, top-k, top-p, min-p. Speculation needs the law itself, not only draws
from it, so `warp` returns exactly the probabilities that `Sampler.draw` uses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewer.errors import UsageError

NUCLEUS = 512  # top-p looks at this many largest probabilities first and sorts all of them only when it must
DRAFT_STREAM = 0x5DEECE66D  # keeps a drafter's random numbers apart from those of the target


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen. The default is greedy."""

    temperature: float = 0.0  # 0 = greedy
    top_k: int = 0  # keep the k largest (all that tie with the k-th too); 0 = all
    top_p: float = 1.0  # keep the fewest largest whose sum reaches this; 1 = all
    min_p: float = 0.0  # keep those with at least this fraction of the largest probability
    repetition_penalty: float = 1.0  # logits of tokens seen before are divided (positive) or multiplied (negative)
    seed: int | None = None  # row r of a batch uses seed + r; None = not reproducible

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature is {self.temperature}: use 0 (greedy) or a positive number")
        if self.top_k < 0:
            raise UsageError(f"top_k is {self.top_k}: use 0 (all tokens) or a positive count")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}: use a number above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise UsageError(f"min_p is {self.min_p}: use a number from 0 to 1")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise UsageError(f"repetition_penalty is {self.repetition_penalty}: use a positive number, 1 for none")
        if self.seed is not None and not 0 <= self.seed < 2**62:
            raise UsageError(f"seed is {self.seed}: use a whole number from 0 to 2^62 - 1")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def reads_history(self) -> bool:
        return self.repetition_penalty != 1


def argmax(logits: Tensor) -> Tensor:
    """logits [.., V] -> index of the largest [..], the lowest index on ties, as `Session.greedy` does too."""
    return torch.argmax(logits, dim=-1)


def penalise(logits: Tensor, history: Sequence[int], penalty: float) -> Tensor:
    """Divide positive and multiply negative logits [.., V] of the tokens in `history` by `penalty`."""
    if penalty == 1 or not history:
        return logits
    seen = torch.tensor(list(set(history)), device=logits.device)
    chosen = logits[..., seen]
    return logits.index_copy(-1, seen, torch.where(chosen > 0, chosen / penalty, chosen * penalty))


def warp(logits: Tensor, config: SamplingConfig, history: Sequence[int] = ()) -> Tensor:
    """logits [.., V] -> the law [.., V] float32 that the next token is drawn from; one-hot when greedy.

    `history` is what the repetition penalty sees: prompt and text so far, shared by all leading dimensions.
    """
    logits = penalise(logits.float(), history, config.repetition_penalty)
    if config.greedy:
        return torch.nn.functional.one_hot(argmax(logits), logits.shape[-1]).float()
    # The largest is subtracted first, so that a tiny temperature overflows to -inf (probability 0), never to NaN.
    scaled = (logits - logits.amax(-1, keepdim=True)) / config.temperature
    if 0 < config.top_k < scaled.shape[-1]:
        threshold = scaled.topk(config.top_k, dim=-1).values[..., -1:]
        scaled = scaled.masked_fill(scaled < threshold, -math.inf)
    law = scaled.softmax(-1)
    floor = law.amax(-1, keepdim=True) * config.min_p if config.min_p > 0 else None
    if config.top_p < 1:
        nucleus = _smallest_in_nucleus(law, config.top_p)
        floor = nucleus if floor is None else torch.maximum(floor, nucleus)
    if floor is None:
        return law
    law = law.masked_fill(law < floor, 0.0)
    return law / law.sum(-1, keepdim=True)


def _smallest_in_nucleus(law: Tensor, top_p: float) -> Tensor:
    """The smallest probability [.., 1] among the fewest largest ones whose sum reaches `top_p`."""
    for count in (min(NUCLEUS, law.shape[-1]), law.shape[-1]):
        largest = law.topk(count, dim=-1).values
        before = largest.cumsum(-1, dtype=torch.float64) - largest  # mass of the strictly earlier ones
        if count == law.shape[-1] or bool(((before + largest)[..., -1] >= top_p).all()):
            break
    kept = (before < top_p).sum(-1, keepdim=True)  # at least one: nothing comes before the first
    return largest.gather(-1, kept - 1)


def log_probability(logits: Tensor, token: int) -> float:
    """Natural logarithm of the model's own probability of `token`, before any warping; logits [V]."""
    return float(logits[token].float() - logits.float().logsumexp(-1))


class Sampler:
    """Random numbers and warping of one sequence. `row` (and `stream`) make streams of one seed independent."""

    def __init__(self, config: SamplingConfig, row: int = 0, stream: int = 0):
        self.config = config
        self.greedy = config.greedy
        self.generator = torch.Generator()
        if config.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed((config.seed + row) ^ stream)

    def uniform(self) -> float:
        """One number from [0, 1)."""
        return float(torch.rand((), generator=self.generator, dtype=torch.float64))

    def draw(self, law: Tensor) -> int:
        """A token from the law [V], which need not sum to one exactly; never one of probability zero."""
        cumulative = law.cumsum(-1, dtype=torch.float64)
        point = cumulative[-1:] * self.uniform()
        index = int(torch.searchsorted(cumulative, point, right=True))
        return index if index < law.shape[-1] else int(argmax(law))  # the product may round up to the total

    def token(self, logits: Tensor, history: Sequence[int]) -> int:
        """The next token after logits [V]."""
        if self.greedy:
            return int(argmax(penalise(logits, history, self.config.repetition_penalty)))
        return self.draw(warp(logits, self.config, history))
