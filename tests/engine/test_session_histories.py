"""A session's history is invisible: after random steps, commits and rollbacks, logits are those of the bare text."""

from __future__ import annotations

import random

import pytest
import torch

from fewer.cache import FullCache, PagedCache, PagedConfig, SinkWindowCache, SinkWindowConfig
from fewer.cache.slot_map import SLACK
from fewer.model.transformer import Transformer
from fewer.slots import DraftTree
from tests.random_model import config_of, new_session, random_transformer

VOCAB = 48
CASES = {
    "full": ({}, (FullCache,)),
    "windows": ({"sliding_window": 9}, (FullCache,)),
    "local-and-global": ({"sliding_window": 9, "sliding_layers": (True, False)}, (FullCache,)),
    "paged": ({}, (PagedCache, PagedConfig(16))),
    "paged-windows": ({"sliding_window": 9, "sliding_layers": (True, False)}, (PagedCache, PagedConfig(16))),
    "sink-window": ({}, (SinkWindowCache, SinkWindowConfig(3, 8))),
    "renumbered": ({}, (SinkWindowCache, SinkWindowConfig(3, 8, True))),
}


class Histories:
    """A ragged batch of three rows, and the text that each of them should hold."""

    def __init__(self, model: Transformer, cache: tuple, seed: int) -> None:  # type: ignore[type-arg]
        self.model, self.cache, self.dice = model, cache, random.Random(seed)
        self.session = new_session(model, 3, *cache)
        self.session.runner.chunk = 24
        self.texts: list[list[int]] = [[], [], []]
        self.peaks = [0, 0, 0]
        self.prefill()

    def tokens(self, low: int, high: int) -> list[int]:
        return [self.dice.randrange(VOCAB) for _ in range(self.dice.randint(low, high))]

    def check(self, row: int, logits: torch.Tensor, more: list[int]) -> None:
        fresh = new_session(self.model, 1, *self.cache).prefill([self.texts[row] + more])[0]
        torch.testing.assert_close(logits, fresh, atol=2e-4, rtol=2e-4)

    def prefill(self) -> None:
        rows = [self.tokens(1, self.dice.choice((4, 90))) for _ in self.texts]
        logits = self.session.prefill(rows)
        for row, new in enumerate(rows):
            self.texts[row] += new
        row = self.dice.randrange(3)
        self.check(row, logits[row], [])

    def decode(self) -> None:
        active = [True, self.dice.random() < 0.6, self.dice.random() < 0.6]
        self.dice.shuffle(active)
        for _ in range(self.dice.randint(1, 12)):
            tokens = self.tokens(3, 3)
            logits = self.session.decode(tokens, active)
            for row, on in enumerate(active):
                self.texts[row] += tokens[row : row + 1] if on else []
        row = active.index(True)
        self.check(row, logits[row], [])

    def verify(self) -> None:
        trees: list[DraftTree | None] = []
        for _ in self.texts:
            tokens = self.tokens(1, 9)
            shape = self.dice.choice(("chain", "tree", "bush"))
            reach = {
                "chain": lambda node: node - 1,
                "tree": lambda node: self.dice.randrange(node),
                "bush": lambda _: 0,
            }
            parents = [-1, *(reach[shape](node) for node in range(1, len(tokens)))]
            trees.append(DraftTree(tokens, parents) if self.dice.random() < 0.8 else None)
        if not any(trees):
            return
        results, paths = self.session.verify(trees), []
        for row, (tree, logits) in enumerate(zip(trees, results, strict=True)):
            if tree is None or logits is None:
                paths.append([])
                continue
            path = [self.dice.randrange(len(tree.tokens))]
            while path[0]:
                path.insert(0, tree.parents[path[0]])
            self.check(row, logits[path[-1]], [tree.tokens[node] for node in path])
            paths.append(path[: self.dice.randint(0, len(path))])
        self.session.commit(paths)
        for row, (tree, path) in enumerate(zip(trees, paths, strict=True)):
            self.texts[row] += [tree.tokens[node] for node in path] if tree else []

    def rollback(self) -> None:
        """Never further behind the longest text there was than a window's slack reaches."""
        self.peaks = [max(peak, len(text)) for peak, text in zip(self.peaks, self.texts, strict=True)]
        lengths = [
            max(1, min(len(text), max(len(text) - self.dice.choice((0, 1, 7, 60)), peak - SLACK)))
            for text, peak in zip(self.texts, self.peaks, strict=True)
        ]
        self.session.rollback(lengths)
        self.texts = [text[:length] for text, length in zip(self.texts, lengths, strict=True)]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", CASES)
def test_only_the_text_counts_and_not_how_it_came(name: str, seed: int) -> None:
    changes, cache = CASES[name]
    histories = Histories(random_transformer(config_of(layers=2, context_length=4000, **changes)), cache, seed)
    while max(histories.session.lengths) < 320:  # long enough for windows to evict
        histories.dice.choices(
            (histories.prefill, histories.decode, histories.verify, histories.rollback), (3, 3, 4, 1)
        )[0]()
        assert histories.session.lengths == [len(text) for text in histories.texts]
