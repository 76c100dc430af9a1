"""H2O: half heavy hitters, half recent tokens; all recent is a plain window."""

from __future__ import annotations

import pytest
import torch

from fewer.cache import H2OCache, H2OConfig, SinkWindowCache, SinkWindowConfig
from fewer.registry import parse_spec
from tests.random_model import config_of, new_session, random_tokens, random_transformer

CONFIG = config_of(head_dim=16)  # heads that the CPU's fast path takes
MODEL = random_transformer(CONFIG)


def test_the_recent_half_stays_and_the_other_half_is_older() -> None:
    session = new_session(MODEL, 1, H2OCache, H2OConfig(20))
    session.prefill([random_tokens(70)])
    for token in random_tokens(30):
        session.decode([token])
        length = session.lengths[0]
        for head in range(2):
            held = session.cache.positions(0, 1, head).tolist()
            assert held[-10:] == list(range(length - 10, length)) and len(held) == 20


def test_a_budget_of_recent_tokens_alone_is_a_window() -> None:
    """A step sees what was kept and itself: one token more than the window that remains."""
    ours = new_session(MODEL, 1, H2OCache, H2OConfig(20, recent=1.0, mode="stepwise"))
    window = new_session(MODEL, 1, SinkWindowCache, SinkWindowConfig(sinks=0, window=21))
    prompt = random_tokens(60)
    torch.testing.assert_close(ours.prefill([prompt]), window.prefill([prompt]), atol=1e-4, rtol=1e-4)
    for token in random_tokens(20, seed=1):
        torch.testing.assert_close(ours.decode([token]), window.decode([token]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("prompt", "limits"), [(200, (40, 20)), (20, (16, 8))])
def test_the_papers_share_of_the_prompt(prompt: int, limits: tuple[int, int]) -> None:
    settings = parse_spec("cache", "h2o:budget=0,share=0.2").config
    assert settings.policy.limits(prompt) == limits
