"""Sinks and a window: what is kept, which positions it has, and that steps, trees and rollbacks do not show."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fewer.cache import FullCache, SinkWindowCache, SinkWindowConfig
from fewer.cache.slot_map import SLACK
from fewer.cache.stored import StoredCache
from fewer.engine.session import ancestors
from fewer.errors import FewerError
from fewer.model.rope import Rotary
from fewer.model.step import Step
from fewer.slots import DraftTree
from tests.cache.dense_reference import attention_at
from tests.random_model import CPU, config_of, new_session, random_tokens, random_transformer

CONFIG = config_of(heads=4, kv_heads=2, head_dim=8, layers=2)
SINKS, WINDOW = 4, 12
TOTAL = 340  # long enough to evict twice
ROTARY = Rotary(8, 8, 1e4, 256)


def small(renumber: bool = False, batch: int = 1) -> StoredCache:
    return SinkWindowCache(CONFIG, batch, 8, torch.float32, CPU, SinkWindowConfig(SINKS, WINDOW, renumber))


class Text:
    """Queries, keys and values of one random text, before rotation."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.q, self.k, self.v = (torch.randn(heads, TOTAL, 8, generator=generator) for heads in (4, 2, 2))

    def feed(self, cache: StoredCache, tokens: Sequence[int], parents: Sequence[int] | None = None) -> Tensor:
        """Positions `tokens` of the text, as a chain or as a tree of its own -> [H, T, D]. Nothing is committed."""
        at, length = list(tokens), cache.lengths[0]
        tree = DraftTree(at, list(parents) if parents is not None else list(range(-1, len(at) - 1)))
        step = Step(
            tokens=torch.zeros(1, len(at), dtype=torch.int64),
            positions=torch.tensor([tree.depth]) + length,
            mask="causal" if parents is None else "tree",
            ancestors=None if parents is None else ancestors([tree.parents], len(at)),
        )
        cache.reserve(cache.physical_lengths[0] + len(at))
        q, k, v = (x[None, :, at] for x in (self.q, self.k, self.v))
        return cache.layers[0].attend(q, k, v, torch.empty(0), ROTARY, step)[0]

    def expected(self, position: int, renumber: bool) -> Tensor:
        at = self.q[:, position]
        return attention_at(at, self.k, self.v, position, WINDOW, SINKS, renumber, CONFIG.scale).float()


@pytest.mark.parametrize("renumber", [False, True])
@pytest.mark.parametrize("chunk", [1, 23, 100])
def test_every_step_equals_float64_attention_over_the_kept_tokens(renumber: bool, chunk: int) -> None:
    cache, text = small(renumber), Text()
    for start in range(0, TOTAL, chunk):
        tokens = range(start, min(start + chunk, TOTAL))
        out = text.feed(cache, tokens)
        cache.commit([len(tokens)])
        for index, position in enumerate(tokens):
            if position < 40 or position % 7 == 0:
                torch.testing.assert_close(out[:, index], text.expected(position, renumber), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("renumber", [False, True])
@pytest.mark.parametrize("length", [2, 14, 40, 300])
def test_a_branch_of_a_tree_equals_the_same_text_in_a_row(renumber: bool, length: int) -> None:
    """The accepted branch comes second, so that its slots are not its positions."""
    cache, text = small(renumber), Text()
    for start in range(0, length, 50):
        tokens = range(start, min(start + 50, length))
        text.feed(cache, tokens)
        cache.commit([len(tokens)])
    wrong, right = [7, 8, 9], [length + 1, length + 2, length + 3, length + 4]
    tree = [length, *wrong, *right]
    out = text.feed(cache, tree, [-1, 0, 1, 2, 0, 4, 5, 6])
    for node, position in zip([0, 4, 5, 6, 7], range(length, length + 5), strict=True):
        torch.testing.assert_close(out[:, node], text.expected(position, renumber), atol=2e-5, rtol=1e-4)
    cache.commit([[0, 4, 5, 6, 7]])
    after = text.feed(cache, [length + 5])[:, 0]
    torch.testing.assert_close(after, text.expected(length + 5, renumber), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("renumber", [False, True])
def test_a_budget_as_large_as_the_text_equals_full(renumber: bool) -> None:
    model, tokens = random_transformer(), random_tokens(80)
    settings = SinkWindowConfig(4, 76, renumber)
    full, small = new_session(model), new_session(model, 1, SinkWindowCache, settings)
    assert torch.equal(full.prefill([tokens[:50]]), small.prefill([tokens[:50]]))
    for token in tokens[50:]:
        torch.testing.assert_close(small.decode([token]), full.decode([token]), atol=1e-5, rtol=1e-5)


def test_the_sinks_and_the_last_tokens_are_held() -> None:
    cache, text = small(), Text()
    for start in range(0, TOTAL, 20):
        text.feed(cache, range(start, start + 20))
        cache.commit([20])
        held = cache.positions(0).tolist()
        assert held == sorted(held) and len(held) == cache.physical_lengths[0]
        assert set(range(SINKS)) | set(range(max(start + 20 - WINDOW, 0), start + 20)) <= set(held)
    assert cache.lengths == [TOTAL]
    assert cache.physical_lengths[0] <= SINKS + WINDOW + 2 * SLACK


@pytest.mark.parametrize("renumber", [False, True])
def test_memory_is_flat_and_the_text_may_outgrow_the_context_only_when_renumbered(renumber: bool) -> None:
    model = random_transformer(config_of(context_length=330))
    session = new_session(model, 1, SinkWindowCache, SinkWindowConfig(SINKS, WINDOW, renumber))
    session.prefill([random_tokens(329)])
    held = session.cache.nbytes
    session.decode([1])
    if not renumber:
        with pytest.raises(FewerError, match="331 tokens do not fit the model's context of 330"):
            session.decode([1])
        return
    for _ in range(200):
        assert session.decode([1]).isfinite().all()
    assert session.cache.nbytes == held
    assert session.lengths == [530]


def test_a_narrower_window_of_the_model_rules_and_a_wider_one_does_not() -> None:
    narrow = SinkWindowCache(config_of(sliding_window=6), 1, 8, torch.float32, CPU, SinkWindowConfig(2, 10))
    assert {(slots.window, slots.sinks) for slots in narrow.maps} == {(6, 0)}
    wide = SinkWindowCache(config_of(sliding_window=60), 1, 8, torch.float32, CPU, SinkWindowConfig(2, 10))
    assert {(slots.window, slots.sinks) for slots in wide.maps} == {(10, 2)}


# ── going back ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("windowed", ["sink-window", "model"])
def test_going_back_beyond_the_slack_is_refused_and_changes_nothing(windowed: str) -> None:
    config = config_of(layers=2, sliding_window=WINDOW, sliding_layers=(True, False), context_length=2000)
    cache: StoredCache = small() if windowed == "sink-window" else FullCache(config, 1, 8, torch.float32, CPU)
    session = new_session(random_transformer(config), 1, lambda *_: cache)
    tokens = random_tokens(600)
    session.prefill([tokens])
    with pytest.raises(FewerError, match="cannot go back to 200 tokens"):
        session.rollback([200])
    assert session.lengths == [600]
    session.rollback([600 - SLACK])  # as far as promised
    again = session.prefill([tokens[600 - SLACK :]])
    session.rollback([0])  # a new text
    torch.testing.assert_close(session.prefill([tokens]), again, atol=1e-4, rtol=1e-4)


def test_a_failed_step_leaves_nothing_that_a_later_one_could_meet() -> None:
    """Rows of unequal lengths read slots of each other's width; a NaN there would pass through a mask as 0·NaN."""
    text = Text()
    cache = FullCache(CONFIG, 2, 64, torch.float32, CPU)

    def feed(x: Tensor, new: list[int]) -> Tensor:
        positions = torch.tensor(cache.lengths)[:, None] + torch.arange(x.shape[2])
        step = Step(tokens=None, positions=positions, lengths=new)
        k = x[:, :2]
        return cache.layers[0].attend(x, k, k, torch.empty(0), ROTARY, step)

    good = torch.stack([text.q[:, :8], text.q[:, 8:16]])
    feed(torch.full_like(good, torch.nan), [8, 8])  # given up, as after a NumericalError
    assert feed(good[:, :, :6], [2, 6]).isfinite().all()
    cache.commit([2, 6])
    feed(torch.full_like(good, torch.nan), [8, 8])
    cache.commit([8, 8])
    for row, length in enumerate([2, 6]):
        cache.truncate(row, length)
    assert feed(good[:, :, :1], [1, 1]).isfinite().all()
