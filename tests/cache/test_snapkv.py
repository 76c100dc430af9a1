"""SnapKV: the prompt is cut once; what is generated stays, so drafts and rollbacks go on behind it."""

from __future__ import annotations

import pytest
import torch

from fewer.cache import SnapKVCache, SnapKVConfig
from fewer.decoding.generate import Counts, generate
from fewer.decoding.prompt_lookup import PromptLookup
from fewer.decoding.sampling import SamplingConfig
from fewer.engine.session import Session
from fewer.errors import FewerError
from fewer.recipe import Recipe
from fewer.slots import DraftTree
from tests.cache.masked_reference import MaskedCache, votes
from tests.random_model import config_of, new_session, random_tokens, random_transformer

CONFIG = config_of(head_dim=16)  # heads that the CPU's fast path takes
MODEL = random_transformer(CONFIG)
SETTINGS = SnapKVConfig(budget=40, window=16)
PROMPT = random_tokens(90)
TREE = DraftTree([5, 6, 7, 8, 9, 10], [-1, 0, 0, 2, 1, 3])


def prefilled(settings: SnapKVConfig = SETTINGS, batch: int = 1) -> Session:
    session = new_session(MODEL, batch, SnapKVCache, settings)
    session.runner.chunk = 40  # the window reaches across a cut
    session.prefill([PROMPT] * batch)
    return session


def test_the_window_stays_and_what_is_generated_too() -> None:
    session = prefilled()
    for token in random_tokens(30):
        session.decode([token])
    for layer in range(3):
        for head in range(2):
            held = session.cache.positions(0, layer, head).tolist()
            assert held[-46:] == list(range(74, 120)) and len(held) == 70


@pytest.mark.parametrize("kernel", [1, 7])
def test_the_kernel_is_how_many_neighbours_share_a_vote(kernel: int) -> None:
    session, reference = prefilled(SnapKVConfig(40, 16, kernel)), MaskedCache(CONFIG, votes(40, 16, kernel))
    masked = new_session(MODEL, 1, lambda *_: reference)
    masked.prefill([PROMPT])
    session.decode([1])
    for layer in range(3):
        for head in range(2):
            chosen = reference.choose(reference.layers[layer].rows, reference.layers[layer].alive)[head]
            assert session.cache.positions(0, layer, head).tolist() == [*chosen.nonzero()[:, 0].tolist(), 90]


def test_pooling_by_the_largest_keeps_neighbours_of_peaks() -> None:
    mean, largest = prefilled(), prefilled(SnapKVConfig(40, 16, 7, "max"))
    for session in (mean, largest):
        session.decode([1])
    assert mean.cache.positions(0, 1).tolist() != largest.cache.positions(0, 1).tolist()


def test_drafts_are_verified_as_they_would_be_decoded() -> None:
    texts, counts = [], Counts()
    prompt = (PROMPT[:30] * 3)[:80]
    for strategy in (None, PromptLookup()):
        session = new_session(MODEL, 1, SnapKVCache, SETTINGS)
        events = generate(session, [prompt], SamplingConfig(), strategy, max_tokens=60, counts=counts)
        texts.append([token for event in events for token in event.tokens])
    assert texts[0] == texts[1]
    assert counts.drafted > 0
    Recipe(cache="snapkv", decoding="prompt-lookup")  # is allowed


def test_a_tree_and_its_chosen_path_equal_the_same_text_in_a_row() -> None:
    tree, row = prefilled(), prefilled()
    logits = tree.verify([TREE])[0]
    assert logits is not None
    tree.commit([[0, 2, 3, 5]])
    for place, token in zip([0, 2, 3, 5], [5, 7, 8, 10], strict=True):
        torch.testing.assert_close(row.decode([token])[0], logits[place], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(tree.decode([3]), row.decode([3]), atol=1e-4, rtol=1e-4)
    assert tree.cache.positions(0, 1).tolist() == row.cache.positions(0, 1).tolist()


@pytest.mark.parametrize("before_choosing", [True, False])
def test_what_is_taken_back_leaves_no_trace(before_choosing: bool) -> None:
    session, expected = new_session(MODEL, 1, SnapKVCache, SETTINGS), prefilled()
    session.runner.chunk = 40
    if before_choosing:
        session.prefill([PROMPT + random_tokens(12, seed=5)])
    else:
        session.prefill([PROMPT])
        for token in random_tokens(25, seed=5):
            session.decode([token])
    session.rollback([90])
    assert session.lengths == [90]
    for token in random_tokens(10, seed=6):
        torch.testing.assert_close(session.decode([token]), expected.decode([token]), atol=1e-4, rtol=1e-4)


def test_going_back_into_what_was_dropped_is_refused() -> None:
    session = prefilled()
    with pytest.raises(FewerError, match="snapkv cannot go back to 60 tokens"):
        session.rollback([60])  # the queries that have to choose would be missing
    session.decode([1])
    with pytest.raises(FewerError, match="snapkv cannot go back to 70 tokens"):
        session.rollback([70])
    session.rollback([75])  # inside the window, which is held whole
    assert session.decode([1]).isfinite().all() and session.lengths == [76]
