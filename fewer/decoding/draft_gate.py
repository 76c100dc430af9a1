"""How much of a draft pays on this machine: the measured cost of a pass, and how often guesses like these were right.

No paper. A draft of n nodes is worth (1 + sum of the nodes' chances) tokens for the time of a pass over n + 1; the gate
keeps the beginning of the draft for which that rate is highest, which may be none of it. Both sides are learnt while
decoding goes on: times from rounds that are run anyway, chances from every token of the text, whether it was guessed or
not, so a gate that is closed opens again by itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence

RECENT = 8  # times of a width that are kept
FORGET = 512  # rounds after which a time no longer counts
FIRST_SLOPE = 0.35  # of a plain pass: each further token, until widths are measured (what CPUs take)
TRUST = 3  # times until what was measured stands alone
FADE = 0.998  # of what was counted, for each new count
PRIOR = 4.0  # counts that the first guess of a chance stands for


class PassCost:
    """Seconds of a target pass by its width, the tokens it is fed."""

    def __init__(self) -> None:
        self.rounds = 0
        self.times: dict[int, deque[tuple[int, float]]] = {}  # width -> (round, seconds)
        self.estimates: list[float] | None = None

    def record(self, width: int, seconds: float) -> None:
        self.rounds += 1
        self.times.setdefault(width, deque(maxlen=RECENT)).append((self.rounds, seconds))
        self.estimates = None

    def relative(self, most: int) -> list[float]:
        """The time of a pass over 1, 2, … `most` tokens, in passes over one token; never falling."""
        if self.estimates is None or len(self.estimates) < most:
            self.estimates = self._estimate(most)
        return self.estimates

    def _estimate(self, most: int) -> list[float]:
        """What was measured of a width, and straight lines between such widths and behind the last."""
        oldest = self.rounds - FORGET
        known = {
            width: [seconds for when, seconds in kept if width == 1 or when > oldest]
            for width, kept in sorted(self.times.items())
        }
        one = _typical(known[1]) if known.get(1) else None
        if one is None:  # every pass was a wide one so far
            return [1 + FIRST_SLOPE * width for width in range(most)]
        points, slope = [(1, 1.0)], FIRST_SLOPE
        for width, seconds in known.items():
            if width == 1 or not seconds:
                continue
            last, value = points[-1]
            expected = value + slope * (width - last)
            # A single slow pass must not close the gate for good: few times stand beside what was expected.
            found = _typical([*(each / one for each in seconds), *[expected] * (TRUST - len(seconds))])
            points.append((width, max(value, found)))
            slope = (points[-1][1] - 1) / (width - 1)
        return _lines(points, slope, most)


def _typical(times: Sequence[float]) -> float:
    """The lower quartile: what else runs on a machine only ever adds to a time."""
    return sorted(times)[len(times) // 4]


def _lines(points: Sequence[tuple[int, float]], slope: float, most: int) -> list[float]:
    """The values at 1, 2, … `most` of lines through the points, with `slope` behind the last."""
    values: list[float] = []
    for (left, low), (right, high) in zip(points, points[1:], strict=False):
        values += [low + (high - low) * (width - left) / (right - left) for width in range(left, right)]
    last, value = points[-1]
    return values + [value + slope * (width - last) for width in range(last, max(most, last) + 1)]


class Chances:
    """How often guesses of a kind were right, as a running mean that starts from a first guess."""

    def __init__(self) -> None:
        self.counted: dict[Hashable, tuple[float, float]] = {}  # kind -> (right, all)

    def of(self, kind: Hashable, first: float) -> float:
        right, count = self.counted.get(kind, (0.0, 0.0))
        return (right + PRIOR * first) / (count + PRIOR)

    def learn(self, kind: Hashable, right: bool) -> None:
        before, count = self.counted.get(kind, (0.0, 0.0))
        self.counted[kind] = before * FADE + right, count * FADE + 1


def best_length(chances: Sequence[float], costs: Sequence[float]) -> int:
    """How many of the first nodes to keep. chances [n]: that a node becomes text; costs [n + 1]: of a pass over 1, 2, …
    tokens."""
    best, length, expected = 1 / costs[0], 0, 1.0
    for count, chance in enumerate(chances, 1):
        expected += chance
        if expected / costs[count] > best:
            best, length = expected / costs[count], count
    return length
