"""The drafter of aggressive decoding: copies a text of the prompt, at a place that follows what is emitted.

Source: arXiv 2205.10350, input-guided aggressive decoding. The settings `CopySettings(max_ngram=3, block="whole")` are
its own.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from fewer.decoding import tree
from fewer.decoding.copy_source import CopySource, Place
from fewer.decoding.draft_gate import Chances, PassCost, best_length
from fewer.slots import DraftTree

Resync = Literal["nearest", "unique", "index"]
Block = Literal["adaptive", "whole"]
CLASSES = 7  # of how long a copy has held: 0, 1, 2-3, 4-7, … 64 tokens and more


class Tokenizer(Protocol):
    """What is asked of the model's."""

    @property
    def eos_tokens(self) -> Collection[int]: ...

    def piece(self, token: int) -> bytes: ...


@dataclass(frozen=True)
class CopySettings:
    tokens: int = 31  # guessed tokens a round, at most
    max_ngram: int = 8  # how many tokens of a match are looked at
    resync: Resync = "unique"  # where a copy goes on after an edit: see `CopySource`; index: as if nothing moved
    block: Block = "adaptive"  # as many guesses as pay, or all up to `tokens`
    source: str | None = None  # the source begins behind the first of these characters; None: it is the whole prompt
    pass_cost: float | None = None  # of a pass over one token, what each further one costs; None: timed


class CopyDrafter:
    """Copies from the prompt, at a place that follows what is emitted."""

    lossless = True

    def __init__(self, settings: CopySettings, cost: PassCost, tokenizer: Tokenizer | None = None):
        self.settings, self.cost, self.tokenizer = settings, cost, tokenizer
        share = settings.pass_cost
        self.given = None if share is None else [1 + share * guesses for guesses in range(settings.tokens + 1)]
        self.stops: Collection[int] = () if tokenizer is None else frozenset(tokenizer.eos_tokens)
        self.start([])

    def start(self, prompt: Sequence[int]) -> None:
        begin = 0 if self.settings.source is None else self._behind_marker(prompt, self.settings.source)
        self.source = CopySource(prompt[begin:], self.settings.max_ngram)
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
            limit = min(limit, self.settings.tokens, len(self.source) - at)
            if self.settings.block == "adaptive":
                costs = self.given or self.cost.relative(self.settings.tokens + 1)
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
        longest = min(self.settings.max_ngram, len(context) - self.prompt_length)
        text = context[len(context) - longest :] if longest else ()
        resync, place = self.settings.resync, None
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
