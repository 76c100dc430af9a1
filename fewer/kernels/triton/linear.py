"""Products with stored matrices on the GPU: which kernel, which block sizes, and the calls the formats make.

One row: `gemv` kernels. Up to WIDE rows: `matmul_rows`. More: the matrix is dequantised and cuBLAS multiplies, because
then arithmetic, not bytes, is the bound.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fewer.kernels.triton.block_sizes import Blocks, gemv_blocks, rows_blocks, rows_tile
from fewer.kernels.triton.gemv import gemv_dense, gemv_int8
from fewer.kernels.triton.gemv_int4 import gemv_int4, gemv_int4_long
from fewer.kernels.triton.matmul import dequantize_int4, dequantize_int8, matmul_rows, prepare_rows

WIDE = 64  # rows beyond which dequantising pays
_GEMV = {"dense": gemv_dense, "int8": gemv_int8}


class Stored(NamedTuple):
    """One matrix W [N, K] as tensors: dense `codes` [N, K]; int8 `codes`, `scale`; int4 `codes` (packed), both."""

    kind: str
    codes: Tensor
    scale: Tensor | None = None  # [N, G]
    zero: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1] * (2 if self.kind == "int4" else 1)

    @property
    def group_size(self) -> int:
        return self.shape[1] if self.scale is None else self.shape[1] // self.scale.shape[1]


class Fused(NamedTuple):
    """What is done around a product: RMSNorm of x by `gain`, bias, gating of the matrix's two halves, residual."""

    gain: Tensor | None = None  # [K] float32
    eps: float = 0.0
    bias: Tensor | None = None  # [N]
    activation: str = "none"  # "silu", "gelu_tanh", "gelu": act(first half)·second half
    residual: Tensor | None = None  # [M, N], may be `out` itself
    word_gain: Tensor | None = None  # `word_order(gain)`, for one row times int4; made where it is missing


PLAIN = Fused()


def multiply(
    x: Tensor, matrix: Stored, out: Tensor, fused: Fused = PLAIN, pdl: bool = False, blocks: Blocks | None = None
) -> Tensor:
    """x [M, K] times `matrix`, with the fusions, into `out` [M, N] (N halved by gating). All contiguous."""
    gain, bias, residual = fused.gain, fused.bias, fused.residual
    count, (_, columns), size = x.shape[0], matrix.shape, out.shape[1]
    scale = matrix.codes if matrix.scale is None else matrix.scale
    zero = scale if matrix.zero is None else matrix.zero
    flags = (gain is not None, fused.activation, bias is not None, residual is not None)
    launch: dict[str, object] = {"launch_pdl": True} if pdl else {}
    pointers = (scale, zero, x if bias is None else bias, x if residual is None else residual, out, fused.eps)
    gain = x if gain is None else gain
    if count == 1:
        blocks = blocks or gemv_blocks(matrix.kind, size, columns, fused.activation != "none")
        grid: tuple[int, ...] = (-(-size // blocks.rows),)
        kernel, codes = _GEMV.get(matrix.kind), matrix.codes
        interpreted: tuple[bool, ...] = ()
        if kernel is None:
            kernel = gemv_int4 if blocks.columns >= columns else gemv_int4_long
            codes, interpreted = codes.view(torch.int32), (x.device.type == "cpu",)
            if fused.gain is not None:
                gain = word_order(fused.gain) if fused.word_gain is None else fused.word_gain
            if x.dtype == torch.bfloat16:
                x = x.view(torch.int64)
            if kernel is gemv_int4:
                grid = (min(grid[0], blocks.resident * _processors(x.device)),)
        kernel[grid](
            x, gain, codes, *pointers, size, columns, matrix.group_size, *flags, blocks.rows, blocks.columns, pdl,
            *interpreted, num_warps=blocks.warps, **launch,
        )  # fmt: skip
        return out
    ready, inverse, sums = prepared(x, matrix, fused, pdl)
    gated = fused.activation != "none"
    blocks = blocks or rows_blocks(matrix.kind, count, size, columns, gated, ready.element_size())
    block_m = rows_tile(count)
    grid = (-(-size // blocks.rows), -(-count // block_m))
    width = max(blocks.columns, matrix.group_size) if matrix.kind == "int4" else blocks.columns
    precision = "ieee" if matrix.codes.dtype == torch.float32 else "tf32"
    matmul_rows[grid](
        ready, inverse, sums, matrix.codes, *pointers[:-1], count, size, columns, matrix.group_size, matrix.kind,
        *flags, block_m, blocks.rows, width, blocks.stages, x.device.type == "cpu", precision, pdl,
        num_warps=blocks.warps, **launch,
    )  # fmt: skip
    return out


def prepared(x: Tensor, matrix: Stored, fused: Fused, pdl: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What `matmul_rows` reads of x [M, K]: x·g in the type that is multiplied, 1 / rms(x) [M], Σ x·g [M, G]."""
    (count, columns), int4 = x.shape, matrix.kind == "int4"
    dtype = matrix.codes.dtype if matrix.kind == "dense" else torch.bfloat16
    if fused.gain is None and x.dtype == dtype and not int4:
        return x, x, x  # the others are not read
    ready = torch.empty(count, columns, dtype=dtype, device=x.device)
    inverse = torch.empty(count, device=x.device)
    sums = torch.empty(count, columns // matrix.group_size, device=x.device)
    gain = inverse if fused.gain is None else fused.gain
    block = max(matrix.group_size if int4 else 1, 1 << (columns - 1).bit_length())
    launch: dict[str, object] = {"launch_pdl": True} if pdl else {}
    prepare_rows[(count,)](
        x, gain, ready, inverse, sums, fused.eps, columns, matrix.group_size, fused.gain is not None, int4, block, pdl,
        num_warps=min(16, max(1, block // 512)), **launch,
    )  # fmt: skip
    return ready, inverse, sums


def word_order(gain: Tensor) -> Tensor:
    """gain [K] -> the same numbers in the order in which int4's words meet them: by nibble (low 0..3, high 0..3), then
    by word."""
    return gain.view(-1, 2, 4, 4).permute(1, 3, 0, 2).reshape(-1)  # [blocks, low or high, word, byte]


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def dequantize(matrix: Stored, dtype: torch.dtype) -> Tensor:
    """The dense matrix [N, K]."""
    rows, columns = matrix.shape
    if matrix.scale is None:
        return matrix.codes.to(dtype)
    out = torch.empty(rows, columns, dtype=dtype, device=matrix.codes.device)
    block = min(1024, 1 << (columns - 1).bit_length())
    if matrix.zero is None:
        grid = (rows, -(-columns // block))
        dequantize_int8[grid](matrix.codes, matrix.scale, out, columns, matrix.group_size, block)
    else:
        grid = (rows, -(-columns // 2 // block))
        dequantize_int4[grid](matrix.codes, matrix.scale, matrix.zero, out, columns, matrix.group_size, block)
    return out


def matmul(x: Tensor, matrix: Stored) -> Tensor:
    """x [M, K] of any floating dtype -> x Wᵀ [M, N] in the same dtype."""
    if x.shape[0] > WIDE:
        return functional.linear(x, dequantize(matrix, x.dtype))
    out = torch.empty(x.shape[0], matrix.shape[0], dtype=x.dtype, device=x.device)
    return multiply(x.contiguous(), matrix, out)


def int4_matmul(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """x [M, K], packed uint8 [N, K/2] in nibble order, scale and zero [N, G] -> [M, N]."""
    return matmul(x, Stored("int4", packed, scale, zero))


def int8_matmul(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """x [M, K], codes int8 [N, K], scale [N, G] with G = 1 or K/32 -> [M, N]."""
    return matmul(x, Stored("int8", codes, scale))
