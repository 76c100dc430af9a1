"""Aggressive decoding: where an answer edits a text of the prompt, guess that the text goes on unchanged.

Paper: Lossless Acceleration for Seq2seq Generation with Aggressive Decoding, arXiv 2205.10350 (input-guided aggressive
decoding). Differs from it: the source is the prompt, or the part behind a marker, not an encoder's input; after an edit
the copy goes on at the nearest matching place, and not only where a match is unique (`resync=unique` is the paper's
rule); and a round guesses as many tokens as pay (`block=whole` is the paper's: all that is left, `tokens` at most).
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fewer.decoding import tree
from fewer.decoding.copy_source import CopySource, Place
from fewer.decoding.draft_gate import Chances, PassCost, best_length
from fewer.decoding.sampling import SamplingConfig
from fewer.errors import UsageError
from fewer.registry import method
from fewer.slots import Drafter, DraftTree

CLASSES = 7  # of how long a copy has held: 0, 1, 2-3, 4-7, … 64 tokens and more


@dataclass(frozen=True)
class AggressiveConfig:
    tokens: int = 31  # guessed tokens a round, at most
    max_ngram: int = 8  # how many tokens of a match are looked at; the paper has 3
    resync: Literal["nearest", "unique", "index"] = "nearest"  # where a copy goes on after an edit
    block: Literal["adaptive", "whole"] = "adaptive"  # as many guesses as pay, or all up to `tokens`
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
        self.config, self.context = config or AggressiveConfig(), context
        self.cost = PassCost()

    def drafter(self, sampling: SamplingConfig, row: int) -> Drafter | None:
        tokenizer = None if self.context is None else self.context.tokenizer
        return CopyDrafter(self.config, self.cost, tokenizer)


class CopyDrafter:
    """Copies from the prompt, at a place that follows what is emitted."""

    lossless = True

    def __init__(self, config: AggressiveConfig, cost: PassCost, tokenizer: Any = None):
        self.config, self.cost, self.tokenizer = config, cost, tokenizer
        share = config.pass_cost
        self.given = None if share is None else [1 + share * guesses for guesses in range(config.tokens + 1)]
        self.stops: Collection[int] = () if tokenizer is None else frozenset(tokenizer.eos_tokens)
        self.start([])

    def start(self, prompt: Sequence[int]) -> None:
        begin = 0 if self.config.source is None else self._behind_marker(prompt, self.config.source)
        self.source = CopySource(prompt[begin:], self.config.max_ngram)
        self.chances = Chances()  # that a copy holds for one more token
        self.prompt_length = self.followed = len(prompt)  # tokens of the context that were looked at
        # With a marker the answer is taken to begin where the source does; without, the first match says where.
        self.place = Place(0, 0) if begin else None
        self.expected: int | None = 0 if begin else None  # where the copy would be without the edit
        self.guessed: int | None = None  # guesses of the pass that runs now
        self.began = 0.0

    def _behind_marker(self, prompt: Sequence[int], marker: str) -> int:
        """The first token behind the marker; 0 where the prompt has none."""
        if self.tokenizer is None:
            return 0
        pieces = [self.tokenizer.piece(token) for token in prompt]
        text, wanted = b"".join(pieces), marker.encode()
        end = text.find(wanted) + len(wanted)
        if end < len(wanted):
            return 0
        at = 0
        for index, piece in enumerate(pieces):
            if at >= end:
                return index
            at += len(piece)
        return 0

    def propose(self, context: Sequence[int], limit: int) -> DraftTree:
        self._follow(context)
        guesses: list[int] = []
        if self.place is not None:
            at, matched = self.place
            limit = min(limit, self.config.tokens, len(self.source) - at)
            if self.config.block == "adaptive":
                costs = self.given or self.cost.relative(self.config.tokens + 1)
                limit = best_length(self._survival(matched, limit), costs)
            guesses = self._until_stop(self.source.tokens[at : at + limit])
        self.guessed, self.began = len(guesses), time.perf_counter()
        return tree.chain(context[-1], guesses)

    def _survival(self, matched: int, limit: int) -> list[float]:
        """The chances that 1, 2, … `limit` more tokens hold after `matched` ones. Where there is little to count yet,
        the rule of succession: after m tokens the next one fails with probability 1 / (m + 2)."""
        chances, survival = [], 1.0
        for held in range(matched, matched + limit):
            survival *= self.chances.of(_class(held), (held + 1) / (held + 2))
            chances.append(survival)
        return chances

    def _until_stop(self, guesses: list[int]) -> list[int]:
        """Nothing comes behind an end of text, which a chat's prompt has behind the text, too."""
        end = next((place for place, token in enumerate(guesses, 1) if token in self.stops), len(guesses))
        return guesses[:end]

    def accept(self, tokens: Sequence[int]) -> None:
        """Time the pass; the next `propose` brings the tokens."""
        if self.guessed is not None:
            self.cost.record(self.guessed + 1, time.perf_counter() - self.began)
            self.guessed = None

    def _follow(self, context: Sequence[int]) -> None:
        """Move along the source with what was emitted, whether it had been guessed or not."""
        source = self.source.tokens
        for token in context[self.followed :]:
            if self.expected is not None:
                self.expected += 1
            if self.place is None:
                continue
            at, matched = self.place
            held = source[at] == token
            self.chances.learn(_class(matched), held)
            self.place = self._inside(Place(at + 1, matched + 1)) if held else None
        self.followed = len(context)
        if self.place is None:
            self.place = self._resume(context)

    def _inside(self, place: Place | None) -> Place | None:
        """The place, unless the source is over there."""
        return place if place is not None and place.at < len(self.source) else None

    def _resume(self, context: Sequence[int]) -> Place | None:
        """Where a copy goes on, or begins."""
        longest = min(self.config.max_ngram, len(context) - self.prompt_length)
        text = context[len(context) - longest :] if longest else ()
        resync, place = self.config.resync, None
        if resync == "nearest":
            place = self.source.nearest(text, self.expected)
        elif resync == "unique" or self.expected is None:
            place = self.source.unique(text)
        if place is not None:
            self.expected = place.at
        elif resync != "unique" and self.expected is not None:
            place = Place(self.expected, 0)  # as if each token since the edit had taken the place of one
        return self._inside(place)


def _class(held: int) -> int:
    """Copies that held for about as long are counted together."""
    return min(held.bit_length(), CLASSES)
