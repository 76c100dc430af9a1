"""Aggressive decoding: where an answer edits a text of the prompt, guess that the text goes on unchanged.

Paper: Lossless Acceleration for Seq2seq Generation with Aggressive Decoding, arXiv 2205.10350 (input-guided aggressive
decoding). Differs from it: the source is the prompt, or the part behind a marker, not an encoder's input; matches of up
to 8 tokens are told apart, not 3; and a round guesses as many tokens as pay (`max_ngram=3,block=whole` is the paper's).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fewer.decoding.copy_drafter import Block, CopyDrafter, CopySettings, Resync
from fewer.decoding.draft_gate import PassCost
from fewer.decoding.sampling import SamplingConfig
from fewer.errors import UsageError
from fewer.registry import method
from fewer.slots import Drafter


@dataclass(frozen=True)
class AggressiveConfig:
    tokens: int = 31  # guessed tokens a round, at most
    max_ngram: int = 8  # how many tokens of a match are looked at; the paper has 3
    resync: Resync = "unique"  # where a copy goes on after an edit
    block: Block = "adaptive"  # as many guesses as pay, or all up to `tokens`
    source: str | None = None  # the text to be edited begins behind the first of these characters; none: anywhere
    pass_cost: float | None = None  # of a pass over one token, what each further one costs; none: timed

    def __post_init__(self) -> None:
        if not 1 <= self.tokens <= 63:
            raise UsageError(f"aggressive: tokens={self.tokens} is out of range: use 1 to 63")
        if not 1 <= self.max_ngram <= 64:
            raise UsageError(f"aggressive: max_ngram={self.max_ngram} is out of range: use 1 to 64")
        if self.source == "":
            raise UsageError("aggressive: source is empty: give the characters in front of the text, or none")
        if self.pass_cost is not None and not 0 <= self.pass_cost <= 2:
            raise UsageError(f"aggressive: pass_cost={self.pass_cost} is out of range: use 0 to 2, or none")


@method("aggressive", slot="decoding", paper="2205.10350", lossless=True, config=AggressiveConfig)
class Aggressive:
    """The strategy. What a pass costs is learnt once for all texts, how long copies hold for each text."""

    lossless = True

    def __init__(self, config: AggressiveConfig | None = None, context: Any = None):
        """`context`: the language model; None: without a tokenizer."""
        config = config or AggressiveConfig()
        self.settings = CopySettings(
            config.tokens, config.max_ngram, config.resync, config.block, config.source, config.pass_cost
        )
        self.context, self.cost = context, PassCost()

    def drafter(self, sampling: SamplingConfig, row: int) -> Drafter | None:
        tokenizer = None if self.context is None else self.context.tokenizer
        return CopyDrafter(self.settings, self.cost, tokenizer)
