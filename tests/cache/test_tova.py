"""TOVA: one set of tokens a layer, without any protection."""

from __future__ import annotations

from fewer.cache import TovaCache, TovaConfig
from tests.random_model import new_session, random_tokens, random_transformer


def test_all_heads_of_a_layer_hold_the_same_tokens() -> None:
    session = new_session(random_transformer(), 1, TovaCache, TovaConfig(20))
    session.prefill([random_tokens(60)])
    for token in random_tokens(30):
        session.decode([token])
        for layer in range(3):
            assert session.cache.positions(0, layer, 0).tolist() == session.cache.positions(0, layer, 1).tolist()
    assert session.cache.positions(0, 0).tolist() != session.cache.positions(0, 1).tolist()
