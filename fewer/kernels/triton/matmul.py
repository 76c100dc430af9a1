"""A few rows times a stored matrix on the tensor cores: y = f(x) Wᵀ for 2 to 64 rows (wider products dequantise).

Weights become bfloat16 in registers, sums are float32. The same fusions as `fewer.kernels.triton.gemv`.
"""
# mypy: allow-untyped-defs
# (the arguments of kernels are of Triton's language, not of Python)

from __future__ import annotations

import triton
import triton.language as tl

from fewer.kernels.triton.gemv import activate, wait_for_previous


@triton.jit
def tile_rows(x, gain, row, column, M, K: tl.constexpr, NORM: tl.constexpr):
    """x [BLOCK_M, columns] and x·g, float32, zeros outside."""
    inside = (row[:, None] < M) & (column[None, :] < K)
    raw = tl.load(x + row[:, None].to(tl.int64) * K + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if NORM:
        return raw, raw * tl.load(gain + column, mask=column < K, other=0.0)[None, :]
    return raw, raw


@triton.jit
def spread(scale, held, group, K: tl.constexpr, GROUP: tl.constexpr):
    """Scales of [columns, BLOCK_N] weights, float32."""
    inside = group[:, None] < K // GROUP
    return tl.load(scale + held[None, :] * (K // GROUP) + group[:, None], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def multiply_tiles(a, b, total, ON_CPU: tl.constexpr, PRECISION: tl.constexpr):
    """a b + total. The interpreter multiplies bfloat16 bits, not values, so there both become float32."""
    if ON_CPU:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def product(
    low, high, weight, scale, zero, held, start, total, K: tl.constexpr, GROUP: tl.constexpr, FORMAT: tl.constexpr,
    BLOCK_K: tl.constexpr, ON_CPU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total + x chunk times the matching chunk of W [BLOCK_N, BLOCK_K]: [BLOCK_M, BLOCK_N] float32.

    For int4, `low` and `high` are the columns of low and high nibbles; otherwise `high` is unused.
    """
    if FORMAT == "int4":
        byte = start // 2 + tl.arange(0, BLOCK_K // 2)
        at = weight + held[None, :] * (K // 2) + byte[:, None]
        packed = tl.load(at, mask=(byte < K // 2)[:, None], other=0)  # [bytes, BLOCK_N]
        group = byte // (GROUP // 2)
        factor, shift = spread(scale, held, group, K, GROUP), spread(zero, held, group, K, GROUP)
        left = ((packed & 15).to(tl.float32) - 8.0) * factor + shift
        right = ((packed >> 4).to(tl.float32) - 8.0) * factor + shift
        total = multiply_tiles(low.to(tl.bfloat16), left.to(tl.bfloat16), total, ON_CPU, PRECISION)
        total = multiply_tiles(high.to(tl.bfloat16), right.to(tl.bfloat16), total, ON_CPU, PRECISION)
    else:
        column = start + tl.arange(0, BLOCK_K)
        loaded = tl.load(weight + held[None, :] * K + column[:, None], mask=(column < K)[:, None], other=0)
        if FORMAT == "int8":
            factor = spread(scale, held, column // GROUP, K, GROUP)
            dense = (loaded.to(tl.float32) * factor).to(tl.bfloat16)
            total = multiply_tiles(low.to(tl.bfloat16), dense, total, ON_CPU, PRECISION)
        else:
            total = multiply_tiles(low.to(loaded.dtype), loaded, total, ON_CPU, PRECISION)
    return total


@triton.jit
def matmul_rows(
    x, gain, weight, scale, zero, bias, residual, out, eps, M, N,
    K: tl.constexpr, GROUP: tl.constexpr, FORMAT: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, ON_CPU: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x [M, K], weight [N or 2N, ..], out [M, N]; bias and gating as in gemv, residual [M, N]."""
    wait_for_previous(PDL)
    column_out = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    held = tl.minimum(column_out, N - 1).to(tl.int64)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    total_up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    squares = tl.zeros([BLOCK_M], tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        if FORMAT == "int4":
            byte = tl.arange(0, BLOCK_K // 2)
            left = start + (byte // 16) * 32 + byte % 16
            raw, low = tile_rows(x, gain, row, left, M, K, NORM)
            raw_high, high = tile_rows(x, gain, row, left + 16, M, K, NORM)
            if NORM:
                squares += tl.sum(raw_high * raw_high, 1)
        else:
            raw, low = tile_rows(x, gain, row, start + tl.arange(0, BLOCK_K), M, K, NORM)
            high = low
        if NORM:
            squares += tl.sum(raw * raw, 1)
        total = product(
            low, high, weight, scale, zero, held, start, total, K, GROUP, FORMAT, BLOCK_K, ON_CPU, PRECISION
        )
        if ACTIVATION != "none":
            total_up = product(
                low, high, weight, scale, zero, held + N, start, total_up, K, GROUP, FORMAT, BLOCK_K, ON_CPU, PRECISION
            )
    if NORM:
        inverse = tl.rsqrt(squares / K + eps)[:, None]
        total *= inverse
        total_up *= inverse
    inside_columns = column_out < N
    if BIAS:
        total += tl.load(bias + column_out, mask=inside_columns, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION != "none":
        if BIAS:
            total_up += tl.load(bias + N + column_out, mask=inside_columns, other=0.0).to(tl.float32)[None, :]
        total = activate(total, total_up, ACTIVATION)
    at = row[:, None].to(tl.int64) * N + column_out[None, :]
    inside = (row[:, None] < M) & inside_columns[None, :]
    if RESIDUAL:
        total += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def dequantize_int4(packed, scale, zero, out, COLUMNS, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Program (n, c): bytes c·BLOCK.. of row n -> two runs of columns of `out` [N, COLUMNS]."""
    row = tl.program_id(0).to(tl.int64)
    byte = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = byte < COLUMNS // 2
    codes = tl.load(packed + row * (COLUMNS // 2) + byte, mask=inside, other=0)
    at = row * (COLUMNS // GROUP) + byte // (GROUP // 2)
    factor = tl.load(scale + at, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(zero + at, mask=inside, other=0.0).to(tl.float32)
    low = out + row * COLUMNS + (byte // 16) * 32 + byte % 16
    tl.store(low, (((codes & 15).to(tl.float32) - 8.0) * factor + shift).to(out.dtype.element_ty), mask=inside)
    tl.store(low + 16, (((codes >> 4).to(tl.float32) - 8.0) * factor + shift).to(out.dtype.element_ty), mask=inside)


@triton.jit
def dequantize_int8(codes, scale, out, COLUMNS, GROUP, BLOCK: tl.constexpr):
    """Program (n, c): columns c·BLOCK.. of row n."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < COLUMNS
    factor = tl.load(scale + row * (COLUMNS // GROUP) + column // GROUP, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(codes + row * COLUMNS + column, mask=inside, other=0).to(tl.float32) * factor
    tl.store(out + row * COLUMNS + column, value.to(out.dtype.element_ty), mask=inside)
