"""Four-bit codes: their portable byte order, PyTorch's packed CPU layout, and products with it.

Portable order ("nibble order"), the one of GGUF: 16 bytes hold 32 columns, byte j has column j in its low nibble and
column j + 16 in its high one. The CPU layout belongs to `torch._convert_weight_to_int4pack_for_cpu` and depends on
the vector width, so `_tile` finds it by packing a matrix of row numbers; nothing here assumes it.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

ROWS = 64  # rows are padded to a multiple of the widest tile
DENSE_FROM = 128  # rows of x from which decoding the matrix pays (measured: 1.4 x at 512 rows, 1.9 x at 1,024)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """packed uint8 [N, K/2] in nibble order -> codes uint8 [N, K]."""
    blocks = packed.view(*packed.shape[:-1], -1, 16)
    return torch.cat((blocks & 15, blocks >> 4), dim=-1).flatten(-2)


def pack_nibbles(codes: Tensor) -> Tensor:
    """codes uint8 [N, K], K a multiple of 32 -> packed uint8 [N, K/2] in nibble order."""
    blocks = codes.unflatten(-1, (-1, 2, 16))
    return (blocks[..., 0, :] | (blocks[..., 1, :] << 4)).flatten(-2)


def pack_for_cpu(codes: Tensor) -> Tensor:
    """codes [N, K] of 0..15 -> PyTorch's CPU layout [N padded to 64, K/2] uint8."""
    padding = -codes.shape[0] % ROWS
    if padding:
        codes = torch.nn.functional.pad(codes, (0, 0, 0, padding))
    return torch._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)


@functools.cache
def _tile() -> tuple[int, Tensor, Tensor]:
    """(rows a tile, byte of each row within a tile's column, its shift 0 or 4), found by packing row numbers."""
    rows = torch.arange(ROWS, dtype=torch.int32)[:, None].expand(ROWS, 2)
    units = torch._convert_weight_to_int4pack_for_cpu((rows & 15).contiguous(), 1).flatten()
    tens = torch._convert_weight_to_int4pack_for_cpu((rows >> 4).contiguous(), 1).flatten()
    low, high = (units & 15) + (tens & 15) * 16, (units >> 4) + (tens >> 4) * 16
    # Byte i of column 0 holds two rows below `height`; the tile is as high as the bytes of column 0 are many, twice.
    height = 2
    while set(low[: height // 2].tolist() + high[: height // 2].tolist()) != set(range(height)):
        height *= 2
    byte, shift = torch.empty(height, dtype=torch.int64), torch.empty(height, dtype=torch.uint8)
    for index in range(height // 2):
        byte[int(low[index])], shift[int(low[index])] = index, 0
        byte[int(high[index])], shift[int(high[index])] = index, 4
    return height, byte, shift


def unpack_from_cpu(packed: Tensor, rows: int) -> Tensor:
    """The inverse of `pack_for_cpu`: codes uint8 [rows, K]."""
    height, byte, shift = _tile()
    columns = packed.numel() * 2 // packed.shape[0]
    tiles = packed.view(-1, columns, height // 2)  # [N / height, K, bytes]
    codes = (tiles[:, :, byte] >> shift) & 15  # [N / height, K, height]
    return codes.transpose(1, 2).reshape(-1, columns)[:rows].contiguous()


def rows_from_cpu(packed: Tensor, index: Tensor) -> Tensor:
    """Codes of a few rows: index [n] int64 -> uint8 [n, K]."""
    height, byte, shift = _tile()
    columns = packed.numel() * 2 // packed.shape[0]
    tiles = packed.view(-1, columns, height // 2)
    if len(index) == 1:  # every decoding step reads one: views cost less than gathers
        tile, row = divmod(int(index), height)
        return ((tiles[tile, :, int(byte[row])] >> int(shift[row])) & 15)[None]
    inside = index % height
    return (tiles[index // height, :, byte[inside]] >> shift[inside][:, None]) & 15


def scales_for_cpu(scale: Tensor, zero: Tensor) -> Tensor:
    """scale and zero [N, G] -> [G, N padded to 64, 2] bfloat16."""
    padding = -scale.shape[0] % ROWS
    pairs = torch.stack((scale, zero), dim=-1).to(torch.bfloat16)
    return torch.nn.functional.pad(pairs, (0, 0, 0, 0, 0, padding)).transpose(0, 1).contiguous()


def matmul_cpu(x: Tensor, packed: Tensor, group_size: int, scales: Tensor, rows: int) -> Tensor:
    """x [M, K] bfloat16 times ((codes - 8)·scale + zero)ᵀ -> [M, rows] bfloat16, accumulated in float32.

    Few rows stream the 4-bit codes; many decode the matrix once and use the faster dense product (values then rounded
    to bfloat16).
    """
    if x.shape[0] >= DENSE_FROM and _halves():
        return x @ _dense_columns(packed, group_size, scales)[:, :rows]
    out = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group_size, scales)
    return out if out.shape[1] == rows else out[:, :rows]


def tile_height() -> int:
    """Rows stored together, where byte i of a tile's column holds row i and row i + height/2; 0 in any other order."""
    return _tile()[0] if _halves() else 0


@functools.cache
def _halves() -> bool:
    """Whether a tile's byte i holds row i in its low nibble and row i + height/2 in its high one."""
    height, byte, shift = _tile()
    order = torch.arange(height // 2)
    return bool((byte == order.repeat(2)).all()) and not shift[: height // 2].any()


def _dense_columns(packed: Tensor, group_size: int, scales: Tensor) -> Tensor:
    """Decode to Wᵀ [K, N padded] bfloat16."""
    height = _tile()[0]
    columns = packed.numel() * 2 // packed.shape[0]
    bytes_ = packed.view(-1, columns // group_size, group_size, height // 2)  # [tiles, G, g, height / 2]
    pairs = scales.view(columns // group_size, -1, 1, height, 2).transpose(0, 1)  # [tiles, G, 1, height, 2]
    scale, zero = pairs.unbind(-1)
    out = torch.empty(*bytes_.shape[:3], height, dtype=torch.bfloat16)
    for part, codes in ((slice(0, height // 2), bytes_ & 15), (slice(height // 2, height), bytes_ >> 4)):
        centred = codes.view(torch.int8).sub_(8).to(torch.bfloat16)
        torch.addcmul(zero[..., part], centred, scale[..., part], out=out[..., part])
    return out.view(-1, columns, height).transpose(0, 1).reshape(columns, -1)
