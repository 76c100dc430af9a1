"""Drafters for tests: one that knows the answer, one that guesses at random, one that is always wrong."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from fewer.decoding import tree as trees
from fewer.decoding.sampling import SamplingConfig
from fewer.slots import Drafter, DraftTree


class Scripted:
    """A drafter that proposes what `guess(context, limit)` says and remembers what it was told."""

    lossless = True

    def __init__(self, guess: Callable[[Sequence[int], int], DraftTree]) -> None:
        self.guess = guess
        self.heard: list[int] = []

    def start(self, prompt: Sequence[int]) -> None:
        self.prompt = list(prompt)

    def propose(self, context: Sequence[int], limit: int) -> DraftTree:
        return self.guess(context, limit)

    def accept(self, tokens: Sequence[int]) -> None:
        self.heard += tokens


class EachRow:
    """A strategy whose row r decodes with `make(r)`."""

    lossless = True

    def __init__(self, make: Callable[[int], Drafter | None]) -> None:
        self.make = make
        self.made: dict[int, Drafter | None] = {}

    def drafter(self, sampling: SamplingConfig, row: int) -> Drafter | None:
        self.made[row] = self.make(row)
        return self.made[row]


def oracle(prompt: Sequence[int], answer: Sequence[int], tokens: int) -> Scripted:
    """Drafts the next `tokens` tokens of the answer."""
    return Scripted(lambda context, limit: trees.chain(context[-1], _rest(prompt, answer, context)[:tokens][:limit]))


def chance(vocab_size: int, seed: int, nodes: int = 8) -> Scripted:
    """Random trees: any shape, and now and then the same token twice below one parent."""
    dice = random.Random(seed)

    def guess(context: Sequence[int], limit: int) -> DraftTree:
        count = dice.randint(0, min(nodes, limit))
        tokens = [context[-1], *(dice.randrange(vocab_size) for _ in range(count))]
        for node in range(2, len(tokens)):
            if dice.random() < 0.3:
                tokens[node] = tokens[node - 1]
        return DraftTree(tokens, [-1, *(dice.randrange(node) for node in range(1, count + 1))])

    return Scripted(guess)


def adversary(prompt: Sequence[int], answer: Sequence[int], vocab_size: int) -> Scripted:
    """Wrong tokens first, with the right text below them; every third round the right token comes last, twice."""
    rounds = 0

    def guess(context: Sequence[int], limit: int) -> DraftTree:
        nonlocal rounds
        rounds += 1
        right = [*_rest(prompt, answer, context), 0, 0, 0][:3]
        wrong = (right[0] + 1) % vocab_size
        if rounds % 3:
            return DraftTree([context[-1], wrong, *right, right[1]], [-1, 0, 1, 2, 3, 0])
        return DraftTree([context[-1], wrong, wrong, right[0], right[0], right[1], right[2]], [-1, 0, 0, 0, 0, 4, 5])

    return Scripted(guess)


def _rest(prompt: Sequence[int], answer: Sequence[int], context: Sequence[int]) -> list[int]:
    return list(answer[len(context) - len(prompt) :])
