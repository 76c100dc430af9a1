"""Where a copy goes on: places of a source text that the end of another text matches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

TOKEN_EVIDENCE = 3.0  # ln 20: a token matches by chance about once in so many places


class Place(NamedTuple):
    """`at` in the source is what comes next if the copy goes on; `matched` tokens before it are alike."""

    at: int
    matched: int


class CopySource:
    """A source text and where each of its tokens stands."""

    def __init__(self, tokens: Sequence[int], longest: int):
        """`longest`: how many tokens of a match are looked at."""
        self.tokens = list(tokens)
        self.longest = longest
        self.behind: dict[int, list[int]] = {}  # token -> the places behind it
        for place, token in enumerate(self.tokens, 1):
            self.behind.setdefault(token, []).append(place)

    def __len__(self) -> int:
        return len(self.tokens)

    def matches(self, text: Sequence[int]) -> list[Place]:
        """Every place behind the last token of `text`, with the length of the match."""
        return [Place(place, self._length(text, place)) for place in self.behind.get(text[-1], ())] if text else []

    def _length(self, text: Sequence[int], place: int) -> int:
        most, length, tokens = min(self.longest, len(text), place), 1, self.tokens
        while length < most and tokens[place - 1 - length] == text[-1 - length]:
            length += 1
        return length

    def unique(self, text: Sequence[int]) -> Place | None:
        """The paper's rule: the shortest end of `text` that the source has exactly once, if any is.

        With the match length of every place: the longest is that place, where no other is as long.
        """
        found = sorted(self.matches(text), key=lambda place: -place.matched)
        if not found or (len(found) > 1 and found[1].matched == found[0].matched):
            return None
        return found[0]

    def nearest(self, text: Sequence[int], expected: int | None) -> Place | None:
        """The place whose match says the most: each token of it counts for, and the distance from the `expected` place
        against it; the first of equals. Near by, a single token is enough; far away it takes a few."""

        def evidence(place: Place) -> float:
            distance = 0 if expected is None else abs(place.at - expected)
            return TOKEN_EVIDENCE * place.matched - math.log1p(distance)

        return max(self.matches(text), key=evidence, default=None)
