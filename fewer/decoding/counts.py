"""What a decoding took: passes, guesses, how far they were right, and where the time went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fewer.slots import DraftTree


@dataclass
class Counts:
    """Work of all rows together. The prefill and the token it yields are not counted."""

    target_passes: int = 0  # a pass over several rows counts once for each
    emitted: int = 0  # tokens of the text, the target's own included
    drafted: int = 0
    accepted: int = 0  # drafted tokens that became text
    reached: list[int] = field(default_factory=list)  # rounds with a guess for position i whose earlier ones were right
    accepted_at: list[int] = field(default_factory=list)  # rounds whose guess for position i was right, too
    draft_seconds: float = 0.0  # making drafts; both times only of decodings that can draft, which others do without
    verify_seconds: float = 0.0  # passes of the target and the choice of their tokens

    @property
    def tau(self) -> float:
        """Tokens for each target pass."""
        return self.emitted / self.target_passes if self.target_passes else 1.0

    @property
    def draft_efficiency(self) -> float:
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def acceptance(self) -> list[float]:
        """Share of right guesses at draft position i = 0, 1, … where all earlier ones were right."""
        return [right / rounds for right, rounds in zip(self.accepted_at, self.reached, strict=True)]

    def add(self, draft: DraftTree, path: Sequence[int], kept: int) -> None:
        """One row's round: `path` was accepted (the root first), and `kept` tokens became text, which a stop may have
        cut."""
        accepted = min(kept, len(path) - 1)
        self.target_passes += 1
        self.emitted += kept
        self.drafted += len(draft.tokens) - 1
        self.accepted += accepted
        reached = accepted + (kept == len(path) and path[-1] in draft.parents)
        missing = reached - len(self.reached)
        if missing > 0:
            self.reached += [0] * missing
            self.accepted_at += [0] * missing
        for position in range(reached):
            self.reached[position] += 1
        for position in range(accepted):
            self.accepted_at[position] += 1

    def to_json(self) -> dict[str, Any]:
        return {
            "tau": self.tau,
            "target_passes": self.target_passes,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "accepted_at": self.accepted_at,
            "reached": self.reached,
            "draft_seconds": self.draft_seconds,
            "verify_seconds": self.verify_seconds,
        }
