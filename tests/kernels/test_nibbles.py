"""Four-bit codes: the portable order is GGUF's, and PyTorch's packed layout is understood, not assumed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewer.kernels import nibbles

claim = settings(max_examples=25, deadline=None)
shapes = st.tuples(st.integers(1, 150), st.integers(1, 6).map(lambda n: 32 * n))


def random_codes(shape: tuple[int, int], seed: int) -> torch.Tensor:
    return torch.randint(0, 16, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@claim
@given(shapes, st.integers(0, 10**6))
def test_both_packings_have_inverses(shape: tuple[int, int], seed: int) -> None:
    codes = random_codes(shape, seed)
    assert torch.equal(nibbles.unpack_nibbles(nibbles.pack_nibbles(codes)), codes)
    assert torch.equal(nibbles.unpack_from_cpu(nibbles.pack_for_cpu(codes), shape[0]), codes)


@claim
@given(st.integers(1, 150), st.integers(1, 6), st.integers(0, 10**6))
def test_every_byte_is_a_pair_of_codes(rows: int, blocks: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (rows, 16 * blocks), dtype=torch.uint8, generator=generator)
    assert torch.equal(nibbles.pack_nibbles(nibbles.unpack_nibbles(packed)), packed)


def test_the_portable_order_is_that_of_gguf() -> None:
    codes = random_codes((3, 64), 0)
    packed = nibbles.pack_nibbles(codes)
    for block in range(2):
        for byte in range(16):
            low, high = codes[:, 32 * block + byte], codes[:, 32 * block + byte + 16]
            assert torch.equal(packed[:, 16 * block + byte], low | (high << 4))


@claim
@given(shapes, st.integers(0, 10**6))
def test_a_few_rows_are_decoded_alone(shape: tuple[int, int], seed: int) -> None:
    codes = random_codes(shape, seed)
    index = torch.randint(0, shape[0], (7,), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(nibbles.rows_from_cpu(nibbles.pack_for_cpu(codes), index), codes[index])


@pytest.mark.parametrize("count", [1, nibbles.DENSE_FROM - 1, nibbles.DENSE_FROM, nibbles.DENSE_FROM + 5])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_products_on_either_side_of_the_switch_to_a_dense_matrix(group_size: int, count: int) -> None:
    torch.manual_seed(0)
    codes, groups = random_codes((70, 256), 1), 256 // group_size
    scale, zero = torch.rand(70, groups).bfloat16(), torch.randn(70, groups).bfloat16()
    x = torch.randn(count, 256).bfloat16()
    packed, scales = nibbles.pack_for_cpu(codes), nibbles.scales_for_cpu(scale, zero)
    out = nibbles.matmul_cpu(x, packed, group_size, scales, 70)
    wide = [part.double().repeat_interleave(group_size, 1) for part in (scale, zero)]
    weight = (codes.double() - 8) * wide[0] + wide[1]
    wanted, reach = x.double() @ weight.t(), x.double().abs() @ weight.t().abs()
    assert out.shape == (count, 70)
    assert ((out.double() - wanted).abs() <= 2**-8 * (wanted.abs() + reach)).all()
