"""What an eviction by attention scores is told: how many keys stay, how scores fade, and when keys go."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fewer.errors import UsageError

Mode = Literal["prefill-then-evict", "stepwise"]
Positions = Literal["absolute", "cache"]

FEWEST = 16  # tokens that a share of a prompt means at least: a tenth of a short prompt would be nothing
LONGEST_TAIL = 64  # queries that a layer remembers rather than score every query of a prompt
NEGLIGIBLE = 1e-16  # weight of a query that cannot show in float32 beside the newest one's


@dataclass(frozen=True)
class Eviction:
    """A policy: which weight each query has in the scores, and how many of the best keys stay. Raises UsageError."""

    name: str  # of the method, for messages
    budget: int  # keys that stay for every key head; 0: `share` of the first prompt
    share: float = 0.0
    recent: int = 0  # newest tokens that stay whatever their score
    recent_part: float = 0.0  # the same as a part of the budget
    decay: float = 1.0  # α: what every new query leaves of the scores
    memory: int | None = None  # queries at a prompt's end that count; None: all of them
    mode: Mode = "prefill-then-evict"
    positions: Positions = "absolute"
    while_generating: bool = True  # False: keys go at the end of a prompt only
    together: bool = False  # the heads of a layer keep the same tokens: they rank by the mean of their scores

    def __post_init__(self) -> None:
        if self.budget < 0:
            raise UsageError(f"{self.name}: budget={self.budget} is negative: use 1 or more tokens, or 0 with share=")
        if not 0 <= self.share <= 1:
            raise UsageError(f"{self.name}: share={self.share} is not a share of the prompt: use 0 to 1")
        if not self.budget and not self.share:
            raise UsageError(f"{self.name}: budget=0 keeps nothing: use 1 or more tokens, or a share of the prompt")
        if self.budget and self.share:
            raise UsageError(f"{self.name}: budget={self.budget} and share={self.share} are two budgets: give one")
        if self.share and self.mode == "stepwise":
            raise UsageError(
                f"{self.name}: share={self.share} is of a prompt's length, which mode=stepwise does not know while it "
                "evicts: use budget="
            )
        if self.recent < 0:
            raise UsageError(f"{self.name}: recent={self.recent} is negative: use 0 or more")
        if self.recent > (self.budget or FEWEST):
            raise UsageError(
                f"{self.name}: recent={self.recent} tokens do not fit a budget of {self.budget or FEWEST}: use a "
                "larger budget or fewer recent tokens"
            )
        if not 0 <= self.decay <= 1:
            raise UsageError(f"{self.name}: alpha={self.decay} is not a forgetting factor: use 0 to 1")

    def limits(self, prompt: int) -> tuple[int, int]:
        """A row whose first prompt has `prompt` tokens -> (keys that stay, how many of them are the newest)."""
        budget = self.budget or max(FEWEST, int(self.share * prompt))
        return budget, self.recent or int(self.recent_part * budget)


def remembered_queries(decay: float) -> int | None:
    """How many queries weigh at least NEGLIGIBLE where the newest weighs 1; None: more than a layer remembers."""
    if decay == 0:
        return 1
    count = math.ceil(math.log(NEGLIGIBLE) / math.log(decay)) if decay < 1 else math.inf
    return int(count) if count <= LONGEST_TAIL else None
