"""One row times an int4 matrix, w = (q - 8)·scale + zero, in nibble order (fewer.kernels.nibbles).

At full bandwidth a multiprocessor has about four instructions a weight, so codes are multiplied as integers. x becomes
16-bit integers X, in units of a power of two that suits the largest of 32 columns, and each X a signed high and an
unsigned low byte. A word of codes masked once holds four of them in its bytes, and one instruction (dp4a) multiplies
and adds all four:

    Σ w x = scale·unit·Σ q X + (zero - 8 scale)·Σ x        by blocks of 32 columns

Sums of q X are exact. Rounding x costs at most 2^-15 of the block's largest |x|; bfloat16 costs 2^-9 of each x.
"""
# mypy: allow-untyped-defs
# (the arguments of kernels are of Triton's language, not of Python)

from __future__ import annotations

import triton
import triton.language as tl

from fewer.kernels.triton.gemv import finish, wait_for_previous


@triton.jit
def dot4(codes, parts, total, SIGNED: tl.constexpr, ON_CPU: tl.constexpr):
    """total + the four bytes of `codes` (unsigned) times those of `parts`. The interpreter knows no assembly."""
    if ON_CPU:
        for shift in tl.static_range(0, 32, 8):
            part = (parts >> shift) & 255
            if SIGNED:
                part = (part ^ 128) - 128
            total += ((codes >> shift) & 255) * part
        return total
    if SIGNED:
        return tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [codes, parts, total], tl.int32, is_pure=True, pack=1
        )
    return tl.inline_asm_elementwise(
        "dp4a.u32.u32 $0, $1, $2, $3;", "=r,r,r,r", [codes, parts, total], tl.int32, is_pure=True, pack=1
    )


@triton.jit
def four(x, at, inside):
    """x[4 at], …, x[4 at + 3] as float32. bfloat16 comes as int64, four at a time: one wide load a thread."""
    if x.dtype.element_ty == tl.int64:
        pack = tl.load(x + at, mask=inside, other=0)
        low, high = pack.to(tl.int32), (pack >> 32).to(tl.int32)
        a, b = (low << 16).to(tl.float32, bitcast=True), (low & -65536).to(tl.float32, bitcast=True)
        c, d = (high << 16).to(tl.float32, bitcast=True), (high & -65536).to(tl.float32, bitcast=True)
    else:
        a = tl.load(x + 4 * at, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(x + 4 * at + 1, mask=inside, other=0.0).to(tl.float32)
        c = tl.load(x + 4 * at + 2, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(x + 4 * at + 3, mask=inside, other=0.0).to(tl.float32)
    return a, b, c, d


@triton.jit
def gains(gain, start, K: tl.constexpr, BLOCKS: tl.constexpr, NORM: tl.constexpr):
    """g for the eight nibbles of the words from column `start` on: [BLOCKS, 4] each. gain [K] is in word order
    (linear.word_order)."""
    block = start // 32 + tl.arange(0, BLOCKS)[:, None]
    word = block * 4 + tl.arange(0, 4)[None, :]
    if NORM:
        inside = block < K // 32
        g0 = tl.load(gain + word, mask=inside, other=0.0)
        g1 = tl.load(gain + K // 8 + word, mask=inside, other=0.0)
        g2 = tl.load(gain + 2 * (K // 8) + word, mask=inside, other=0.0)
        g3 = tl.load(gain + 3 * (K // 8) + word, mask=inside, other=0.0)
        g4 = tl.load(gain + 4 * (K // 8) + word, mask=inside, other=0.0)
        g5 = tl.load(gain + 5 * (K // 8) + word, mask=inside, other=0.0)
        g6 = tl.load(gain + 6 * (K // 8) + word, mask=inside, other=0.0)
        g7 = tl.load(gain + 7 * (K // 8) + word, mask=inside, other=0.0)
    else:
        g0, g1, g2, g3, g4, g5, g6, g7 = word, word, word, word, word, word, word, word
    return g0, g1, g2, g3, g4, g5, g6, g7


@triton.jit
def integer(x, inverse):
    """x·inverse rounded to an integer, in the low half of the result: 1.5·2^23 aligns the mantissa's bits."""
    return (x * inverse + 12582912.0).to(tl.int32, bitcast=True)


@triton.jit
def byte_planes(a, b, c, d):
    """The low halves of four integers -> their high bytes and their low bytes, packed in this order."""
    ac, bd = (a & 0xFFFF) | (c << 16), (b & 0xFFFF) | (d << 16)
    return ((ac >> 8) & 0x00FF00FF) | (bd & -16711936), (ac & 0x00FF00FF) | ((bd << 8) & -16711936)


@triton.jit
def vectors(
    x, start, g0, g1, g2, g3, g4, g5, g6, g7, K: tl.constexpr, BLOCKS: tl.constexpr, NORM: tl.constexpr
):  # fmt: skip
    """What the words from column `start` on multiply: x·g as bytes (high and low ones for low nibbles, then for high
    nibbles) [BLOCKS, 4]; by block its unit and Σ x·g; and Σ x² [BLOCKS, 4]."""
    block = start // 32 + tl.arange(0, BLOCKS)[:, None]
    inside = block < K // 32
    at = block * 8 + tl.arange(0, 4)[None, :]  # byte b of word j of a block: columns 4j + b and 4j + b + 16
    l0, l1, l2, l3 = four(x, at, inside)
    h0, h1, h2, h3 = four(x, at + 4, inside)
    squares = l0
    if NORM:
        squares = l0 * l0 + l1 * l1 + l2 * l2 + l3 * l3 + h0 * h0 + h1 * h1 + h2 * h2 + h3 * h3
        l0, l1, l2, l3, h0, h1, h2, h3 = l0 * g0, l1 * g1, l2 * g2, l3 * g3, h0 * g4, h1 * g5, h2 * g6, h3 * g7
    whole = tl.sum(((l0 + l1) + (l2 + l3)) + ((h0 + h1) + (h2 + h3)), 1)
    low = tl.maximum(tl.maximum(tl.abs(l0), tl.abs(l1)), tl.maximum(tl.abs(l2), tl.abs(l3)))
    high = tl.maximum(tl.maximum(tl.abs(h0), tl.abs(h1)), tl.maximum(tl.abs(h2), tl.abs(h3)))
    largest = tl.maximum(tl.max(tl.maximum(low, high), 1), 1e-30) * 1.0001  # so that rounding up stays inside
    exponent = largest.to(tl.int32, bitcast=True) >> 23
    unit = ((exponent - 14) << 23).to(tl.float32, bitcast=True)  # 2^-15 of the next power of two
    inverse = ((268 - exponent) << 23).to(tl.float32, bitcast=True)[:, None]
    lh, ll = byte_planes(integer(l0, inverse), integer(l1, inverse), integer(l2, inverse), integer(l3, inverse))
    hh, hl = byte_planes(integer(h0, inverse), integer(h1, inverse), integer(h2, inverse), integer(h3, inverse))
    return lh, ll, hh, hl, unit, whole, squares


@triton.jit
def words(weight, held, start, K: tl.constexpr, BLOCKS: tl.constexpr):
    """Words of rows `held` from column `start` on: int32 [BLOCK_N, BLOCKS, 4]; read once, so first to go."""
    block = start // 32 + tl.arange(0, BLOCKS)
    at = weight + held[:, None, None] * (K // 8) + block[None, :, None] * 4 + tl.arange(0, 4)[None, None, :]
    return tl.load(at, mask=(block < K // 32)[None, :, None], other=0, eviction_policy="evict_first")


@triton.jit
def scales(scale, zero, held, start, K: tl.constexpr, GROUP: tl.constexpr, BLOCKS: tl.constexpr):
    """Scale and zero of the blocks from column `start` on, of rows `held`: [BLOCK_N, BLOCKS]."""
    block = start // 32 + tl.arange(0, BLOCKS)
    at = held[:, None] * (K // GROUP) + (block // (GROUP // 32))[None, :]
    inside = (block < K // 32)[None, :]
    return tl.load(scale + at, mask=inside, other=0.0), tl.load(zero + at, mask=inside, other=0.0)


@triton.jit
def products(tile, lh, ll, hh, hl, unit, whole, factor, shift, ON_CPU: tl.constexpr):
    """tile int32 [BLOCK_N, BLOCKS, 4], scale and zero [BLOCK_N, BLOCKS] -> Σ w x by block [BLOCK_N, BLOCKS]."""
    low, high = tile & 0x0F0F0F0F, (tile >> 4) & 0x0F0F0F0F
    nothing = tl.zeros(tile.shape, tl.int32)
    upper = dot4(high, hh[None, :, :], dot4(low, lh[None, :, :], nothing, True, ON_CPU), True, ON_CPU)
    lower = dot4(high, hl[None, :, :], dot4(low, ll[None, :, :], nothing, False, ON_CPU), False, ON_CPU)
    total = tl.sum(upper * 256 + lower, 2).to(tl.float32)  # below 2^24: exact
    factor = factor.to(tl.float32)
    return factor * unit[None, :] * total + (shift.to(tl.float32) - 8.0 * factor) * whole[None, :]


@triton.jit
def gemv_int4(
    x, gain, weight, scale, zero, bias, residual, out, eps, N,
    K: tl.constexpr, GROUP: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr, ON_CPU: tl.constexpr,
):  # fmt: skip
    """BLOCK_K >= K: x stays in registers while the program walks its rows, the next ones always on their way.

    weight int32 [N or 2N, K/8] (the packed bytes, four at a time), scale and zero [.., K / GROUP].
    """
    BLOCKS: tl.constexpr = BLOCK_K // 32
    first = tl.program_id(0) * BLOCK_N
    stride = tl.num_programs(0) * BLOCK_N
    held = tl.minimum(first + tl.arange(0, BLOCK_N), N - 1)  # rows beyond N read the last one
    tile = words(weight, held, 0, K, BLOCKS)
    factor, shift = scales(scale, zero, held, 0, K, GROUP, BLOCKS)
    tile_up, factor_up, shift_up = tile, factor, shift
    if ACTIVATION != "none":
        tile_up = words(weight, held + N, 0, K, BLOCKS)
        factor_up, shift_up = scales(scale, zero, held + N, 0, K, GROUP, BLOCKS)
    g0, g1, g2, g3, g4, g5, g6, g7 = gains(gain, 0, K, BLOCKS, NORM)
    wait_for_previous(PDL)
    lh, ll, hh, hl, unit, whole, square = vectors(x, 0, g0, g1, g2, g3, g4, g5, g6, g7, K, BLOCKS, NORM)
    squares = tl.sum(tl.sum(square, 1), 0)
    for begin in tl.range(first, N, stride):
        row = begin + tl.arange(0, BLOCK_N)
        following = tl.minimum(row + stride, N - 1)
        tile_next = words(weight, following, 0, K, BLOCKS)
        factor_next, shift_next = scales(scale, zero, following, 0, K, GROUP, BLOCKS)
        tile_up_next, factor_up_next, shift_up_next = tile_next, factor_next, shift_next
        if ACTIVATION != "none":
            tile_up_next = words(weight, following + N, 0, K, BLOCKS)
            factor_up_next, shift_up_next = scales(scale, zero, following + N, 0, K, GROUP, BLOCKS)
        total = tl.sum(products(tile, lh, ll, hh, hl, unit, whole, factor, shift, ON_CPU), 1)
        total_up = total
        if ACTIVATION != "none":
            total_up = tl.sum(products(tile_up, lh, ll, hh, hl, unit, whole, factor_up, shift_up, ON_CPU), 1)
        finish(total, total_up, squares, row, row < N, bias, residual, out, eps, N, K, NORM, ACTIVATION, BIAS, RESIDUAL)
        tile, factor, shift = tile_next, factor_next, shift_next
        tile_up, factor_up, shift_up = tile_up_next, factor_up_next, shift_up_next


@triton.jit
def gemv_int4_long(
    x, gain, weight, scale, zero, bias, residual, out, eps, N,
    K: tl.constexpr, GROUP: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr, ON_CPU: tl.constexpr,
):  # fmt: skip
    """BLOCK_K < K: the program keeps its BLOCK_N rows and walks the columns; arguments as above."""
    BLOCKS: tl.constexpr = BLOCK_K // 32
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    held = tl.minimum(row, N - 1)
    tile = words(weight, held, 0, K, BLOCKS)
    factor, shift = scales(scale, zero, held, 0, K, GROUP, BLOCKS)
    tile_up, factor_up, shift_up = tile, factor, shift
    if ACTIVATION != "none":
        tile_up = words(weight, held + N, 0, K, BLOCKS)
        factor_up, shift_up = scales(scale, zero, held + N, 0, K, GROUP, BLOCKS)
    wait_for_previous(PDL)
    total = tl.zeros([BLOCK_N, BLOCKS], tl.float32)
    total_up = tl.zeros([BLOCK_N, BLOCKS], tl.float32)
    squares = tl.zeros([BLOCKS, 4], tl.float32)
    for start in tl.range(0, K, BLOCK_K):
        g0, g1, g2, g3, g4, g5, g6, g7 = gains(gain, start, K, BLOCKS, NORM)
        lh, ll, hh, hl, unit, whole, square = vectors(x, start, g0, g1, g2, g3, g4, g5, g6, g7, K, BLOCKS, NORM)
        tile_next = words(weight, held, start + BLOCK_K, K, BLOCKS)
        factor_next, shift_next = scales(scale, zero, held, start + BLOCK_K, K, GROUP, BLOCKS)
        tile_up_next, factor_up_next, shift_up_next = tile_next, factor_next, shift_next
        if ACTIVATION != "none":
            tile_up_next = words(weight, held + N, start + BLOCK_K, K, BLOCKS)
            factor_up_next, shift_up_next = scales(scale, zero, held + N, start + BLOCK_K, K, GROUP, BLOCKS)
        if NORM:
            squares += square
        total += products(tile, lh, ll, hh, hl, unit, whole, factor, shift, ON_CPU)
        if ACTIVATION != "none":
            total_up += products(tile_up, lh, ll, hh, hl, unit, whole, factor_up, shift_up, ON_CPU)
        tile, factor, shift = tile_next, factor_next, shift_next
        tile_up, factor_up, shift_up = tile_up_next, factor_up_next, shift_up_next
    finish(
        tl.sum(total, 1), tl.sum(total_up, 1), tl.sum(tl.sum(squares, 1), 0), row, row < N, bias, residual, out, eps, N,
        K, NORM, ACTIVATION, BIAS, RESIDUAL,
    )  # fmt: skip
