"""A drafter that observes is told the final norm's output at every committed token, once and in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fewer.cache import FullCache, HydragenCache, HydragenConfig, PagedCache, TidalDecodeCache, TidalDecodeConfig
from fewer.decoding.generate import generate
from fewer.decoding.sampling import SamplingConfig
from fewer.engine.runner import Runner
from fewer.model.step import Step
from fewer.model.transformer import Transformer
from fewer.slots import DraftTree, HiddenDrafter
from tests.decoding.drafters import EachRow, Scripted, adversary, chance, oracle
from tests.random_model import CONFIG, new_session, random_tokens, random_transformer

PROMPTS = [random_tokens(count, seed=count) for count in (23, 9, 4, 41, 15)]
TOKENS = 24


class Observer(Scripted):
    """Drafts as another, and keeps what it is told."""

    def __init__(self, drafter: Scripted):
        super().__init__(drafter.guess)
        self.rows: list[Tensor] = []

    def observe(self, hidden: Tensor) -> None:
        self.rows.append(hidden.clone())


def hidden_of(model: Transformer, tokens: Sequence[int]) -> Tensor:
    """[T, d] of one pass over a text."""
    step = Step(torch.tensor([tokens]), torch.arange(len(tokens))[None], logits="none", hidden=True)
    found = model.forward(step, FullCache(model.config, 1, len(tokens), model.dtype, model.device))
    assert found.logits is None and found.hidden is not None
    return found.hidden[0]


def answers(model: Transformer, prompts: list[list[int]], strategy: Any, cache: Any = (FullCache,)) -> list[list[int]]:
    session = new_session(model, len(prompts), *cache)
    session.runner.chunk = 16  # prompts come in pieces
    texts: list[list[int]] = [[] for _ in prompts]
    for event in generate(session, prompts, SamplingConfig(), strategy, TOKENS):
        texts[event.row] += event.tokens
    return texts


def observers(model: Transformer, prompts: list[list[int]], expected: list[list[int]]) -> EachRow:
    def make(row: int) -> Observer:
        kinds = [
            lambda: oracle(prompts[row], expected[row], 3),
            lambda: chance(CONFIG.vocab_size, row),
            lambda: adversary(prompts[row], expected[row], CONFIG.vocab_size),
            lambda: Scripted(lambda context, limit: DraftTree([context[-1]], [-1])),
        ]
        return Observer(kinds[row % len(kinds)]())

    return EachRow(make)


CACHES: dict[str, tuple[Any, ...]] = {
    "full": (FullCache,),
    "paged": (PagedCache,),
    "hydragen": (HydragenCache, HydragenConfig(shortest=2, split="always")),
}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("rows", [1, 5])
def test_every_committed_token_is_told_once(cache: str, rows: int) -> None:
    model = random_transformer()
    prompts = [[*PROMPTS[0][:8], *prompt] for prompt in PROMPTS[:rows]]  # which caches that share compute once
    expected = answers(model, prompts, None)
    strategy = observers(model, prompts, expected)
    assert answers(model, prompts, strategy, CACHES[cache]) == expected
    for row, drafter in strategy.made.items():
        assert isinstance(drafter, HiddenDrafter) and isinstance(drafter, Observer)
        found = torch.cat(drafter.rows)
        text = [*prompts[row], *expected[row]][:-1]
        torch.testing.assert_close(found, hidden_of(model, text), atol=2e-4, rtol=2e-4)


def test_rows_with_and_without_observers_decode_together() -> None:
    model = random_transformer()
    expected = answers(model, PROMPTS, None)
    seen = Observer(oracle(PROMPTS[1], expected[1], 4))
    strategy = EachRow(lambda row: seen if row == 1 else oracle(PROMPTS[row], expected[row], row) if row else None)
    assert answers(model, PROMPTS, strategy) == expected
    assert len(torch.cat(seen.rows)) == len(PROMPTS[1]) + TOKENS - 1


def test_keys_that_are_corrected_are_not_told_again() -> None:
    model = random_transformer()
    settings = TidalDecodeConfig(budget=8, start=0, reselect="none", correct_every=4)
    cache = (TidalDecodeCache, settings)
    expected = answers(model, PROMPTS[:1], None, cache)
    seen = Observer(oracle(PROMPTS[0], expected[0], 3))
    assert answers(model, PROMPTS[:1], EachRow(lambda row: seen), cache) == expected
    assert len(torch.cat(seen.rows)) == len(PROMPTS[0]) + TOKENS - 1


@pytest.mark.parametrize("logits", ["last", "all"])
@pytest.mark.parametrize("width", [1, 5, 40])
def test_logits_are_the_same_where_hidden_states_are_asked_for(logits: Any, width: int) -> None:
    model, tokens = random_transformer(), torch.tensor([random_tokens(width)])
    found = []
    for hidden in (False, True):
        step = Step(tokens, torch.arange(width)[None], logits=logits, hidden=hidden)
        found.append(Runner(model).step(step, FullCache(model.config, 1, 64, model.dtype, model.device)))
    torch.testing.assert_close(found[0].logits, found[1].logits, atol=1e-5, rtol=1e-5)
    assert found[1].hidden is not None and found[1].hidden.shape == (1, width, CONFIG.hidden_size)


def test_nobody_is_told_where_nobody_asks() -> None:
    session = new_session(random_transformer())
    assert not session.observers
    session.prefill([PROMPTS[0]])
    session.verify([DraftTree([1, 2], [-1, 0])])
    session.commit([[0]])
    assert session._tentative is None
