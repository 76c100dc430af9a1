"""A2SF: its scores are the paper's sums however they are found, and its two ends are H2O and the last query."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewer.cache import A2sfCache, A2sfConfig, H2OCache, H2OConfig, TovaCache, TovaConfig
from fewer.cache.eviction import Eviction, remembered_queries
from fewer.cache.scored import ScoredCache
from fewer.engine.session import Session
from fewer.model.transformer import Transformer
from tests.cache.masked_reference import MaskedCache, fading
from tests.random_model import config_of, new_session, random_tokens, random_transformer

CONFIG = config_of(head_dim=16)  # heads that the CPU's fast path takes
MODEL = random_transformer(CONFIG)
MQA = random_transformer(config_of(kv_heads=1))
PROMPT = random_tokens(90)


def scores_after(policy: Eviction, model: Transformer = MODEL, generated: int = 1) -> Tensor:
    """A [L, Hk, tokens] of a session that has dropped nothing."""
    session = new_session(model, 1, ScoredCache, policy)
    session.runner.chunk = 40
    session.prefill([PROMPT])
    for token in range(generated):
        session.decode([token])
    assert isinstance(session.cache, ScoredCache)
    assert len(session.cache.positions(0)) == 90 + generated  # asking settles what a fast path has left
    return session.cache.scores[:, 0, :, : 90 + generated]


def closed_form(alpha: float, generated: int = 1) -> Tensor:
    """Σ α^(n-q)·S from dense probabilities in float64."""
    cache = MaskedCache(CONFIG, fading(alpha, 10_000))
    session = new_session(MODEL, 1, lambda *_: cache)
    session.prefill([PROMPT])
    for token in range(generated):
        session.decode([token])
    count = 90 + generated
    weights = torch.tensor([alpha ** (count - 1 - q) for q in range(count)], dtype=torch.float64)
    return torch.stack([torch.einsum("q,hqs->hs", weights, layer.rows) for layer in cache.layers])


@pytest.mark.parametrize("generated", [1, 25])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.3, 0.5, 0.7, 0.95, 1.0])
def test_the_recurrence_equals_the_closed_form(alpha: float, generated: int) -> None:
    found = scores_after(A2sfConfig(4096, alpha=alpha).policy, generated=generated)
    torch.testing.assert_close(found.double(), closed_form(alpha, generated), atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("alpha", [0.1, 0.3])
def test_the_last_32_queries_give_the_scores_of_all(alpha: float) -> None:
    assert remembered_queries(alpha) is not None and remembered_queries(alpha) <= 32
    few, every = (scores_after(Eviction("a2sf", 4096, decay=alpha, memory=memory)) for memory in (32, None))
    torch.testing.assert_close(few, every, atol=1e-6, rtol=1e-6)


def test_slow_fading_remembers_every_query() -> None:
    assert [remembered_queries(alpha) for alpha in (0.0, 0.2, 0.9, 1.0)] == [1, 23, None, None]


def held(session: Session) -> list[list[int]]:
    return [
        session.cache.positions(0, layer, head).tolist()
        for layer in range(session.config.layers)
        for head in range(session.config.kv_heads)
    ]


def test_alpha_1_with_half_of_the_budget_recent_is_h2o() -> None:
    ours = new_session(MODEL, 1, A2sfCache, A2sfConfig(32, alpha=1.0, recent=16))
    h2o = new_session(MODEL, 1, H2OCache, H2OConfig(32))
    assert torch.equal(ours.prefill([PROMPT]), h2o.prefill([PROMPT]))
    for token in random_tokens(40, seed=1):
        assert torch.equal(ours.decode([token]), h2o.decode([token]))
        assert held(ours) == held(h2o)


def test_alpha_0_is_the_choice_of_the_last_query() -> None:
    """With one key head, TOVA's mean over heads is that head's row."""
    ours = new_session(MQA, 1, A2sfCache, A2sfConfig(32, alpha=0.0))
    tova = new_session(MQA, 1, TovaCache, TovaConfig(32))
    assert torch.equal(ours.prefill([PROMPT]), tova.prefill([PROMPT]))
    for token in random_tokens(40, seed=1):
        assert torch.equal(ours.decode([token]), tova.decode([token]))
        assert held(ours) == held(tova)


def test_old_tokens_outscore_new_ones_only_without_forgetting() -> None:
    """The bias that the paper removes: more queries have seen an old token. Random weights have no sinks."""
    ages = torch.arange(90, 0, -1).double()

    def correlation(alpha: float) -> float:
        scores = scores_after(A2sfConfig(4096, alpha=alpha).policy)[..., :90].double()
        ranks = scores.argsort(-1).argsort(-1).double()
        return float(
            torch.stack([torch.corrcoef(torch.stack((row, ages)))[0, 1] for row in ranks.flatten(0, 1)]).mean()
        )

    assert correlation(1.0) > 0.6
    assert abs(correlation(0.2)) < 0.25


def test_recent_tokens_stay_where_they_are_asked_to() -> None:
    session = new_session(MODEL, 1, A2sfCache, A2sfConfig(20, recent=6))
    session.prefill([PROMPT])
    for token in random_tokens(30):
        session.decode([token])
        length = session.lengths[0]
        assert all(set(range(length - 6, length)) <= set(positions) for positions in held(session))
