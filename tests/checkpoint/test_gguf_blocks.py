"""GGUF blocks: decoded exactly as the gguf package decodes them, and kept as codes in our own formats."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf import quants as reference
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fewer.checkpoint.gguf_blocks import BLOCKS, CHUNK_ELEMENTS, dequantize, direct_format
from fewer.formats import Int4Format, Int8Format

# Where a block keeps its float16 scales: everything else may be any byte.
HALVES = {
    "F16": (0,),
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}
DIRECT = ("Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q8_0")
BFLOAT16_ROUNDING = 2.0**-8  # the most that rounding to 8 significant bits changes a value, relative to it


def random_blocks(kind: str, rows: int, columns: int, seed: int = 0, scale: float | None = None) -> Tensor:
    """uint8 [rows, bytes a row]: any bytes at all, with every scale finite (of either sign, subnormal, or zero).

    `scale` bounds the magnitude of the scales, for tests whose values should be like those of a model.
    """
    block, generator = BLOCKS[kind], torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (rows, columns // block.columns, block.nbytes), generator=generator).to(torch.uint8)
    if kind in ("F32", "BF16"):
        values = torch.randn(rows, columns, generator=generator).to(torch.float32 if kind == "F32" else torch.bfloat16)
        return values.view(torch.uint8)
    for place in HALVES[kind]:
        bits = blocks[..., place : place + 2].contiguous().view(torch.int16).squeeze(-1)
        bits = torch.where((bits >> 10) & 31 == 31, bits & 0x03FF, bits)  # infinities and NaNs become subnormal
        if scale is not None:
            bits = ((torch.rand(bits.shape, generator=generator) * 2 - 1) * scale).half().view(torch.int16)
        blocks[..., place : place + 2] = bits[..., None].view(torch.uint8)
    return blocks.flatten(1)


def decoded_by_gguf(kind: str, raw: Tensor) -> Tensor:
    values = reference.dequantize(raw.numpy(), GGMLQuantizationType[kind])
    return torch.from_numpy(numpy.ascontiguousarray(values, dtype=numpy.float32))


def test_block_numbers_and_sizes_are_those_of_ggml() -> None:
    for kind, block in BLOCKS.items():
        number = GGMLQuantizationType[kind]
        assert (block.number, (block.columns, block.nbytes)) == (number.value, GGML_QUANT_SIZES[number])


@pytest.mark.parametrize("kind", BLOCKS)
def test_decoding_equals_the_gguf_package_to_the_last_bit(kind: str) -> None:
    raw = random_blocks(kind, rows=96, columns=768)
    ours, theirs = dequantize(kind, raw), decoded_by_gguf(kind, raw)
    assert ours.dtype == torch.float32 and ours.shape == (96, 768)
    assert torch.isfinite(ours).all() and ours.unique().numel() > 1000
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", [kind for kind in BLOCKS if BLOCKS[kind].decode])
def test_decoding_in_pieces_joins_seamlessly(kind: str) -> None:
    rows = CHUNK_ELEMENTS // 1024 + 3  # more than one piece is decoded, and the last is not full
    raw = random_blocks(kind, rows, columns=1024, seed=1)
    whole = dequantize(kind, raw)
    for start in (0, rows - 6):
        assert torch.equal(whole[start : start + 6], dequantize(kind, raw[start : start + 6]))


@pytest.mark.parametrize("kind", BLOCKS)
def test_decoding_to_bfloat16_rounds_the_float32_values(kind: str) -> None:
    raw = random_blocks(kind, rows=4, columns=512, seed=2)
    assert torch.equal(dequantize(kind, raw, torch.bfloat16), dequantize(kind, raw).bfloat16())


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_plain_values_decode_from_any_address(kind: str) -> None:
    raw = random_blocks(kind, rows=1, columns=64, seed=3)
    at_an_odd_address = torch.frombuffer(bytearray(b"." + raw.numpy().tobytes()), dtype=torch.uint8, offset=1)[None]
    assert torch.equal(dequantize(kind, at_an_odd_address), dequantize(kind, raw))


def codes_of(kind: str, raw: Tensor) -> Tensor:
    """The codes as the file stores them, read one block at a time: [N, K]."""
    block = BLOCKS[kind]
    blocks = raw.numpy().reshape(raw.shape[0], -1, block.nbytes)
    if kind == "Q8_0":
        return torch.from_numpy(blocks[..., 2:].view(numpy.int8).copy()).flatten(1)
    if kind == "Q5_0":
        fifth = numpy.unpackbits(blocks[..., 2:6], axis=-1, bitorder="little") * 16
        codes = numpy.concatenate((blocks[..., 6:] & 15, blocks[..., 6:] >> 4), axis=-1) + fifth
        return torch.from_numpy(codes.astype(numpy.int8) - 16).flatten(1)
    bytes_a_group = 16 if kind != "Q4_K" else 32  # low halves first, then the high ones of the same bytes
    groups = blocks[..., {"Q4_0": 2, "Q4_1": 4, "Q4_K": 16}[kind] :].reshape(raw.shape[0], -1, bytes_a_group)
    return torch.from_numpy(numpy.concatenate((groups & 15, groups >> 4), axis=-1).reshape(raw.shape[0], -1))


@pytest.mark.parametrize("rows", [1, 70, 256])
@pytest.mark.parametrize("kind", DIRECT)
def test_direct_formats_keep_the_codes_of_the_file(kind: str, rows: int) -> None:
    raw = random_blocks(kind, rows, columns=512, seed=4)
    stored = direct_format(kind, raw)
    if kind in ("Q5_0", "Q8_0"):
        assert isinstance(stored, Int8Format)
        assert torch.equal(stored.stored()[0], codes_of(kind, raw))
    else:
        assert isinstance(stored, Int4Format)
        assert torch.equal(stored.codes()[0], codes_of(kind, raw))
    assert stored.group_size == 32 and stored.shape == (rows, 512)


@pytest.mark.parametrize("scale", [None, 0.05])
@pytest.mark.parametrize("kind", DIRECT)
def test_direct_formats_differ_by_no_more_than_the_rounding_of_their_scales(kind: str, scale: float | None) -> None:
    """|w' - w| <= 2⁻⁸·(|q - 8|·|scale| + |zero|) for int4, 2⁻⁸·|w| for int8: what bfloat16 scales cost, no more."""
    raw = random_blocks(kind, rows=130, columns=1024, seed=5, scale=scale)
    stored, exact = direct_format(kind, raw), decoded_by_gguf(kind, raw).double()
    if isinstance(stored, Int4Format):
        codes, rounded_scale, rounded_zero = stored.codes()
        slope = (codes.double() - 8).abs().unflatten(1, (-1, 32)) * rounded_scale.double().abs()[..., None]
        allowed = (slope + rounded_zero.double().abs()[..., None]).flatten(1)
    else:
        allowed = exact.abs()
    assert stored is not None
    error = (stored.dequantize().double() - exact).abs()
    # Scales are allowed for after their rounding, and float32 sums round too: both are a 2⁻⁷ of the bound at most.
    assert (error <= BFLOAT16_ROUNDING * (1 + 2**-7) * allowed).all()
    assert (error > BFLOAT16_ROUNDING / 4 * allowed).any(), "the bound says nothing if no value comes near it"


class LargestTensor(TorchDispatchMode):
    """Records the bytes of the largest tensor that any operation returns."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, Tensor):
                self.nbytes = max(self.nbytes, tensor.nbytes)
        return result


@pytest.mark.parametrize("kind", DIRECT)
def test_direct_formats_are_built_without_a_dense_copy(kind: str) -> None:
    raw = random_blocks(kind, rows=2048, columns=2048)
    with LargestTensor() as largest:
        stored = direct_format(kind, raw)
    assert stored is not None
    assert largest.nbytes <= max(stored.nbytes, raw.nbytes)
    assert largest.nbytes < 2048 * 2048 * 2, "a dense bfloat16 copy would be larger"


@pytest.mark.parametrize("kind", [kind for kind in BLOCKS if kind not in DIRECT])
def test_other_kinds_have_no_direct_format(kind: str) -> None:
    assert direct_format(kind, random_blocks(kind, rows=2, columns=256)) is None
