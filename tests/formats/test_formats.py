"""Formats: what is stored is what is multiplied, for any shape."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewer.errors import UsageError
from fewer.formats import FORMATS, DenseFormat, Int4Format, Int8Format, WeightFormat
from fewer.kernels.packed_product import packed_product

CPU = torch.device("cpu")
KINDS = ["float32", "bfloat16", "int8", "int8 groups", "int4-32", "int4-64", "int4-128"]
claim = settings(max_examples=60, deadline=None)


@dataclass(frozen=True)
class Case:
    """One kind of format and a shape that it can hold."""

    kind: str
    rows: int
    columns: int
    seed: int

    def stored(self, rows: int | None = None) -> WeightFormat:
        """The same random matrix each time; `rows` cuts it or makes it taller."""
        torch.manual_seed(self.seed)
        weight = torch.randn(rows or self.rows, self.columns)
        if self.kind == "int8":
            return Int8Format.from_dense(weight)
        if self.kind == "int8 groups":
            codes = torch.randint(-128, 128, weight.shape, dtype=torch.int8)
            return Int8Format.from_codes(codes, torch.rand(weight.shape[0], self.columns // 32) + 0.01)
        if self.kind.startswith("int4"):
            return Int4Format.from_dense(weight, int(self.kind[5:]))
        return DenseFormat(weight.to(getattr(torch, self.kind)))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kind = draw(st.sampled_from(KINDS))
    step = int(kind[5:]) if kind.startswith("int4") else 32 if kind == "int8 groups" else 1
    columns = draw(st.integers(1, 320 // step)) * step
    return Case(kind, draw(st.integers(1, 200)), columns, draw(st.integers(0, 10**6)))


def product_in_float64(x: Tensor, stored: WeightFormat) -> tuple[Tensor, Tensor]:
    """x Wᵀ, and Σ|x||w|, which rounding errors are measured in."""
    weight = stored.dequantize().double()
    return x.double() @ weight.t(), x.double().abs() @ weight.t().abs()


@claim
@given(cases(), st.sampled_from([1, 2, 5, 150]))
def test_product_equals_the_dequantised_matrix_in_float64(case: Case, count: int) -> None:
    stored = case.stored()
    x = torch.randn(count, case.columns).to(stored.compute_dtype)
    wanted, reach = product_in_float64(x, stored)
    rounding = 2**-22 if stored.compute_dtype == torch.float32 else 2**-8
    # bfloat16: of the result, and of the weights where many rows decode the matrix
    operands = stored.operands()
    outs = [stored.matmul(x)]
    if operands is not None:
        outs.append(packed_product(x, operands.kind, operands.weight, operands.scale, *operands[3:5]))
    for out in outs:
        assert out.dtype == x.dtype
        assert ((out.double() - wanted).abs() <= rounding * (reach + wanted.abs()) + 1e-6).all()


@claim
@given(cases(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_product_takes_any_leading_shape_and_keeps_the_dtype(case: Case, dtype: torch.dtype) -> None:
    stored = case.stored()
    x = torch.randn(2, 3, case.columns).to(dtype)
    out = stored.matmul(x)
    assert out.shape == (2, 3, case.rows) and out.dtype == dtype
    wanted, reach = product_in_float64(x, stored)
    assert ((out.double() - wanted).abs() <= 2**-7 * (reach + wanted.abs()) + 1e-6).all()


@claim
@given(cases())
def test_state_dict_restores_the_same_matrix(case: Case) -> None:
    stored = case.stored()
    tensors = stored.state_dict()
    again = FORMATS[stored.name].from_state_dict(tensors, CPU)
    assert (type(again), again.shape, again.nbytes) == (type(stored), stored.shape, stored.nbytes)
    assert torch.equal(again.dequantize(), stored.dequantize())
    assert tensors.keys() == again.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in tensors.items())
    assert all(value.is_contiguous() for value in tensors.values())  # as safetensors asks


@claim
@given(cases())
def test_rows_are_rows_of_the_matrix(case: Case) -> None:
    stored = case.stored()
    index = torch.randint(0, case.rows, (2, 3))
    rows = stored.rows(index)
    assert rows.dtype == torch.float32
    assert torch.equal(rows, stored.dequantize()[index])


@claim
@given(cases(), st.lists(st.sampled_from([1, 5, 30, 64, 128]), min_size=1, max_size=3))
def test_concatenation_stacks_rows(case: Case, heights: list[int]) -> None:
    parts = [case.stored(rows) for rows in heights]
    joined = type(parts[0]).concatenate(parts)
    assert joined.shape == (sum(heights), case.columns)
    assert torch.equal(joined.dequantize(), torch.cat([part.dequantize() for part in parts]))
    x = torch.randn(2, case.columns).to(joined.compute_dtype)
    separate = torch.cat([part.matmul(x) for part in parts], dim=1)
    torch.testing.assert_close(joined.matmul(x), separate, rtol=2**-7, atol=1e-3)


@claim
@given(cases())
def test_bytes_are_those_of_the_tensors_held(case: Case) -> None:
    stored = case.stored()
    held = {id(value): value for value in vars(stored).values() if isinstance(value, Tensor)}
    assert stored.nbytes == sum(value.untyped_storage().nbytes() for value in held.values())
    assert stored.bits_per_weight == 8 * stored.nbytes / (case.rows * case.columns)


@pytest.mark.parametrize(
    ("kind", "bits"),
    [
        ("float32", 32),
        ("bfloat16", 16),
        ("int8", 8 + 16 / 256),
        ("int8 groups", 8 + 4 * 16 / 32),  # two halves of 4 bits, each with a scale and a zero
        ("int4-32", 4 + 32 / 32),
        ("int4-64", 4 + 32 / 64),
        ("int4-128", 4 + 32 / 128),
    ],
)
def test_bits_per_weight_count_scales(kind: str, bits: float) -> None:
    assert Case(kind, 128, 256, 0).stored().bits_per_weight == bits


# ── rounding ────────────────────────────────────────────────────────────────────────────────────────────────────────


@claim
@given(st.sampled_from([32, 64, 128]), st.integers(1, 3), st.floats(1e-4, 1e3), st.floats(-2, 2), st.integers(0, 10**6))
def test_int4_errors_stay_within_half_a_step(
    group_size: int, groups: int, spread: float, offset: float, seed: int
) -> None:
    torch.manual_seed(seed)
    weight = spread * (torch.randn(9, groups * group_size) + offset)
    stored = Int4Format.from_dense(weight, group_size)
    scale, zero = (stored.state_dict()[name].double().repeat_interleave(group_size, 1) for name in ("scale", "zero"))
    error = (stored.dequantize().double() - weight.double()).abs()
    # Beyond the grid's ends, which the bfloat16 rounding of scale and zero may move by 2⁻⁹ of themselves.
    ends = (15 * scale + zero.abs()) * 2**-9
    assert (error <= torch.maximum(scale / 2, ends) * 1.001).all()


@claim
@given(st.integers(1, 300), st.floats(1e-4, 1e3), st.integers(0, 10**6))
def test_int8_errors_stay_within_half_a_step(columns: int, spread: float, seed: int) -> None:
    torch.manual_seed(seed)
    weight = spread * torch.randn(9, columns)
    stored = Int8Format.from_dense(weight)
    error = (stored.dequantize() - weight).abs()
    step = stored.state_dict()["scale"].float()
    assert (error <= 0.5001 * step).all()
    assert (step <= weight.abs().amax(1, keepdim=True) / 127 * (1 + 2**-8)).all()


@pytest.mark.parametrize("value", [0.0, 0.75, -3.0])
def test_a_constant_matrix_stays_what_it_is(value: float) -> None:
    weight = torch.full((3, 64), value)
    for stored in (Int4Format.from_dense(weight, 32), Int8Format.from_dense(weight)):
        torch.testing.assert_close(stored.dequantize(), weight, rtol=2**-8, atol=1e-6)


@claim
@given(st.sampled_from([32, 64, 128]), st.integers(1, 3), st.integers(1, 70), st.integers(0, 10**6))
def test_int4_codes_are_kept_and_scales_only_rounded(group_size: int, groups: int, rows: int, seed: int) -> None:
    torch.manual_seed(seed)
    codes = torch.randint(0, 16, (rows, groups * group_size), dtype=torch.uint8)
    scale, zero = torch.rand(rows, groups) + 0.01, torch.randn(rows, groups)
    stored = Int4Format.from_codes(codes, scale, zero)
    assert stored.group_size == group_size
    kept = stored.codes()
    for found, wanted in zip(kept, (codes, scale.bfloat16(), zero.bfloat16()), strict=True):
        assert torch.equal(found, wanted)
    wide = [x.bfloat16().double().repeat_interleave(group_size, 1) for x in (scale, zero)]
    assert torch.equal(stored.dequantize(), ((codes.double() - 8) * wide[0] + wide[1]).float())


@claim
@given(st.sampled_from([1, 3]), st.integers(1, 70), st.integers(0, 10**6))
def test_int8_codes_are_kept_and_scales_only_rounded(groups: int, rows: int, seed: int) -> None:
    torch.manual_seed(seed)
    codes = torch.randint(-128, 128, (rows, 96), dtype=torch.int8)
    scale = torch.rand(rows, groups) + 0.01
    stored = Int8Format.from_codes(codes, scale)
    assert torch.equal(stored.state_dict()["codes"], codes)
    assert torch.equal(stored.state_dict()["scale"], scale.bfloat16())
    wanted = codes.double() * scale.bfloat16().double().repeat_interleave(96 // groups, 1)
    assert torch.equal(stored.dequantize(), wanted.float())


# ── refusals ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("columns", "group_size", "advice"),
    [(576, 128, "use 32 or 64"), (96, 64, "use 32"), (100, 32, "keep this matrix dense or int8"), (96, 48, "use 32")],
)
def test_a_group_that_does_not_divide_the_width_is_refused_with_what_fits(
    columns: int, group_size: int, advice: str
) -> None:
    message = f"int4 group size {group_size} does not fit a matrix of {columns} columns: {advice}"
    with pytest.raises(UsageError, match=message):
        Int4Format.from_dense(torch.randn(4, columns), group_size)
    codes = torch.zeros(4, columns, dtype=torch.uint8)
    if columns % group_size == 0:
        with pytest.raises(UsageError, match=message):
            Int4Format.from_codes(codes, *torch.ones(2, 4, columns // group_size))


def test_int8_takes_a_scale_a_row_or_a_group_of_32() -> None:
    codes = torch.zeros(4, 128, dtype=torch.int8)
    with pytest.raises(ValueError, match="int8 takes 1 or 4 scales a row, not 2"):
        Int8Format.from_codes(codes, torch.ones(4, 2))


def test_matrices_of_different_groups_are_not_stacked() -> None:
    weight = torch.randn(4, 128)
    with pytest.raises(ValueError, match="different group sizes"):
        Int4Format.concatenate([Int4Format.from_dense(weight, 32), Int4Format.from_dense(weight, 64)])
    with pytest.raises(ValueError, match="different groupings"):
        Int8Format.concatenate([Int8Format.from_dense(weight), Case("int8 groups", 4, 128, 0).stored()])  # type: ignore[list-item]


# ── on a GPU ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 7, 150])
@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_moved_to_the_gpu_is_the_same_matrix(kind: str, count: int) -> None:
    case = Case(kind, 83, 384, 0)
    stored, gpu = case.stored(), torch.device("cuda")
    moved = stored.to(gpu)
    assert moved.device.type == "cuda"
    assert torch.equal(moved.dequantize().cpu(), stored.dequantize())
    assert torch.equal(moved.to(CPU).dequantize(), stored.dequantize())
    index = torch.randint(0, 83, (2, 3))
    assert torch.equal(moved.rows(index.to(gpu)).cpu(), stored.rows(index))
    x = torch.randn(count, 384).to(stored.compute_dtype)
    wanted, reach = product_in_float64(x, stored)
    out = moved.matmul(x.to(gpu)).cpu().double()
    rounding = 2**-20 if stored.compute_dtype == torch.float32 else 2**-8
    assert ((out - wanted).abs() <= rounding * (reach + wanted.abs())).all()
    parts = [moved, case.stored(5).to(gpu)]
    joined = type(moved).concatenate(parts)
    assert torch.equal(joined.dequantize(), torch.cat([part.dequantize() for part in parts]))
