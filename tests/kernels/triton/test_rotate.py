"""Rotary positions in Triton, against complex products."""

from __future__ import annotations

import pytest
import torch

from fewer.kernels.triton.rotate import rotate
from fewer.model.rope import Rotary


@pytest.mark.parametrize(
    ("heads", "tokens", "head_dim", "rotary_dim"), [(4, 1, 16, 16), (3, 9, 80, 80), (9, 5, 64, 32), (1, 40, 128, 128)]
)
def test_pairs_turn_as_complex_numbers(
    heads: int, tokens: int, head_dim: int, rotary_dim: int, device: torch.device
) -> None:
    rotary = Rotary(rotary_dim, head_dim, 10_000.0, 4096)
    x = torch.randn(2, tokens, heads + 2, head_dim)[:, :, :heads].transpose(1, 2)  # as a fused projection leaves it
    positions = torch.stack((torch.arange(tokens), 3000 + torch.arange(tokens)))
    found = rotate(x.to(device), rotary.factors(positions).to(device))
    assert found.shape == x.shape and found.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(found.cpu(), rotary.apply(x, positions), rtol=1e-5, atol=1e-5)


def test_sixteen_bits_are_turned_in_float32(device: torch.device) -> None:
    rotary = Rotary(64, 64, 10_000.0, 4096)
    x, positions = torch.randn(1, 2, 6, 64).bfloat16(), torch.arange(6)[None] + 900
    found = rotate(x.to(device), rotary.factors(positions).to(device))
    assert found.dtype == torch.bfloat16
    wanted = rotary.apply(x.float(), positions)
    torch.testing.assert_close(found.cpu().float(), wanted, rtol=2**-7, atol=1e-6)


def test_one_line_of_positions_serves_every_row(device: torch.device) -> None:
    rotary = Rotary(32, 32, 10_000.0, 4096)
    x, positions = torch.randn(3, 2, 5, 32), torch.arange(5)[None]
    found = rotate(x.to(device), rotary.factors(positions).to(device))
    torch.testing.assert_close(found.cpu(), rotary.apply(x, positions), rtol=1e-5, atol=1e-5)
    assert rotate(x[:, :, :0].to(device), rotary.factors(positions[:, :0]).to(device)).shape == (3, 2, 0, 32)


def test_the_network_turns_by_it_on_a_gpu(device: torch.device) -> None:
    rotary = Rotary(64, 64, 10_000.0, 4096)
    x, positions = torch.randn(2, 3, 4, 64), torch.arange(8).view(2, 4)
    found = rotary.apply(x.to(device), positions.to(device))
    torch.testing.assert_close(found.cpu(), rotary.apply(x, positions), rtol=1e-5, atol=1e-5)
