"""Quest: pages by their bounds, the newest always among them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewer.cache import QuestCache, QuestConfig
from fewer.cache.quest import QuestLayer
from fewer.engine.session import Session
from fewer.errors import UsageError
from fewer.registry import parse_spec
from fewer.slots import DraftTree
from tests.random_model import config_of, new_session, random_tokens, random_transformer

CONFIG = config_of(layers=4, context_length=400)
SIZE = 8


def quest_session(batch: int = 1, budget: int = 24) -> Session:
    return new_session(random_transformer(CONFIG), batch, QuestCache, QuestConfig(budget=budget, page_size=SIZE))


def check_bounds(session: Session) -> None:
    """Every page's bounds are those of the keys that it holds now."""
    cache = session.cache
    assert isinstance(cache, QuestCache)
    for layer in cache.layers:
        if not isinstance(layer, QuestLayer):
            continue
        for row, length in enumerate(cache.lengths):
            for page in range(-(-length // SIZE)):
                held = layer.keys[row, :, page * SIZE : min(length, (page + 1) * SIZE)]
                bounds = cache.statistics.bounds[layer.member, row, :, page]
                assert torch.equal(bounds, torch.stack((held.amax(1), held.amin(1)), 1))


def test_bounds_follow_prefill_decoding_and_growth() -> None:
    session, tokens = quest_session(2), random_tokens(100)
    session.prefill([tokens[:61], tokens[:30]])
    check_bounds(session)
    for token in tokens[61:]:
        session.decode([token, token])
        check_bounds(session)


def test_bounds_forget_what_is_taken_back() -> None:
    session, tokens = quest_session(), random_tokens(100)
    session.prefill([tokens[:61]])
    for rejected in (0, 3, 9):
        session.verify([DraftTree(tokens[61:74], list(range(-1, 12)))])
        session.commit([list(range(13 - rejected))])
        check_bounds(session)
    session.verify([DraftTree(tokens[61:70], [-1, 0, 0, 1, 2, 4, 5, 6, 7])])
    session.commit([[0, 2, 4, 5, 8]])  # the survivors move together
    check_bounds(session)
    session.rollback([44])
    session.decode([3])
    check_bounds(session)


def test_a_layer_reads_the_pages_with_the_highest_bounds_and_the_newest() -> None:
    session = quest_session()
    session.prefill([random_tokens(77)])
    layer = session.cache.layers[2]
    assert isinstance(layer, QuestLayer)
    seen: list[tuple[Tensor, Tensor]] = []
    choose = layer.choose

    def spy(q: Tensor, *rest: object) -> Tensor:
        slots = choose(q, *rest)  # type: ignore[arg-type]
        seen.append((q, slots))
        return slots

    layer.choose = spy  # type: ignore[method-assign, assignment]
    session.decode([5])
    q, slots = seen[0]
    keys = layer.keys[0, :, :78].repeat_interleave(2, 0)  # [H, S, D]
    for head in range(CONFIG.heads):
        pages = keys[head].split(SIZE)
        bounds = [float(torch.maximum(q[0, head, 0] * p.amax(0), q[0, head, 0] * p.amin(0)).sum()) for p in pages]
        best = sorted(range(len(pages) - 1), key=bounds.__getitem__)[-2:]
        assert set((slots[0, head] // SIZE).tolist()) == {*best, len(pages) - 1}
        assert len(set(slots[0, head].tolist())) == 24


def test_budgets_that_are_no_whole_pages_are_refused() -> None:
    with pytest.raises(UsageError, match="budget=100 is not a whole number of pages of 16 tokens"):
        parse_spec("cache", "quest:budget=100")
    with pytest.raises(UsageError, match="page_size=0 is not allowed"):
        parse_spec("cache", "quest:page_size=0")


@pytest.mark.parametrize("sets", ["query-head", "key-head"])
@pytest.mark.parametrize("length", [61, 64])  # within a page, and where one begins
def test_a_branch_reads_what_a_row_would(sets: str, length: int) -> None:
    """Two branches side by side, each longer than what is left of a page: every node's logits are those of its path."""
    model, tokens = random_transformer(CONFIG), random_tokens(100)
    settings = QuestConfig(budget=24, page_size=SIZE, sets=sets)  # type: ignore[arg-type]
    parents = [-1, 0, 0, *range(1, 19)]  # root, two children, and below each a chain of every other node
    tree = DraftTree(random_tokens(len(parents), seed=1), parents)
    session = new_session(model, 1, QuestCache, settings)
    session.prefill([tokens[:length]])
    (found,) = session.verify([tree])
    assert found is not None
    for leaf in (len(parents) - 1, len(parents) - 2):
        path = [leaf]
        while path[0]:
            path.insert(0, parents[path[0]])
        row = new_session(model, 1, QuestCache, settings)
        row.prefill([tokens[:length]])
        for node in path:
            wanted = row.decode([tree.tokens[node]])[0]
            torch.testing.assert_close(found[node], wanted, rtol=1e-4, atol=1e-4)
