"""Losses against their definitions; token blocks in a seeded order."""

from __future__ import annotations

import pytest
import torch

from fewer.errors import UsageError
from fewer.training.data import TokenBlocks
from fewer.training.losses import distillation, hidden_mse, next_token_loss


def test_distillation_is_the_divergence_of_the_two_laws_in_float64() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    p, q = (teacher.double() / 2).softmax(-1), (student.double() / 2).softmax(-1)
    forward = 4 * (p * (p / q).log()).sum(-1).mean()
    reverse = 4 * (q * (q / p).log()).sum(-1).mean()
    assert float(distillation(student, teacher, 2.0)) == pytest.approx(float(forward), rel=1e-5)
    assert float(distillation(student, teacher, 2.0, "reverse")) == pytest.approx(float(reverse), rel=1e-5)
    assert float(distillation(teacher, teacher)) == pytest.approx(0.0, abs=1e-6)


def test_a_mask_leaves_out_positions() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 7), torch.randn(2, 4, 7)
    mask = torch.tensor([[True, True, False, False], [True, False, False, False]])
    assert torch.allclose(distillation(student, teacher, mask=mask), distillation(student[mask], teacher[mask]))


def test_next_token_loss_scores_each_token_by_the_logits_before_it() -> None:
    tokens = torch.tensor([[1, 2, 0]])
    logits = torch.zeros(1, 3, 4)
    logits[0, 0, 2] = logits[0, 1, 0] = 50.0  # certain of what comes
    assert float(next_token_loss(logits, tokens)) == pytest.approx(0.0, abs=1e-6)


def test_hidden_mse_of_zeros_is_one() -> None:
    teacher = torch.randn(3, 8)
    assert float(hidden_mse(torch.zeros(3, 8), teacher)) == pytest.approx(1.0)
    assert float(hidden_mse(teacher, teacher)) == 0.0


def test_an_epoch_gives_out_every_block_once_in_an_order_that_the_seed_decides() -> None:
    data = TokenBlocks.from_tokens(list(range(100)), 10, 2, seed=5)
    epoch = torch.cat([data.batch(index) for index in range(5)])
    assert sorted(epoch[:, 0].tolist()) == list(range(0, 100, 10))
    again = TokenBlocks.from_tokens(list(range(100)), 10, 2, seed=5)
    assert torch.equal(again.batch(7), data.batch(7))
    other = TokenBlocks.from_tokens(list(range(100)), 10, 2, seed=6)
    assert any(not torch.equal(other.batch(index), data.batch(index)) for index in range(5))
    assert other.fingerprint != data.fingerprint == again.fingerprint


def test_too_little_text_is_refused() -> None:
    with pytest.raises(UsageError, match="3 tokens do not fill one block of 8"):
        TokenBlocks.from_tokens([1, 2, 3], 8, 1)
