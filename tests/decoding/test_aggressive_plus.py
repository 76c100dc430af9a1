"""Tolerant acceptance: exact at its limits, more is accepted the more it tolerates, and only what it says."""

from __future__ import annotations

import pytest
import torch

from fewer.decoding import tree as trees
from fewer.decoding.aggressive_plus import AggressivePlus, AggressivePlusConfig
from fewer.decoding.sampling import Sampler, SamplingConfig
from fewer.decoding.verifier import accept
from fewer.errors import UsageError
from fewer.recipe import Recipe
from fewer.slots import Drafter
from tests.decoding.copying import edited
from tests.decoding.drafters import oracle
from tests.decoding.test_speculation import run
from tests.random_model import random_tokens, random_transformer

MODEL = random_transformer()
PROMPTS = [random_tokens(5 + index % 19, seed=index) for index in range(40)]
GREEDY, HOT = SamplingConfig(), SamplingConfig(temperature=1.3, top_k=20, seed=7)


class Edited(AggressivePlus):
    """Guesses each row's plain answer with some tokens replaced."""

    def __init__(self, answers: list[list[int]], **settings: float):
        super().__init__(AggressivePlusConfig(**settings))  # type: ignore[arg-type]
        self.answers = answers

    def drafter(self, sampling: SamplingConfig, row: int) -> Drafter:
        return oracle(PROMPTS[row], edited(self.answers[row], 9, "s", row, range(48)), 6)


@pytest.fixture(scope="module")
def plain() -> list[list[int]]:
    return run(MODEL, PROMPTS, max_tokens=48)


@pytest.mark.parametrize("settings", [{"beta": 1}, {"tau": 0.0}, {"beta": 1, "tau": 9.0}], ids=str)
def test_without_tolerance_the_text_is_the_plain_one(settings: dict[str, float], plain: list[list[int]]) -> None:
    assert run(MODEL, PROMPTS, Edited(plain, **settings), max_tokens=48) == plain


def test_sampled_text_is_verified_exactly() -> None:
    plain = run(MODEL, PROMPTS, sampling=HOT, max_tokens=48)
    assert run(MODEL, PROMPTS, Edited(plain, beta=9, tau=9.0), HOT, 48) == plain


def test_tolerance_changes_the_text(plain: list[list[int]]) -> None:
    assert run(MODEL, PROMPTS, Edited(plain, beta=5, tau=2.0), max_tokens=48) != plain


def test_the_same_guesses_pass_further_the_more_is_tolerated() -> None:
    """Within one pass. Over a whole text more may also be lost, where what was tolerated leads elsewhere."""
    generator = torch.Generator().manual_seed(0)
    lengths: dict[tuple[int, float], float] = {}
    for _ in range(200):
        logits = 2 * torch.randn(9, 48, generator=generator)
        near = logits[:8].topk(6).indices
        guesses = near[torch.arange(8), torch.randint(0, 6, (8,), generator=generator)].tolist()
        for beta, tau in [(1, 9.0), (2, 9.0), (4, 9.0), (6, 9.0), (6, 0.0), (6, 0.5), (6, 2.0)]:
            strategy = AggressivePlus(AggressivePlusConfig(beta=beta, tau=tau))
            path, _ = strategy.rule(trees.chain(3, guesses), logits, Sampler(GREEDY), [3])
            lengths[beta, tau] = lengths.get((beta, tau), 0) + len(path)
    by_beta = [lengths[beta, 9.0] for beta in (1, 2, 4, 6)]
    by_tau = [lengths[6, tau] for tau in (0.0, 0.5, 2.0, 9.0)]
    assert by_beta == sorted(set(by_beta)) and by_tau == sorted(set(by_tau))
    assert lengths[1, 9.0] == lengths[6, 0.0] and lengths[6, 9.0] == 200 * 9


LOGITS = torch.tensor([[0.0, 3.0, 2.5, 1.0], [4.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])


@pytest.mark.parametrize(
    ("beta", "tau", "expected"),
    [(2, 0.5, ([0, 1], 0)), (2, 0.4, ([0], 1)), (1, 9.0, ([0], 1)), (3, 9.0, ([0, 1, 2], 3))],
)
def test_a_guess_passes_by_rank_and_by_gap(beta: int, tau: float, expected: tuple[list[int], int]) -> None:
    """Token 2 is second, 0.5 below token 1; then token 3 ties with two others, 4.0 below token 0."""
    strategy, chain = AggressivePlus(AggressivePlusConfig(beta=beta, tau=tau)), trees.chain(3, [2, 3])
    assert strategy.rule(chain, LOGITS, Sampler(GREEDY), [3]) == expected
    assert accept(chain, LOGITS, Sampler(GREEDY), [3]) == ([0], 1)


@pytest.mark.parametrize("setting", ["beta=0", "tau=-1", "tau=nan", "tokens=64", "source="])
def test_settings_out_of_range_are_refused(setting: str) -> None:
    with pytest.raises(UsageError, match=f"aggressive-plus: {setting.partition('=')[0]}"):
        Recipe(decoding=f"aggressive-plus:{setting}")
