"""Products with stored matrices, and what is fused around them, against float64.

Codes, scales, x and gains are chosen so that every product is exact in bfloat16: what remains is float32 rounding of
sums, and one narrow tolerance serves the vector kernels and the tensor-core kernel alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fewer.kernels.nibbles import pack_nibbles
from fewer.kernels.triton import linear
from fewer.kernels.triton.block_sizes import Blocks
from fewer.kernels.triton.linear import Fused, Stored, dequantize, matmul, multiply

KINDS = ["float32", "bfloat16", "int8", "int8-32", "int4-32", "int4-64", "int4-128"]
ACTIVATIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


@dataclass(frozen=True)
class Problem:
    """A matrix as the kernels read it, and the same matrix in float64."""

    matrix: Stored
    dense: Tensor  # [N, K]


def integers(*shape: int, reach: int = 4) -> Tensor:
    return torch.randint(-reach, reach + 1, shape).float()


def powers(*shape: int) -> Tensor:
    return 2.0 ** torch.randint(-2, 2, shape)


def problem(kind: str, rows: int, columns: int, device: torch.device) -> Problem:
    name, _, group = kind.partition("-")
    if name in ("float32", "bfloat16"):
        weight = integers(rows, columns).to(getattr(torch, name))
        return Problem(Stored("dense", weight.to(device)), weight.double())
    group_size = int(group) if group else columns
    scale = powers(rows, columns // group_size)
    if name == "int8":
        codes = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
        dense = (codes.double().unflatten(1, (-1, group_size)) * scale.double()[..., None]).flatten(1)
        return Problem(Stored("int8", codes.to(device), scale.bfloat16().to(device)), dense)
    codes, zero = torch.randint(0, 16, (rows, columns), dtype=torch.uint8), integers(*scale.shape)
    dense = (codes.double() - 8).unflatten(1, (-1, group_size)) * scale.double()[..., None] + zero.double()[..., None]
    stored = (pack_nibbles(codes).to(device), scale.bfloat16().to(device), zero.bfloat16().to(device))
    return Problem(Stored("int4", *stored), dense.flatten(1))


def expected(x: Tensor, dense: Tensor, fused: Fused) -> Tensor:
    """The same in float64, on the CPU."""
    x = x.double().cpu()
    if fused.gain is not None:
        x = x * (x.square().mean(-1, keepdim=True) + fused.eps).rsqrt() * fused.gain.double().cpu()
    out = x @ dense.t()
    if fused.bias is not None:
        out = out + fused.bias.double().cpu()
    if fused.activation != "none":
        gate, up = out.chunk(2, dim=-1)
        out = ACTIVATIONS[fused.activation](gate) * up
    return out if fused.residual is None else out + fused.residual.double().cpu()


def assert_equal(out: Tensor, wanted: Tensor, tolerance: float = 2e-5) -> None:
    assert out.shape == wanted.shape
    error = (out.double().cpu() - wanted).abs().max() / wanted.abs().max()
    assert error <= tolerance


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 17, 64])
def test_product_equals_float64(kind: str, count: int, device: torch.device) -> None:
    rows, columns = 37, 384  # rows fill no block, and columns are no power of two
    case = problem(kind, rows, columns, device)
    x = integers(count, columns).to(device)
    out = multiply(x, case.matrix, torch.empty(count, rows, device=device))
    assert_equal(out, expected(x, case.dense, Fused()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 3])
def test_product_in_blocks_that_do_not_divide_the_width(kind: str, count: int, device: torch.device) -> None:
    case = problem(kind, 5, 640, device)  # 640 = 2.5 blocks
    x = integers(count, 640).to(device)
    blocks = Blocks(4 if count == 1 else 16, 256, 4)
    out = multiply(x, case.matrix, torch.empty(count, 5, device=device), blocks=blocks)
    assert_equal(out, expected(x, case.dense, Fused()))


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int8-32", "int4-32"])
@pytest.mark.parametrize("count", [1, 2])
def test_the_narrowest_matrix_has_one_row_and_one_group(kind: str, count: int, device: torch.device) -> None:
    case = problem(kind, 1, 32, device)
    x = integers(count, 32).to(device)
    out = multiply(x, case.matrix, torch.empty(count, 1, device=device))
    assert_equal(out, expected(x, case.dense, Fused()))


@pytest.mark.parametrize("columns", [8, 40, 576])
@pytest.mark.parametrize("count", [1, 2])
def test_int8_rows_of_any_width(columns: int, count: int, device: torch.device) -> None:
    case = problem("int8", 7, columns, device)
    x = integers(count, columns).to(device)
    assert_equal(linear.int8_matmul(x, *case.matrix[1:3]), expected(x, case.dense, Fused()))


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4-32"])
@pytest.mark.parametrize("count", [1, 3])
def test_norm_bias_and_residual_are_fused_in_their_order(kind: str, count: int, device: torch.device) -> None:
    rows, columns = 37, 160
    case = problem(kind, rows, columns, device)
    x = integers(count, columns).to(device)
    fused = Fused(
        gain=powers(columns).to(device),
        eps=0.1,  # large enough to be missed
        bias=(100 * torch.randn(rows)).to(device),
        residual=(100 * torch.randn(count, rows)).to(device),
    )
    out = multiply(x, case.matrix, torch.empty(count, rows, device=device), fused)
    assert_equal(out, expected(x, case.dense, fused))


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int8-32", "int4-32"])
@pytest.mark.parametrize("count", [1, 3])
def test_gating_multiplies_the_halves(kind: str, count: int, activation: str, device: torch.device) -> None:
    rows, columns = 21, 160
    case = problem(kind, 2 * rows, columns, device)
    x = integers(count, columns).to(device)
    small = 0.5 ** round(case.dense.norm(dim=1).mean().log2().item())  # gates of about one, where activations differ
    fused = Fused(small * powers(columns).to(device), 1e-5, torch.randn(2 * rows).to(device), activation)
    out = multiply(x, case.matrix, torch.empty(count, rows, device=device), fused)
    assert_equal(out, expected(x, case.dense, fused))


@pytest.mark.parametrize("count", [1, 3])
def test_residual_may_be_the_output_itself(count: int, device: torch.device) -> None:
    case = problem("int4-32", 21, 96, device)
    x, out = integers(count, 96).to(device), torch.randn(count, 21).to(device)
    wanted = expected(x, case.dense, Fused(residual=out.clone()))
    multiply(x, case.matrix, out, Fused(residual=out))
    assert_equal(out, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_dequantised_matrix_is_exact(kind: str, device: torch.device) -> None:
    case = problem(kind, 5, 2176 if kind.endswith(("128", "64")) else 2080, device)  # more than two blocks
    for dtype in (torch.float32, torch.bfloat16):  # every value fits bfloat16
        assert torch.equal(dequantize(case.matrix, dtype).double().cpu(), case.dense)


@pytest.mark.parametrize("kind", ["int8", "int8-32", "int4-64"])
@pytest.mark.parametrize("count", [1, 3, 64, 65])
def test_matmul_keeps_the_dtype_of_x_on_every_route(kind: str, count: int, device: torch.device) -> None:
    case = problem(kind, 19, 128, device)
    x = integers(count, 128).to(device).bfloat16()
    out = matmul(x, case.matrix)
    assert out.dtype == torch.bfloat16
    assert_equal(out, expected(x, case.dense, Fused()), tolerance=2**-7)  # the interpreter truncates to bfloat16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 4])
def test_ordinary_numbers_round_no_worse_than_bfloat16(kind: str, count: int, device: torch.device) -> None:
    case = problem(kind, 33, 256, device)
    matrix, dense = case.matrix, case.dense
    if matrix.scale is not None:  # scales of 24 significant bits, in float32
        scale = matrix.scale.float() * (1 + torch.rand(matrix.scale.shape).to(device))
        dense = dequantize(matrix._replace(scale=scale), torch.float32).double().cpu()
        matrix = matrix._replace(scale=scale)
    x, fused = torch.randn(count, 256).to(device), Fused((1 + torch.rand(256)).to(device), 1e-5)
    out = multiply(x, matrix, torch.empty(count, 33, device=device), fused).double().cpu()
    normed = x.double().cpu() * fused.gain.double().cpu()
    normed *= (x.double().cpu().square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    rounding = 2e-6 if count == 1 or kind == "float32" else 2**-8  # of each product: x and w to bfloat16
    if kind.startswith("int4"):
        rounding = max(rounding, 2**-12)  # the codes' bit patterns are thousands of times as large as the codes
    assert ((out - normed @ dense.t()).abs() <= rounding * (normed.abs() @ dense.abs().t())).all()
