"""A few rows times a stored matrix on the tensor cores: y = f(x) Wᵀ for 2 to 64 rows (wider products dequantise).

`prepare_rows` makes x·g in the type that is multiplied, once for all programs. W is the tall side of the products, so
codes become bfloat16 in registers and x is read from shared memory. A group of int4 codes is multiplied as 128 + q,
which is a code with bfloat16's exponent in front of it; scale and zero act on the group's sums:

    Σ w x = scale·Σ (128 + q) x + (zero - 136 scale)·Σ x

Sums are float32. The same fusions as `fewer.kernels.triton.gemv`.
"""
# mypy: allow-untyped-defs
# (the arguments of kernels are of Triton's language, not of Python)

from __future__ import annotations

import triton
import triton.language as tl

from fewer.kernels.triton.gemv import activate, wait_for_previous


@triton.jit
def prepare_rows(
    x, gain, ready, inverse, sums, eps,
    K: tl.constexpr, GROUP: tl.constexpr, NORM: tl.constexpr, NIBBLES: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Row m of x [M, K] -> x·g in the dtype of `ready` [M, K], 1 / rms(x) [M], Σ x·g by group [M, K / GROUP].

    NIBBLES: the columns of all low nibbles come first, then those of the high ones; without it no sums.
    """
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < K
    wait_for_previous(PDL)
    value = tl.load(x + row.to(tl.int64) * K + column, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        tl.store(inverse + row, tl.rsqrt(tl.sum(value * value, 0) / K + eps))
        value *= tl.load(gain + column, mask=inside, other=0.0)
    rounded = value.to(ready.dtype.element_ty)
    place = column
    if NIBBLES:
        place = (column // 16 % 2) * (K // 2) + (column // 32) * 16 + column % 16
        group = tl.arange(0, BLOCK // GROUP)
        total = tl.sum(tl.reshape(rounded.to(tl.float32), [BLOCK // GROUP, GROUP]), 1)
        tl.store(sums + row * (K // GROUP) + group, total, mask=group < K // GROUP)
    tl.store(ready + row.to(tl.int64) * K + place, rounded, mask=inside)


@triton.jit
def multiply_tiles(a, b, total, ON_CPU: tl.constexpr, PRECISION: tl.constexpr):
    """a b + total. The interpreter multiplies bfloat16 bits, not values, so there both become float32."""
    if ON_CPU:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def split_nibbles(packed, ON_CPU: tl.constexpr):
    """uint8 -> 128 + its low nibble and 128 + its high one, bfloat16: the nibble under the byte 0x43."""
    if ON_CPU:
        low, high = (packed & 15).to(tl.float32), (packed >> 4).to(tl.float32)
        return (128.0 + low).to(tl.bfloat16), (128.0 + high).to(tl.bfloat16)
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 low, high;
        and.b32 low, $4, 0x0F0F0F0F;
        shr.b32 high, $4, 4;
        and.b32 high, high, 0x0F0F0F0F;
        prmt.b32 $0, low, 0x43, 0x4140;
        prmt.b32 $1, low, 0x43, 0x4342;
        prmt.b32 $2, high, 0x43, 0x4140;
        prmt.b32 $3, high, 0x43, 0x4342;
        }""",
        "=r,=r,=r,=r,r", [packed], (tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def group_scales(scale, zero, held, group, K: tl.constexpr, GROUP: tl.constexpr):
    """Of rows `held`: scale, and what Σ x is multiplied by. [BLOCK_N] float32 each."""
    at = held * (K // GROUP) + tl.minimum(group, K // GROUP - 1)
    factor, shift = tl.load(scale + at).to(tl.float32), tl.load(zero + at).to(tl.float32)
    return factor, shift - 136.0 * factor


@triton.jit
def int4_group(
    low, high, sums, weight, held, group, factor, shift,
    K: tl.constexpr, GROUP: tl.constexpr, ON_CPU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Group `group` of W's rows `held` times x: low and high [GROUP / 2, BLOCK_M], sums [BLOCK_M] ->
    [BLOCK_N, BLOCK_M]."""
    byte = group * (GROUP // 2) + tl.arange(0, GROUP // 2)
    at = weight + held[:, None] * (K // 2) + byte[None, :]
    packed = tl.load(at, mask=(byte < K // 2)[None, :], other=0, eviction_policy="evict_first")
    left, right = split_nibbles(packed, ON_CPU)
    found = multiply_tiles(left, low, tl.zeros([held.shape[0], low.shape[1]], tl.float32), ON_CPU, PRECISION)
    found = multiply_tiles(right, high, found, ON_CPU, PRECISION)
    return factor[:, None] * found + shift[:, None] * sums[None, :]


@triton.jit
def chunk_of_columns(
    rows, weight, scale, held, column, total,
    K: tl.constexpr, GROUP: tl.constexpr, FORMAT: tl.constexpr, ON_CPU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total + columns `column` of W's rows `held` (dense or int8) times `rows` [columns, BLOCK_M]. A scale that int8's
    whole row shares is left to the end."""
    at = weight + held[:, None] * K + column[None, :]
    tile = tl.load(at, mask=(column < K)[None, :], other=0, eviction_policy="evict_first")
    if FORMAT == "int8" and ON_CPU:
        tile = tile.to(tl.float32)  # the interpreter has no way from integers to bfloat16
    if FORMAT == "int8" and GROUP < K:
        inside = (column < K)[None, :]
        at = scale + held[:, None] * (K // GROUP) + (column // GROUP)[None, :]
        tile = tile.to(tl.float32) * tl.load(at, mask=inside, other=0.0).to(tl.float32)
    return multiply_tiles(tile.to(rows.dtype), rows, total, ON_CPU, PRECISION)


@triton.jit
def matmul_rows(
    ready, inverse, sums, weight, scale, zero, bias, residual, out, M, N,
    K: tl.constexpr, GROUP: tl.constexpr, FORMAT: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, ON_CPU: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """ready [M, K], inverse and sums of `prepare_rows`, weight [N or 2N, ..], out [M, N]; bias and gating as in gemv,
    residual [M, N]. A step takes BLOCK_K columns, for int4 a multiple of GROUP."""
    wait_for_previous(PDL)
    column_out = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < M
    held = tl.minimum(column_out, N - 1).to(tl.int64)
    base = ready + row[None, :].to(tl.int64) * K
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    total_up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    if FORMAT == "int4":
        factor, shift = group_scales(scale, zero, held, 0, K, GROUP)
        factor_up, shift_up = factor, shift
        if ACTIVATION != "none":
            factor_up, shift_up = group_scales(scale, zero, held + N, 0, K, GROUP)
        for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            for offset in tl.static_range(0, BLOCK_K, GROUP):
                group = (start + offset) // GROUP
                byte = group * (GROUP // 2) + tl.arange(0, GROUP // 2)
                inside = live[None, :] & (byte < K // 2)[:, None]
                low = tl.load(base + byte[:, None], mask=inside, other=0.0)
                high = tl.load(base + K // 2 + byte[:, None], mask=inside, other=0.0)
                real = tl.where(group < K // GROUP, M, 0)  # a last step may reach beyond K
                around = tl.load(sums + row * (K // GROUP) + group, mask=row < real, other=0.0)
                following, shift_next = group_scales(scale, zero, held, group + 1, K, GROUP)
                total += int4_group(
                    low, high, around, weight, held, group, factor, shift, K, GROUP, ON_CPU, PRECISION
                )  # fmt: skip
                factor, shift = following, shift_next
                if ACTIVATION != "none":
                    following, shift_next = group_scales(scale, zero, held + N, group + 1, K, GROUP)
                    total_up += int4_group(
                        low, high, around, weight, held + N, group, factor_up, shift_up, K, GROUP, ON_CPU, PRECISION
                    )  # fmt: skip
                    factor_up, shift_up = following, shift_next
    else:
        for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            column = start + tl.arange(0, BLOCK_K)
            rows = tl.load(base + column[:, None], mask=live[None, :] & (column < K)[:, None], other=0.0)
            total = chunk_of_columns(rows, weight, scale, held, column, total, K, GROUP, FORMAT, ON_CPU, PRECISION)
            if ACTIVATION != "none":
                total_up = chunk_of_columns(
                    rows, weight, scale, held + N, column, total_up, K, GROUP, FORMAT, ON_CPU, PRECISION
                )
        if FORMAT == "int8" and GROUP == K:
            total *= tl.load(scale + held).to(tl.float32)[:, None]
            if ACTIVATION != "none":
                total_up *= tl.load(scale + held + N).to(tl.float32)[:, None]
    if NORM:
        factor = tl.load(inverse + row, mask=live, other=0.0)[None, :]
        total *= factor
        total_up *= factor
    inside_columns = column_out < N
    if BIAS:
        total += tl.load(bias + column_out, mask=inside_columns, other=0.0).to(tl.float32)[:, None]
    if ACTIVATION != "none":
        if BIAS:
            total_up += tl.load(bias + N + column_out, mask=inside_columns, other=0.0).to(tl.float32)[:, None]
        total = activate(total, total_up, ACTIVATION)
    at = row[None, :].to(tl.int64) * N + column_out[:, None]
    inside = live[None, :] & inside_columns[:, None]
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
