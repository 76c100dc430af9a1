"""Formats: what is stored is what is multiplied, for any shape."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewer.errors import UsageError
from fewer.formats import FORMATS, DenseFormat, Int4Format, Int8Format, WeightFormat
from fewer.kernels import nibbles


def grouped_int8(rows: int, columns: int) -> Int8Format:
    codes = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    return Int8Format.from_codes(codes, torch.rand(rows, columns // 32) + 0.01)


def every_format(rows: int, columns: int) -> list[WeightFormat]:
    weight = torch.randn(rows, columns)
    return [
        DenseFormat(weight),
        DenseFormat(weight.bfloat16()),
        Int8Format.from_dense(weight),
        grouped_int8(rows, columns),
        *(Int4Format.from_dense(weight, group) for group in (32, 64, 128) if columns % group == 0),
    ]


shapes = st.tuples(st.integers(1, 200), st.integers(1, 8).map(lambda n: 32 * n))


@settings(max_examples=25, deadline=None)
@given(shapes, st.sampled_from([1, 2, 5, 150]))
def test_product_equals_the_dequantised_matrix_in_float64(shape: tuple[int, int], rows: int) -> None:
    for stored in every_format(*shape):
        x = torch.randn(rows, shape[1]).to(stored.compute_dtype)
        expected = x.double() @ stored.dequantize().double().t()
        error = (stored.matmul(x).double() - expected).norm() / expected.norm()
        assert error < 5e-3, stored.name
        torch.testing.assert_close(
            stored.product()(x), stored.matmul(x), rtol=0.02, atol=0.02 * float(expected.abs().max())
        )


@settings(max_examples=25, deadline=None)
@given(shapes)
def test_state_dict_restores_the_same_matrix(shape: tuple[int, int]) -> None:
    for stored in every_format(*shape):
        tensors = stored.state_dict()
        again = FORMATS[stored.name].from_state_dict(tensors, torch.device("cpu"))
        assert torch.equal(again.dequantize(), stored.dequantize())
        assert all(torch.equal(value, again.state_dict()[key]) for key, value in tensors.items())


@settings(max_examples=25, deadline=None)
@given(shapes)
def test_rows_are_rows_of_the_matrix(shape: tuple[int, int]) -> None:
    index = torch.randint(0, shape[0], (2, 3))
    for stored in every_format(*shape):
        assert torch.equal(stored.rows(index), stored.dequantize()[index])


@pytest.mark.parametrize("sizes", [(64, 128, 64), (30, 5, 7)])
def test_concatenation_stacks_rows(sizes: tuple[int, ...]) -> None:
    for parts in zip(*(every_format(rows, 128) for rows in sizes), strict=True):
        joined = type(parts[0]).concatenate(parts)
        assert joined.shape == (sum(sizes), 128)
        assert torch.equal(joined.dequantize(), torch.cat([part.dequantize() for part in parts]))


def test_rounding_errors_stay_within_half_a_step() -> None:
    weight = torch.randn(64, 128)
    groups = weight.view(64, 4, 32)
    step = (groups.amax(-1) - groups.amin(-1)) / 15
    error = (Int4Format.from_dense(weight, 32).dequantize() - weight).abs().view(64, 4, 32).amax(-1)
    assert (error <= 0.5 * step + 0.04 * weight.abs().max()).all()  # + the bfloat16 rounding of scale and zero
    step8 = weight.abs().amax(1, keepdim=True) / 127
    assert ((Int8Format.from_dense(weight).dequantize() - weight).abs() <= 0.51 * step8 + 2**-8 * weight.abs()).all()


def test_nibble_order_round_trips_and_is_that_of_gguf() -> None:
    codes = torch.randint(0, 16, (3, 64), dtype=torch.uint8)
    packed = nibbles.pack_nibbles(codes)
    assert torch.equal(nibbles.unpack_nibbles(packed), codes)
    assert packed[1, 2] == codes[1, 2] | (codes[1, 18] << 4)


def test_cpu_layout_round_trips() -> None:
    codes = torch.randint(0, 16, (100, 96), dtype=torch.uint8)
    assert torch.equal(nibbles.unpack_from_cpu(nibbles.pack_for_cpu(codes), 100), codes)


def test_bits_per_weight_count_scales() -> None:
    assert Int4Format.from_dense(torch.randn(128, 256), 128).bits_per_weight == 4 + 2 * 16 / 128
    assert Int8Format.from_dense(torch.randn(128, 256)).bits_per_weight == 8 + 16 / 256


def test_a_group_that_does_not_divide_the_width_is_refused_with_what_fits() -> None:
    with pytest.raises(UsageError, match="128 does not fit a matrix of 576 columns: use 32 or 64"):
        Int4Format.from_dense(torch.randn(64, 576), 128)
