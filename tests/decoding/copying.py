"""Texts that edit another one, and rounds of a copy drafter against a known answer, without a model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fewer.decoding.copy_drafter import CopyDrafter, CopySettings
from fewer.decoding.draft_gate import PassCost

END = 5000  # behind the source in the prompt and behind the answer, as a chat's end-of-turn token is
WORDS = 400


@dataclass
class Rounds:
    """What decoding an answer took."""

    emitted: int = 0
    passes: int = 0
    drafted: int = 0
    cost: float = 0.0  # in passes over one token

    @property
    def tau(self) -> float:
        return self.emitted / self.passes

    @property
    def speed(self) -> float:
        """Against plain decoding, whose passes cost 1 each."""
        return self.emitted / self.cost


def source_text(length: int, seed: int) -> list[int]:
    """Tokens as unevenly frequent as words are."""
    dice = random.Random(seed)
    return [min(int(dice.paretovariate(0.7)), WORDS) for _ in range(length)]


def edited(source: Sequence[int], edits: int, kinds: str, seed: int, new: range = range(1000, 2000)) -> list[int]:
    """The source with so many edits: s(ubstitution), i(nsertion) or d(eletion) of a token; `new` has what comes in."""
    dice, answer = random.Random(seed), []
    places = set(dice.sample(range(1, len(source)), edits))
    for place, token in enumerate(source):
        kind = dice.choice(kinds) if place in places else "keep"
        if kind in ("s", "i"):
            answer.append(dice.choice(new))
        if kind in ("keep", "i"):
            answer.append(token)
    return answer


def decode(config: CopySettings, source: Sequence[int], answer: Sequence[int], share: float = 0.4) -> Rounds:
    """Rounds until the answer and END are emitted; `share` of a pass over one token is what each further one costs."""
    drafter = CopyDrafter(replace(config, pass_cost=share), PassCost())
    prompt, text = [3000, 3001, *source, END, 3002], [*answer, END]
    drafter.start(prompt)
    rounds, done = Rounds(), 1  # the first token is the prefill's
    while done < len(text):
        guesses = drafter.propose([*prompt, *text[:done]], len(text) - done - 1).tokens[1:]
        accepted = 0
        while accepted < len(guesses) and guesses[accepted] == text[done + accepted]:
            accepted += 1
        done += accepted + 1
        rounds.emitted += accepted + 1
        rounds.passes += 1
        rounds.drafted += len(guesses)
        rounds.cost += 1 + share * len(guesses)
        drafter.accept(text[done - accepted - 1 : done])
    return rounds
