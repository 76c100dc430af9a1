"""Products of many rows, with what is fused around them, against float64: the numbers of `test_linear`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewer.kernels.new_tokens import Workspace
from fewer.kernels.triton.linear import Fused
from fewer.kernels.triton.wide import multiply_wide
from tests.kernels.triton.test_linear import KINDS, assert_equal, expected, integers, powers, problem

ROWS, COLUMNS = 6, 384


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def check(kind: str, size: int, fused: Fused, device: torch.device, out: Tensor | None = None) -> Tensor:
    """A matrix of as many rows as `fused` asks for, times integers."""
    case = problem(kind, size, COLUMNS, device)
    x = integers(ROWS, COLUMNS).to(device)
    wanted = expected(x, case.dense, fused)
    out = torch.empty(wanted.shape, device=device) if out is None else out
    found = multiply_wide(x, case.matrix, out, Workspace(device), fused)
    assert found.data_ptr() == out.data_ptr()
    # A product is rounded to the type that is multiplied; where there is a norm, so are its rows.
    assert_equal(found, wanted, 2e-5 if kind == "float32" else 0.02)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_plain_product(kind: str, device: torch.device) -> None:
    check(kind, 37, Fused(), device)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int4-32"])
def test_norm_bias_and_residual(kind: str, device: torch.device) -> None:
    gain, bias = powers(COLUMNS).to(device), integers(37).to(device)
    check(kind, 37, Fused(gain, 0.5, bias, residual=integers(ROWS, 37).to(device)), device)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_gating(kind: str, activation: str, device: torch.device) -> None:
    check(kind, 74, Fused(powers(COLUMNS).to(device) / 64, 1.0, None, activation), device)
    check(kind, 74, Fused(None, 0.0, integers(74).to(device), activation), device)


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_a_residual_may_be_the_output(kind: str, device: torch.device) -> None:
    out = integers(ROWS, 37).to(device)
    check(kind, 37, Fused(residual=out), device, out)


def test_buffers_are_used_again(device: torch.device) -> None:
    workspace, gain = Workspace(device), torch.ones(COLUMNS, device=device)
    case, x = problem("float32", 74, COLUMNS, device), integers(ROWS, COLUMNS).to(device)
    fused = Fused(gain, 0.1, None, "silu")
    first, second = (
        multiply_wide(part, case.matrix, torch.empty(ROWS, 37, device=device), workspace, fused) for part in (x, 2 * x)
    )
    assert_equal(first, expected(x, case.dense, fused))
    assert_equal(second, expected(2 * x, case.dense, fused))
    assert len(workspace._tensors) == 2
