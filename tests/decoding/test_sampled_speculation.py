"""Sampled speculation through a model: three tokens in a row have the target's joint law."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import pytest
import torch

from fewer.decoding.draft_model import ChainDrafter
from fewer.decoding.generate import generate
from fewer.decoding.sampling import DRAFT_STREAM, Sampler, SamplingConfig, warp
from fewer.slots import Drafter, DraftTree
from tests.decoding.drafters import EachRow, Scripted
from tests.random_model import config_of, new_session, random_transformer

VOCAB, ROWS, DRAWS = 7, 300, 1200
CONFIG = config_of(vocab_size=VOCAB, layers=2)
MODEL, OTHER = random_transformer(CONFIG, spread=1.5), random_transformer(CONFIG, seed=6, spread=1.5)
PROMPT = [3, 1, 4, 1, 5]
SAMPLING = SamplingConfig(temperature=0.9, top_k=4, repetition_penalty=1.2, seed=100)


def exact_law() -> dict[tuple[int, ...], float]:
    """Probability of each text of three tokens, each prefix given to the model afresh."""
    law: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        prefixes = list(law)
        logits = new_session(MODEL, len(prefixes)).prefill([[*PROMPT, *prefix] for prefix in prefixes])
        steps = [warp(row, SAMPLING, [*PROMPT, *prefix]) for row, prefix in zip(logits, prefixes, strict=True)]
        pairs = itertools.product(zip(prefixes, steps, strict=True), range(VOCAB))
        law = {(*prefix, token): law[prefix] * float(step[token]) for (prefix, step), token in pairs if step[token] > 0}
    return law


def draft_model(row: int, seed: int) -> Drafter:
    sampler = Sampler(SamplingConfig(temperature=1.4, seed=seed), row, DRAFT_STREAM)  # its own warping: q is what it is
    return ChainDrafter(new_session(OTHER), sampler, 2, VOCAB)


def bushes(row: int, seed: int) -> Drafter:
    """Two children drawn without replacement from a law that has nothing to do with the model."""
    dice, q = random.Random(row * 1009 + seed), torch.tensor([0.3, 0.05, 0.05, 0.1, 0.1, 0.2, 0.2])

    def guess(context: object, limit: int) -> DraftTree:
        weights = q.tolist()
        first = dice.choices(range(VOCAB), weights)[0]
        weights[first] = 0.0
        second = dice.choices(range(VOCAB), weights)[0]
        root = context[-1]  # type: ignore[index]
        return DraftTree([root, first, second], [-1, 0, 0], "without-replacement", q.repeat(3, 1))

    return Scripted(guess)


def mislabelled(row: int, seed: int) -> Drafter:
    """WRONG: always the same guess, said to be drawn from a flat law."""
    flat = torch.full((2, VOCAB), 1 / VOCAB)
    return Scripted(lambda context, limit: DraftTree([context[-1], context[-2]], [-1, 0], "iid", flat))


@pytest.mark.parametrize(("make", "exact"), [(draft_model, True), (bushes, True), (mislabelled, False)])
def test_three_tokens_have_the_targets_joint_law(make: Callable[[int, int], Drafter], exact: bool) -> None:
    law, seen = exact_law(), dict[tuple[int, ...], int]()
    for batch in range(DRAWS // ROWS):
        seed = 100 + ROWS * batch
        sampling = SamplingConfig(temperature=0.9, top_k=4, repetition_penalty=1.2, seed=seed)
        texts: list[list[int]] = [[] for _ in range(ROWS)]
        strategy = EachRow(lambda row, seed=seed: make(row, seed))  # type: ignore[misc]
        for event in generate(new_session(MODEL, ROWS), [PROMPT] * ROWS, sampling, strategy, 3):
            texts[event.row] += event.tokens
        for text in texts:
            seen[tuple(text)] = seen.get(tuple(text), 0) + 1
    assert set(seen) <= set(law)
    distance = sum(abs(seen.get(text, 0) / DRAWS - p) for text, p in law.items()) / 2
    # The expectation's bound, and McDiarmid's for one failure in 100,000 (see test_verifier_law.py).
    bound = sum(math.sqrt(p * (1 - p) / DRAWS) for p in law.values()) / 2 + math.sqrt(math.log(1e5) / (2 * DRAWS))
    assert (distance < bound) == exact
