"""Aggressive decoding with tolerance: a copied token stays where it is nearly the target's own choice.

Paper: Lossless Acceleration for Seq2seq Generation with Aggressive Decoding, arXiv 2205.10350 (the rule of GAD++).
Differs from it: the guesses are copied from the prompt, as in `aggressive`, and not made by a trained drafter; sampled
text is verified exactly. Not lossless: what the target would change by a small margin stays as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fewer.decoding.copy_drafter import CopyDrafter, CopySettings
from fewer.decoding.draft_gate import PassCost
from fewer.decoding.sampling import Sampler, SamplingConfig, argmax, penalise
from fewer.decoding.tree import children
from fewer.decoding.verifier import accept
from fewer.errors import UsageError
from fewer.registry import method
from fewer.slots import Drafter, DraftTree


@dataclass(frozen=True)
class AggressivePlusConfig:
    tokens: int = 31  # guessed tokens a round, at most
    beta: int = 3  # a guess is accepted among so many most likely tokens; 1: exact
    tau: float = 1.0  # if its log-probability is no more than this below the largest, in nats; 0: exact
    source: str | None = None  # the text to be edited begins behind the first of these characters; none: anywhere

    def __post_init__(self) -> None:
        if not 1 <= self.tokens <= 63:
            raise UsageError(f"aggressive-plus: tokens={self.tokens} is out of range: use 1 to 63")
        if not 1 <= self.beta <= 1000:
            raise UsageError(f"aggressive-plus: beta={self.beta} is out of range: use 1 to 1000")
        if not 0 <= self.tau <= 100:
            raise UsageError(f"aggressive-plus: tau={self.tau} is out of range: use 0 to 100 nats")
        if self.source == "":
            raise UsageError("aggressive-plus: source is empty: give the characters in front of the text, or none")


@method("aggressive-plus", slot="decoding", paper="2205.10350", lossless=False, config=AggressivePlusConfig)
class AggressivePlus:
    """The strategy: the drafter of `aggressive`, and a rule of its own for what is accepted."""

    lossless = False

    def __init__(self, config: AggressivePlusConfig | None = None, context: Any = None):
        """`context`: the language model; None: without a tokenizer."""
        self.config, self.context, self.cost = config or AggressivePlusConfig(), context, PassCost()

    def drafter(self, sampling: SamplingConfig, row: int) -> Drafter | None:
        tokenizer = None if self.context is None else self.context.tokenizer
        return CopyDrafter(CopySettings(self.config.tokens, source=self.config.source), self.cost, tokenizer)

    def rule(self, tree: DraftTree, logits: Tensor, sampler: Sampler, context: Sequence[int]) -> tuple[list[int], int]:
        """(accepted nodes, the next token), as `verifier.accept`: logits [n + 1, V]."""
        if not sampler.greedy:
            return accept(tree, logits, sampler, context)
        below, path, history = children(tree), [0], list(context)
        while True:
            row = penalise(logits[path[-1]], history, sampler.config.repetition_penalty)
            best = int(argmax(row))
            guesses = below[path[-1]]
            node = next((each for each in guesses if tree.tokens[each] == best), None)
            if node is None:
                node = next((each for each in guesses if self._is_near(row, tree.tokens[each])), None)
            if node is None:
                return path, best
            path.append(node)
            history.append(tree.tokens[node])

    def _is_near(self, row: Tensor, token: int) -> bool:
        """A gap of logits is one of log-probabilities. Of equally likely tokens, the rank counts those above."""
        gap, rank = float(row.max() - row[token]), int((row > row[token]).sum())
        return self.config.beta > 1 and rank < self.config.beta and gap <= self.config.tau
