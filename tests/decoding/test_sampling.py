"""Sampling: every warp against a float64 reference written out plainly, draws, ties, seeds, and refused values."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fewer.decoding.sampling import (
    DRAFT_STREAM,
    NUCLEUS,
    Sampler,
    SamplingConfig,
    argmax,
    log_probability,
    warp,
)
from fewer.errors import UsageError

VOCAB = 900  # more than NUCLEUS, so that top-p also takes its slow way


def logits_of(seed: int, spread: float = 2.0) -> Tensor:
    return spread * torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))


def reference(logits: Tensor, config: SamplingConfig, history: list[int] = []) -> Tensor:  # noqa: B006
    """The law [V] in float64, one token at a time, in the order the module promises."""
    scores = [float(value) for value in logits.double()]
    for token in set(history):
        penalty = config.repetition_penalty
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    scores = [score / config.temperature for score in scores]
    order = sorted(range(len(scores)), key=lambda token: -scores[token])
    kept = order[: config.top_k] if config.top_k else order
    total = sum(math.exp(scores[token] - scores[order[0]]) for token in kept)
    law = {token: math.exp(scores[token] - scores[order[0]]) / total for token in kept}
    nucleus, mass = [], 0.0
    for token in kept:
        if mass >= config.top_p and config.top_p < 1:  # rounded sums reach 1 early
            break
        nucleus.append(token)
        mass += law[token]
    kept = [token for token in nucleus if law[token] >= config.min_p * law[order[0]]]
    total = sum(law[token] for token in kept)
    out = torch.zeros(len(scores), dtype=torch.float64)
    for token in kept:
        out[token] = law[token] / total
    return out


CONFIGS = [
    SamplingConfig(temperature=1.0),
    SamplingConfig(temperature=0.3),
    SamplingConfig(temperature=2.5),
    SamplingConfig(temperature=1.0, top_k=1),
    SamplingConfig(temperature=0.8, top_k=40),
    SamplingConfig(temperature=1.0, top_k=5000),
    SamplingConfig(temperature=1.0, top_p=0.9),
    SamplingConfig(temperature=9.0, top_p=0.95),  # nearly flat: the nucleus is wider than the first look
    SamplingConfig(temperature=1.0, top_p=1e-9),
    SamplingConfig(temperature=1.0, min_p=0.05),
    SamplingConfig(temperature=1.0, min_p=1.0),
    SamplingConfig(temperature=1.0, repetition_penalty=1.7),
    SamplingConfig(temperature=1.0, repetition_penalty=0.6),
    SamplingConfig(temperature=0.7, top_k=60, top_p=0.9, min_p=0.02, repetition_penalty=1.2),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_warped_law_equals_the_float64_reference(config: SamplingConfig, seed: int) -> None:
    logits = logits_of(seed)
    history = [3, 5, 5, 7, int(logits.argmax())]
    law, expected = warp(logits, config, history), reference(logits, config, history)
    assert torch.equal(law > 0, expected > 0)
    torch.testing.assert_close(law.double(), expected, atol=1e-7, rtol=1e-5)


def test_a_flat_nucleus_is_wider_than_the_first_look() -> None:
    """The case above that is meant to take the slow way does."""
    assert int((warp(logits_of(0), SamplingConfig(temperature=9.0, top_p=0.95)) > 0).sum()) > NUCLEUS


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_rows_are_warped_as_each_would_be_alone(config: SamplingConfig) -> None:
    rows = torch.stack([logits_of(seed, 1.0 + seed) for seed in range(4)])
    together = warp(rows, config, [1, 2])
    for row, alone in zip(rows, together, strict=True):
        torch.testing.assert_close(warp(row, config, [1, 2]), alone)


def test_tokens_that_tie_with_the_last_kept_one_stay() -> None:
    logits = torch.tensor([2.0, 1.0, 1.0, 0.0])
    assert (warp(logits, SamplingConfig(temperature=1.0, top_k=2)) > 0).tolist() == [True, True, True, False]
    assert (warp(logits, SamplingConfig(temperature=1.0, top_p=0.7)) > 0).tolist() == [True, True, True, False]


@pytest.mark.parametrize("temperature", [1e-30, 1e-4])
def test_a_tiny_temperature_is_greedy_and_never_nan(temperature: float) -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, 3.0])
    law = warp(logits, SamplingConfig(temperature=temperature))
    assert law.tolist() == [0.0, 0.5, 0.0, 0.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [7, 64, 5003])
def test_greedy_ties_take_the_lowest_index(dtype: torch.dtype, size: int) -> None:
    logits = torch.zeros(2, size, dtype=dtype)
    logits[0, [size // 2, size - 1]] = 4.0
    assert argmax(logits).tolist() == [size // 2, 0]
    assert Sampler(SamplingConfig()).token(logits[0], []) == size // 2
    assert warp(logits[0], SamplingConfig()).argmax() == size // 2


def test_a_greedy_choice_sees_the_repetition_penalty() -> None:
    logits = torch.tensor([1.0, 1.9, -3.0])
    sampler = Sampler(SamplingConfig(repetition_penalty=2.0))
    assert sampler.token(logits, [0]) == 1
    assert sampler.token(logits, [1]) == 0
    assert sampler.token(torch.tensor([-1.0, -1.5]), [0]) == 1


def test_draws_follow_the_law() -> None:
    """Pearson's statistic of 40,000 draws over 10 outcomes: 9 degrees of freedom, 99.9 % quantile 27.9."""
    law = warp(logits_of(2)[:12], SamplingConfig(temperature=1.0, top_k=10))
    sampler, draws = Sampler(SamplingConfig(temperature=1.0, seed=1)), 40_000
    seen = torch.bincount(torch.tensor([sampler.draw(law) for _ in range(draws)]), minlength=12).double()
    assert bool((seen[law == 0] == 0).all())
    expected = draws * law.double()[law > 0]
    assert float(((seen[law > 0] - expected) ** 2 / expected).sum()) < 27.9


def test_a_draw_never_takes_a_token_of_probability_zero_at_the_ends() -> None:
    class Ends(Sampler):
        """The extreme numbers that a generator can give."""

        def __init__(self, number: float):
            super().__init__(SamplingConfig(temperature=1.0))
            self.number = number

        def uniform(self) -> float:
            return self.number

    law = torch.tensor([0.0, 0.25, 0.5, 0.25, 0.0, 0.0])
    assert Ends(0.0).draw(law) == 1
    assert Ends(1 - 2**-53).draw(law) == 3
    assert Ends(1.0).draw(law) in (1, 2, 3)


def test_a_seed_reproduces_and_other_rows_and_streams_differ() -> None:
    config, law = SamplingConfig(temperature=1.0, seed=11), torch.full((1000,), 1e-3)

    def draws(sampler: Sampler) -> list[int]:
        return [sampler.draw(law) for _ in range(20)]

    first = draws(Sampler(config))
    assert draws(Sampler(config)) == first
    others = [Sampler(config, row=1), Sampler(config, stream=DRAFT_STREAM), Sampler(SamplingConfig(temperature=1.0))]
    for other in others:
        assert draws(other) != first
    assert draws(Sampler(config, row=1)) == draws(Sampler(SamplingConfig(temperature=1.0, seed=12)))


def test_log_probability_is_of_the_unwarped_law() -> None:
    logits = logits_of(4)
    expected = logits.double().log_softmax(-1)
    assert log_probability(logits, 17) == pytest.approx(float(expected[17]), abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"temperature": -0.1}, "temperature is -0.1: use 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"min_p": -0.5}, "min_p is -0.5"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"min_p": math.nan}, "min_p is nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty is inf"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**62}, "seed is 4611686018427387904"),
    ],
)
def test_values_out_of_range_are_refused(settings: dict[str, float], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        SamplingConfig(**settings)  # type: ignore[arg-type]
