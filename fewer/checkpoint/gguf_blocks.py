"""GGUF's quantised blocks: to dense values, or straight into the engine's own formats.

A row of a matrix is a run of blocks; a block holds 32 or 256 columns as small codes with scales in float16. Each
decoder below takes blocks uint8 [n, bytes a block] and returns float32 [n, columns], in the order of operations of
ggml's reference (ggml-quants.c), so that values agree to the last bit where float32 allows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewer.formats.base import WeightFormat
from fewer.formats.int4 import Int4Format
from fewer.formats.int8 import Int8Format
from fewer.kernels import nibbles

CHUNK_ELEMENTS = 1 << 19  # decoded at a time: temporaries stay in the processor's cache


def _half(raw: Tensor) -> Tensor:
    """uint8 [..., 2n] -> float32 [..., n]."""
    return raw.contiguous().view(torch.float16).float()


def _nibbles(raw: Tensor) -> Tensor:
    """uint8 [..., j] -> [..., 2, j]: all low halves, then all high ones."""
    return torch.stack((raw & 15, raw >> 4), dim=-2)


def _bits(raw: Tensor, width: int, count: int) -> Tensor:
    """uint8 [..., j] -> [..., count, j]: fields of `width` bits, the lowest first."""
    shifts = torch.arange(0, width * count, width, dtype=torch.uint8)
    return (raw[..., None, :] >> shifts[:, None]) & ((1 << width) - 1)


def _fifth_bits(raw: Tensor) -> Tensor:
    """uint8 [n, 4] holding 32 bits -> [n, 32] of 0 or 16."""
    return _bits(raw[..., None], 1, 8).flatten(1) << 4


# ── blocks of 32 columns ────────────────────────────────────────────────────────────────────────────────────────────


def _q4_0(b: Tensor) -> Tensor:  # d, 16 bytes of nibbles: d·(q - 8)
    return _half(b[:, :2]) * (_nibbles(b[:, 2:]).flatten(1).float() - 8)


def _q4_1(b: Tensor) -> Tensor:  # d, m, nibbles: d·q + m
    return (_nibbles(b[:, 4:]).flatten(1).float() * _half(b[:, :2])).add_(_half(b[:, 2:4]))


def _q5_0(b: Tensor) -> Tensor:  # d, 32 high bits, nibbles: d·(q - 16)
    return _half(b[:, :2]) * ((_nibbles(b[:, 6:]).flatten(1) | _fifth_bits(b[:, 2:6])).float() - 16)


def _q5_1(b: Tensor) -> Tensor:  # d, m, 32 high bits, nibbles: d·q + m
    codes = _nibbles(b[:, 8:]).flatten(1) | _fifth_bits(b[:, 4:8])
    return (codes.float() * _half(b[:, :2])).add_(_half(b[:, 2:4]))


def _q8_0(b: Tensor) -> Tensor:  # d, 32 signed bytes
    return b[:, 2:].view(torch.int8).float().mul_(_half(b[:, :2]))


_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_IQ4_PAIRS = torch.tensor(  # byte -> the values of its low and its high half: [256, 2]
    [(_IQ4_VALUES[byte & 15], _IQ4_VALUES[byte >> 4]) for byte in range(256)], dtype=torch.float32
)


def _iq4_values(raw: Tensor) -> Tensor:
    """uint8 [..., 16] -> float32 [..., 32] of the non-linear grid."""
    pairs = _IQ4_PAIRS.index_select(0, raw.reshape(-1).int())  # one look-up for two columns
    return pairs.view(*raw.shape, 2).transpose(-1, -2).flatten(-2)


def _iq4_nl(b: Tensor) -> Tensor:  # d, nibbles into the grid
    return _iq4_values(b[:, 2:]).mul_(_half(b[:, :2]))


# ── super-blocks of 256 columns ─────────────────────────────────────────────────────────────────────────────────────


def _six_bit_scales(raw: Tensor) -> tuple[Tensor, Tensor]:
    """The 12 bytes of Q4_K and Q5_K: uint8 [..., 12] -> scales and minima [..., 8] of 0..63."""
    low, middle, high = raw[..., :4], raw[..., 4:8], raw[..., 8:]
    scales = torch.cat((low & 63, (high & 15) | ((low >> 2) & 48)), dim=-1)
    minima = torch.cat((middle & 63, (high >> 4) | ((middle >> 2) & 48)), dim=-1)
    return scales, minima


def _scales_and_minima(b: Tensor) -> tuple[Tensor, Tensor]:
    """d·scale and dmin·minimum of the 8 groups of Q4_K and Q5_K blocks [..., bytes]: float32 [..., 8]."""
    scales, minima = _six_bit_scales(b[..., 4:16])
    return _half(b[..., :2]) * scales.float(), _half(b[..., 2:4]) * minima.float()


def _q2_k(b: Tensor) -> Tensor:  # 16 bytes of 4-bit scale and minimum, 64 bytes of 2-bit codes, d, dmin
    scale = _half(b[:, 80:82]) * (b[:, :16] & 15).float()
    minimum = _half(b[:, 82:84]) * (b[:, :16] >> 4).float()
    codes = _bits(b[:, 16:80].unflatten(1, (2, 32)), 2, 4).reshape(-1, 16, 16).float()
    return codes.mul_(scale[..., None]).sub_(minimum[..., None]).flatten(1)


def _q3_k(b: Tensor) -> Tensor:  # 32 bytes of high bits, 64 of 2-bit codes, 12 of 6-bit scales, d
    packed = b[:, 96:108]
    low = _nibbles(packed[:, :8]).flatten(1)
    high = _bits(packed[:, 8:], 2, 4).flatten(1)
    scale = _half(b[:, 108:110]) * ((low | (high << 4)).float() - 32)
    two = _bits(b[:, 32:96].unflatten(1, (2, 32)), 2, 4).reshape(-1, 16, 16)
    top = _bits(b[:, :32], 1, 8).reshape(-1, 16, 16)  # a clear bit means: subtract 4
    return (two | (top << 2)).float().sub_(4).mul_(scale[..., None]).flatten(1)


def _q4_k(b: Tensor) -> Tensor:  # d, dmin, 12 bytes of 6-bit scales and minima, 128 of nibbles
    scale, minimum = _scales_and_minima(b)
    codes = _nibbles(b[:, 16:].unflatten(1, (4, 32))).reshape(-1, 8, 32).float()
    return codes.mul_(scale[..., None]).sub_(minimum[..., None]).flatten(1)


def _q5_k(b: Tensor) -> Tensor:  # as Q4_K, with 32 bytes of fifth bits before the nibbles
    scale, minimum = _scales_and_minima(b)
    codes = _nibbles(b[:, 48:].unflatten(1, (4, 32))).reshape(-1, 8, 32) | (_bits(b[:, 16:48], 1, 8) << 4)
    return codes.float().mul_(scale[..., None]).sub_(minimum[..., None]).flatten(1)


def _q6_k(b: Tensor) -> Tensor:  # 128 bytes of low nibbles, 64 of high 2-bit fields, 16 signed scales, d
    scale = _half(b[:, 208:210]) * b[:, 192:208].view(torch.int8).float()
    low = _nibbles(b[:, :128].unflatten(1, (2, 64))).reshape(-1, 8, 32)
    high = _bits(b[:, 128:192].unflatten(1, (2, 32)), 2, 4).reshape(-1, 8, 32)
    codes = (low | (high << 4)).reshape(-1, 16, 16).float().sub_(32)
    return codes.mul_(scale[..., None]).flatten(1)


def _iq4_xs(b: Tensor) -> Tensor:  # d, 16 bits of high scale fields, 4 bytes of low ones, 128 of nibbles
    low = _bits(b[:, 4:8, None], 4, 2).flatten(1)
    high = _bits(b[:, 2:4, None], 2, 4).flatten(1)
    scale = _half(b[:, :2]) * ((low | (high << 4)).float() - 32)
    return _iq4_values(b[:, 8:].unflatten(1, (8, 16))).mul_(scale[..., None]).flatten(1)


# ── the table of kinds ──────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Block:
    """One storage kind: ggml's number for it, columns and bytes of a block, and how to read it."""

    number: int
    columns: int
    nbytes: int
    decode: Callable[[Tensor], Tensor] | None = None
    dtype: torch.dtype | None = None  # of the kinds that are plain values


BLOCKS: dict[str, Block] = {
    "F32": Block(0, 1, 4, dtype=torch.float32),
    "F16": Block(1, 1, 2, dtype=torch.float16),
    "BF16": Block(30, 1, 2, dtype=torch.bfloat16),
    "Q4_0": Block(2, 32, 18, _q4_0),
    "Q4_1": Block(3, 32, 20, _q4_1),
    "Q5_0": Block(6, 32, 22, _q5_0),
    "Q5_1": Block(7, 32, 24, _q5_1),
    "Q8_0": Block(8, 32, 34, _q8_0),
    "Q2_K": Block(10, 256, 84, _q2_k),
    "Q3_K": Block(11, 256, 110, _q3_k),
    "Q4_K": Block(12, 256, 144, _q4_k),
    "Q5_K": Block(13, 256, 176, _q5_k),
    "Q6_K": Block(14, 256, 210, _q6_k),
    "IQ4_NL": Block(20, 32, 18, _iq4_nl),
    "IQ4_XS": Block(23, 256, 136, _iq4_xs),
}
KIND_NUMBERS = {block.number: kind for kind, block in BLOCKS.items()}


def dequantize(kind: str, raw: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """raw uint8 [rows, bytes a row] -> [rows, K] in `dtype`.

    Plain kinds of that dtype come back as a view of `raw` where its address allows.
    """
    block = BLOCKS[kind]
    if block.decode is None:
        assert block.dtype is not None
        aligned = raw if raw.data_ptr() % block.nbytes == 0 else raw.clone()
        return aligned.view(block.dtype).to(dtype)
    rows, columns = raw.shape[0], raw.shape[1] // block.nbytes * block.columns
    out = torch.empty(rows, columns, dtype=dtype)
    blocks, values = raw.reshape(-1, block.nbytes), out.view(-1, block.columns)
    step = CHUNK_ELEMENTS // block.columns
    for start in range(0, blocks.shape[0], step):
        values[start : start + step] = block.decode(blocks[start : start + step])
    return out


def direct_format(kind: str, raw: Tensor) -> WeightFormat | None:
    """raw uint8 [rows, bytes a row] -> the same codes in one of the engine's own formats, or None.

    Q4_0, Q4_1 and Q4_K become int4 in groups of 32, Q5_0 and Q8_0 int8 in groups of 32; only scales are rounded.
    """
    readers: dict[str, Callable[[Tensor], WeightFormat]] = {
        "Q4_0": _int4_from_q4_0,
        "Q4_1": _int4_from_q4_1,
        "Q4_K": _int4_from_q4_k,
        "Q5_0": _int8_from_q5_0,
        "Q8_0": _int8_from_q8_0,
    }
    if kind not in readers:
        return None
    block = BLOCKS[kind]
    blocks = raw.unflatten(1, (-1, block.nbytes))  # [N, blocks a row, bytes]
    # A few tiles of rows at a time: unpacked codes stay in the processor's cache, which is ten times as fast.
    step = max(CHUNK_ELEMENTS // (blocks.shape[1] * block.columns) // nibbles.ROWS, 1) * nibbles.ROWS
    parts = [readers[kind](blocks[start : start + step]) for start in range(0, blocks.shape[0], step)]
    return parts[0] if len(parts) == 1 else type(parts[0]).concatenate(parts)


def _int4_from_q4_0(blocks: Tensor) -> Int4Format:  # [N, K/32, 18]
    scale = _half(blocks[..., :2]).squeeze(-1)
    return Int4Format.from_nibbles(blocks[..., 2:].flatten(1), scale, torch.zeros_like(scale))


def _int4_from_q4_1(blocks: Tensor) -> Int4Format:  # [N, K/32, 20]; d·q + m = (q - 8)·d + (m + 8·d)
    scale, minimum = _half(blocks[..., :4]).unbind(-1)
    return Int4Format.from_nibbles(blocks[..., 4:].flatten(1), scale, minimum + 8 * scale)


def _int4_from_q4_k(blocks: Tensor) -> Int4Format:  # [N, K/256, 144]
    scale, minimum = _scales_and_minima(blocks)  # [N, K/256, 8]
    # 32 bytes hold columns 0..31 in their low halves and 32..63 in the high ones; nibble order pairs j with j + 16.
    first, second = blocks[..., 16:].unflatten(-1, (4, 2, 16)).unbind(-2)
    packed = torch.stack(((first & 15) | (second << 4), (first >> 4) | (second & 0xF0)), dim=-2)
    return Int4Format.from_nibbles(packed.flatten(1), scale.flatten(1), (8 * scale - minimum).flatten(1))


def _int8_from_q5_0(blocks: Tensor) -> Int8Format:  # [N, K/32, 22]; d·(q - 16)
    flat = blocks.flatten(0, 1)
    codes = (_nibbles(flat[:, 6:]).flatten(1) | _fifth_bits(flat[:, 2:6])).view(torch.int8) - 16
    return Int8Format.from_codes(codes.view(blocks.shape[0], -1), _half(blocks[..., :2]).squeeze(-1))


def _int8_from_q8_0(blocks: Tensor) -> Int8Format:  # [N, K/32, 34]
    return Int8Format.from_codes(blocks[..., 2:].flatten(1).view(torch.int8), _half(blocks[..., :2]).squeeze(-1))
