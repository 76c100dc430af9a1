"""Drafters replayed over texts that plain decoding wrote: how many tokens a pass each would have had.

Greedy verification keeps exactly the guesses that are the text, so passes can be counted without a model.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fewer.decoding.sampling import SamplingConfig
from fewer.decoding.tree import cut, merge_duplicates
from fewer.slots import DraftTree


@dataclass(frozen=True)
class Answer:
    """What plain greedy decoding wrote."""

    category: str
    prompt: list[int]
    text: list[int]


@dataclass
class Replay:
    """Rounds of one drafter over some answers; the first token of each is the prefill's."""

    emitted: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    seconds: float = 0.0  # of drafting
    reached: list[int] = field(default_factory=lambda: [0] * 16)  # rounds whose first i + 1 guesses were right
    parts: dict[int, tuple[int, int]] = field(default_factory=dict)  # part of the text -> (emitted, rounds)

    @property
    def tau(self) -> float:
        return self.emitted / self.rounds if self.rounds else 1.0

    def report(self, part: int) -> dict[str, Any]:
        return {
            "tau": round(self.tau, 4),
            "drafted_a_round": round(self.drafted / max(1, self.rounds), 2),
            "accepted_share": round(self.accepted / max(1, self.drafted), 4),
            "accepted_by_position": [round(count / max(1, self.rounds), 4) for count in self.reached[:5]],
            "draft_microseconds": round(1e6 * self.seconds / max(1, self.rounds), 1),
            "tau_by_part": {
                f"from {part * index}": round(emitted / rounds, 4) for index, (emitted, rounds) in self.parts.items()
            },
        }


def accepted_length(draft: DraftTree, following: Sequence[int]) -> int:
    """How many tokens of `following` the tree holds on a path below its root."""
    below = {(parent, draft.tokens[node]): node for node, parent in enumerate(draft.parents)}
    node, length = 0, 0
    while length < len(following) and (node, following[length]) in below:
        node, length = below[node, following[length]], length + 1
    return length


def replay(strategy: Any, answers: Sequence[Answer], most: int = 63, part: int = 64) -> Replay:
    """`most`: nodes of a draft; `part`: tokens of the text for which tau is given apart."""
    found = Replay()
    for answer in answers:
        drafter = strategy.drafter(SamplingConfig(), 0)
        drafter.start(answer.prompt)
        place = 1
        while place < len(answer.text):
            left = len(answer.text) - place
            context = answer.prompt + answer.text[:place]
            start = time.perf_counter()
            draft = drafter.propose(context, min(most, left - 1)) if left > 1 else DraftTree(context[-1:], [-1])
            found.seconds += time.perf_counter() - start
            draft = cut(merge_duplicates(draft), most)
            right = accepted_length(draft, answer.text[place : len(answer.text) - 1])
            emitted = answer.text[place : place + right + 1]
            drafter.accept(emitted)
            found.rounds, found.emitted = found.rounds + 1, found.emitted + len(emitted)
            found.drafted, found.accepted = found.drafted + len(draft.tokens) - 1, found.accepted + right
            for position in range(right):
                found.reached[min(position, 15)] += 1
            before = found.parts.get(place // part, (0, 0))
            found.parts[place // part] = before[0] + len(emitted), before[1] + 1
            place += len(emitted)
    return found
