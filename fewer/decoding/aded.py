"""ADED: a tri-gram table that learns from the text guesses a tree of continuations.

Paper: Adaptive Draft-Verification for Efficient Large Language Model Decoding, arXiv 2407.12021. Differs from it: a
whole prompt is learnt at the start, not its last 16 tokens; the table serves one answer unless `keep` is set; the
search is by default worked out without random roll-outs (`search=visits`, the tree that the paper's code nearly always
finds, see `trigram_search`); what it finds enters the tree in its order until the budget is used; a lookup gives 12
successors after the text has added some, too; sampled drafts are verified node by node; and a gate of our own (`gate`)
keeps as much of a draft as pays on this machine.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fewer.decoding import tree
from fewer.decoding.draft_gate import Chances, PassCost, best_length
from fewer.decoding.sampling import SamplingConfig
from fewer.decoding.trigram_search import SEARCHES, Reward, SearchName, SearchSettings
from fewer.decoding.trigram_table import Tokenizer, TrigramTable, load_table, vocabulary_fingerprint
from fewer.errors import UsageError
from fewer.registry import method
from fewer.slots import Drafter, DraftTree

LONGEST_RUN = 4  # tokens in a row that the table's first guesses foresaw: more of them say no more
OCCURRENCES = 3  # likewise, of a pair
HOPELESS = 4  # paths in a row that cannot pay end the look at what the search finds


@dataclass(frozen=True)
class AdedConfig:
    tokens: int = 24  # guessed tokens a round, at most
    table: str | None = None  # the file of a table built from a text; None: it starts empty
    keep: bool = False  # what one answer taught serves the next ones of this model, too
    prompt: bool = True  # the prompt is learnt; false: its last `window` tokens, as in the paper
    update: bool = True  # the text is learnt while it is generated; false: a frozen table
    amount: float = 0.04  # that a triple's weight grows by in each round that it lies in the window
    window: int = 16  # last tokens that are learnt in each round
    search: SearchName = "visits"  # what chooses the guesses; monte-carlo runs the paper's search step by step
    reward: Reward = "intended"  # of monte-carlo: the paper's, or what its code computes
    iterations: int = 150  # of the search
    depth: int = 3  # tokens that the search looks ahead; each path is then made longer by a greedy one
    sequences: int = 24  # paths that are kept
    c1: float = 32.0  # how much a weight counts beside the mean reward of monte-carlo
    c2: float = 8.0  # how slowly exploration grows with visits
    gate: bool = True  # guess only as much as pays by the measured time of a pass; false: always `tokens`
    seed: int = 0  # of monte-carlo's roll-outs

    def __post_init__(self) -> None:
        ranges = {
            "tokens": (1, 63),
            "window": (3, 1024),
            "iterations": (1, 100_000),
            "depth": (1, 15),
            "sequences": (1, 1000),
            "seed": (0, 2**62 - 1),
            "amount": (1e-6, 3),
            "c1": (0, 1e6),
            "c2": (1e-6, 1e6),
        }
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise UsageError(f"aded: {name}={getattr(self, name)} is out of range: use {low:g} to {high:g}")


class Context(Protocol):
    """What is asked of the target."""

    @property
    def tokenizer(self) -> Tokenizer: ...


@method("aded", slot="decoding", paper="2407.12021", lossless=True, config=AdedConfig)
class Aded:
    """The strategy: the table that answers start from, and what the gate has learnt about this model and machine."""

    lossless = True

    def __init__(self, config: AdedConfig | None = None, context: Context | None = None):
        self.config = config or AdedConfig()
        if self.config.table is not None and context is not None:
            self.table = load_table(Path(self.config.table), context.tokenizer)
        elif context is not None:
            tokenizer = context.tokenizer
            self.table = TrigramTable(vocab_size=tokenizer.vocab_size, vocabulary=vocabulary_fingerprint(tokenizer))
        else:
            self.table = TrigramTable()
        self.cost, self.chances = PassCost(), Chances()

    def drafter(self, sampling: SamplingConfig, row: int) -> Drafter | None:
        return TrigramDrafter(self.config, self.table, self.cost, self.chances, row)


@dataclass(slots=True)
class Guess:
    """A node of the tree that is being built."""

    pair: tuple[int, int]
    chance: float  # that it becomes text
    run: int  # tokens in a row that the table foresaw, this one included if it is its first guess


class TrigramDrafter:
    """Searches the table each round, after it has learnt the last tokens."""

    lossless = True

    def __init__(self, config: AdedConfig, table: TrigramTable, cost: PassCost, chances: Chances, row: int = 0):
        self.config, self.origin, self.cost, self.chances, self.row = config, table, cost, chances, row
        self.search = SEARCHES[config.search]
        self.settings = SearchSettings(config.iterations, config.depth, config.c1, config.c2, config.reward)
        self.occurrence = config.amount * max(1, config.window - 2)  # what one place of the text adds in the end
        self.start(())

    def start(self, prompt: Sequence[int]) -> None:
        self.table = self.origin if self.config.keep else self.origin.fork()
        self.dice = random.Random(self.config.seed + self.row)
        self.seen = len(prompt)  # tokens of the text that the gate has looked at
        self.run = 0  # last tokens in a row that were the table's first guess
        self.width, self.began = 0, 0.0  # of the pass under way: tokens, and when it began
        if self.config.prompt and self.config.update:
            for a, b, c in zip(prompt, prompt[1:], prompt[2:], strict=False):
                self.table.reward(a, b, c, self.occurrence)

    def propose(self, context: Sequence[int], limit: int) -> DraftTree:
        if len(context) < 2:
            return tree.root(context[-1])
        if self.config.gate:
            self._learn_chances(context)
        if self.config.update:
            recent = context[-self.config.window :]
            for a, b, c in zip(recent, recent[1:], recent[2:], strict=False):
                self.table.reward(a, b, c, self.config.amount)
        draft = self._draft((context[-2], context[-1]), min(limit, self.config.tokens))
        self.width, self.began = len(draft.tokens), time.perf_counter()
        return draft

    def accept(self, tokens: Sequence[int]) -> None:
        """The pass is over: its time is what it cost."""
        if self.width:
            self.cost.record(self.width, time.perf_counter() - self.began)
            self.width = 0

    def _draft(self, pair: tuple[int, int], limit: int) -> DraftTree:
        """The search's paths in their order, each made longer by a greedy token, as far as the budget goes."""
        draft = tree.root(pair[1])
        guesses = [Guess(pair, 1.0, self.run)]
        known: dict[tuple[int, ...], int] = {(): 0}  # path -> node
        costs = self.cost.relative(limit + 1) if self.config.gate else []
        hopeless = 0
        for found, path in enumerate(self.search(self.table, pair, self.settings, self.dice)):
            before = len(draft.tokens)
            if before > limit or found == self.config.sequences or hopeless == HOPELESS:
                break
            self._insert(draft, guesses, known, self._longer(pair, path), limit, costs)
            hopeless = 0 if len(draft.tokens) > before or path in known else hopeless + 1
        if self.config.gate:
            draft = tree.cut(draft, best_length([guess.chance for guess in guesses[1:]], costs))
        return tree.depth_first(draft)

    def _longer(self, pair: tuple[int, int], path: tuple[int, ...]) -> tuple[int, ...]:
        """The path with the most likely token behind it, if there is one."""
        a, b = (*pair, *path)[-2:]
        successors = self.table.successors(a, b)
        return (*path, successors[0][0]) if successors else path

    def _insert(
        self,
        draft: DraftTree,
        guesses: list[Guess],
        known: dict[tuple[int, ...], int],
        path: tuple[int, ...],
        limit: int,
        costs: Sequence[float],
    ) -> None:
        """Add what is new of a path. With a gate (`costs`), it ends before a node that cannot pay."""
        for length in range(1, len(path) + 1):
            if path[:length] in known:
                continue
            count = len(draft.tokens)
            if count > limit:
                return
            above = known[path[: length - 1]]
            guess = self._guess(guesses[above], path[length - 1]) if costs else Guess((0, 0), 0.0, 0)
            # A plain pass yields one token, so a node has to bring more than its share of that time.
            if costs and guess.chance < costs[count] - costs[count - 1]:
                return
            known[path[:length]] = count
            draft.tokens.append(path[length - 1])
            draft.parents.append(above)
            guesses.append(guess)

    # ── what the gate knows of a guess ───────────────────────────────────────────────────────────────────────────────

    def _guess(self, above: Guess, token: int) -> Guess:
        kinds = self._kinds(above.pair, above.run)
        place, kind, first = next((place, kind, first) for place, t, kind, first in kinds if t == token)
        chance = above.chance * self.chances.of(kind, first)
        return Guess((above.pair[1], token), chance, above.run + 1 if place == 0 else 0)

    def _kinds(self, pair: tuple[int, int], run: int) -> list[tuple[int, int, Any, float]]:
        """(place, token, kind, first guess of its chance) of each successor. Guesses are of one kind where their share
        of the pair's weight, the evidence for the pair and the tokens foreseen before are about the same."""
        successors = self.table.successors(*pair)
        total = sum(weight for _, weight in successors)
        evidence = 0
        if pair in self.table.learnt and self.occurrence:
            evidence = 1 + min(OCCURRENCES - 1, int(total / self.occurrence - 0.5))
        run = min(run, LONGEST_RUN)
        usual = 0.35 + 0.15 * run  # of a guess that has the whole weight
        return [
            (place, token, (int(7.99 * weight / total), evidence, run), usual * weight / total)
            for place, (token, weight) in enumerate(successors)
        ]

    def _learn_chances(self, context: Sequence[int]) -> None:
        """Hold the table's first guesses against the tokens that came, before it learns from them."""
        for place in range(max(2, self.seen), len(context)):
            kinds = self._kinds((context[place - 2], context[place - 1]), self.run)
            for _, token, kind, _ in kinds[:2]:
                self.chances.learn(kind, token == context[place])
            self.run = self.run + 1 if kinds and kinds[0][1] == context[place] else 0
        self.seen = len(context)
