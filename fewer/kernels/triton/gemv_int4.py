"""One row times an int4 matrix, w = (q - 8)·scale + zero, in nibble order (fewer.kernels.nibbles).

Unpacking costs as much as the memory traffic if done by conversion, so a nibble becomes a float by bit pattern: four
bits in the mantissa of 2^7 (bits 16..19) read 128 + q, in that of 2^11 (bits 12..15) 2048 + q, in that of 2^15 (bits
8..11) 32768 + q. So a word and two shifts of it give eight floats. The constants leave the sum of each 32 columns:

    Σ w x = scale·(Σ (2^e + q) x - Σ (2^e + 8) x) + zero·Σ x

Products of 2^15 + q carry the rounding of 2^15: about 2^-12 of a typical product, an eighth of what rounding x to
bfloat16 costs. A thread holds four words, 32 columns, so that these sums need no other thread.
"""
# mypy: allow-untyped-defs
# (the arguments of kernels are of Triton's language, not of Python)

from __future__ import annotations

import triton
import triton.language as tl

from fewer.kernels.triton.gemv import chunk, finish, wait_for_previous


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
def by_block(values):
    """[n, words] -> [n, blocks of 32 columns, 4 words]."""
    return tl.reshape(values, [values.shape[0], values.shape[1] // 4, 4])


@triton.jit
def block_sum(values):
    """[words] -> [blocks]."""
    return tl.sum(tl.sum(by_block(values[None, :]), 2), 0)


@triton.jit
def gains(gain, word, K: tl.constexpr, NORM: tl.constexpr):
    """g for the eight nibbles of `word` (index in a row): gain [K] is in word order (linear.word_order)."""
    inside = word < K // 8
    if NORM:
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
def vectors(x, word, g0, g1, g2, g3, g4, g5, g6, g7, K: tl.constexpr, NORM: tl.constexpr):
    """What `word` multiplies: x·g for its low nibbles l and high ones h; Σ x²; and the sums that the constants need, by
    block."""
    inside = word < K // 8
    at = (word // 4) * 8 + word % 4  # byte b of word j of a block: columns 4j + b and 4j + b + 16
    l0, l1, l2, l3 = four(x, at, inside)
    h0, h1, h2, h3 = four(x, at + 4, inside)
    squares = l0
    if NORM:
        squares = l0 * l0 + l1 * l1 + l2 * l2 + l3 * l3 + h0 * h0 + h1 * h1 + h2 * h2 + h3 * h3
        l0, l1, l2, l3, h0, h1, h2, h3 = l0 * g0, l1 * g1, l2 * g2, l3 * g3, h0 * g4, h1 * g5, h2 * g6, h3 * g7
    at_16, at_12, at_8 = l2 + h0 + h3, l0 + h1 + l3, l1 + h2
    constant = block_sum(136.0 * at_16 + 2056.0 * at_12 + 32776.0 * at_8)
    return l0, l1, l2, l3, h0, h1, h2, h3, squares, constant, block_sum(at_16 + at_12 + at_8)


@triton.jit
def scales(scale, zero, held, column, K: tl.constexpr, GROUP: tl.constexpr):
    """Scale and zero of the blocks that begin at `column`, of rows `held`: [BLOCK_N, blocks]."""
    at = held[:, None] * (K // GROUP) + (column // GROUP)[None, :]
    inside = (column < K)[None, :]
    return tl.load(scale + at, mask=inside, other=0.0), tl.load(zero + at, mask=inside, other=0.0)


@triton.jit
def nibble(word, pattern, MASK: tl.constexpr):
    """2^e + the nibble under the mask; `pattern` is 2^e."""
    return ((word & MASK) | pattern).to(tl.float32, bitcast=True)


@triton.jit
def products(tile, l0, l1, l2, l3, h0, h1, h2, h3, constant, whole, factor, shift, opaque):
    """tile int32 [BLOCK_N, words], scale and zero [BLOCK_N, blocks] -> Σ w x by block [BLOCK_N, blocks].

    `opaque` is 0, which the compiler cannot know: it keeps the patterns in registers, so that one instruction both
    masks and merges.
    """
    p7, p11, p15 = opaque + 0x43000000, opaque + 0x45000000, opaque + 0x47000000
    word = tile.to(tl.uint32, bitcast=True)
    left, right = word << 12, word >> 12
    sums = nibble(left, p11, 0xF000) * l0[None, :]
    sums += nibble(left, p7, 0xF0000) * h0[None, :]
    sums += nibble(word, p15, 0xF00) * l1[None, :]
    sums += nibble(word, p11, 0xF000) * h1[None, :]
    sums += nibble(word, p7, 0xF0000) * l2[None, :]
    sums += nibble(right, p15, 0xF00) * h2[None, :]
    sums += nibble(right, p11, 0xF000) * l3[None, :]
    sums += nibble(right, p7, 0xF0000) * h3[None, :]
    blocks = tl.sum(by_block(sums), 2)
    return factor.to(tl.float32) * (blocks - constant[None, :]) + shift.to(tl.float32) * whole[None, :]


@triton.jit
def gemv_int4(
    x, gain, weight, scale, zero, bias, residual, out, eps, N,
    K: tl.constexpr, GROUP: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_K >= K: x stays in registers while the program walks its rows, the next ones always on their way.

    weight int32 [N or 2N, K/8] (the packed bytes, four at a time), scale and zero [.., K / GROUP].
    """
    opaque = tl.cast(eps, tl.float32).to(tl.uint32, bitcast=True) >> 31  # its sign: 0
    word, column = tl.arange(0, BLOCK_K // 8), tl.arange(0, BLOCK_K // 32) * 32
    first = tl.program_id(0) * BLOCK_N
    stride = tl.num_programs(0) * BLOCK_N
    held = tl.minimum(first + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)  # rows beyond N read the last one
    tile = chunk(weight + held[:, None] * (K // 8), word, K // 8)
    factor, shift = scales(scale, zero, held, column, K, GROUP)
    tile_up, factor_up, shift_up = tile, factor, shift
    if ACTIVATION != "none":
        tile_up = chunk(weight + (held + N)[:, None] * (K // 8), word, K // 8)
        factor_up, shift_up = scales(scale, zero, held + N, column, K, GROUP)
    g0, g1, g2, g3, g4, g5, g6, g7 = gains(gain, word, K, NORM)
    wait_for_previous(PDL)
    l0, l1, l2, l3, h0, h1, h2, h3, square, constant, whole = vectors(x, word, g0, g1, g2, g3, g4, g5, g6, g7, K, NORM)
    squares = tl.sum(square, 0)
    for begin in tl.range(first, N, stride):
        row = begin + tl.arange(0, BLOCK_N)
        following = tl.minimum(row + stride, N - 1).to(tl.int64)
        tile_next = chunk(weight + following[:, None] * (K // 8), word, K // 8)
        factor_next, shift_next = scales(scale, zero, following, column, K, GROUP)
        tile_up_next, factor_up_next, shift_up_next = tile_next, factor_next, shift_next
        if ACTIVATION != "none":
            tile_up_next = chunk(weight + (following + N)[:, None] * (K // 8), word, K // 8)
            factor_up_next, shift_up_next = scales(scale, zero, following + N, column, K, GROUP)
        total = tl.sum(products(tile, l0, l1, l2, l3, h0, h1, h2, h3, constant, whole, factor, shift, opaque), 1)
        total_up = total
        if ACTIVATION != "none":
            total_up = tl.sum(products(
                tile_up, l0, l1, l2, l3, h0, h1, h2, h3, constant, whole, factor_up, shift_up, opaque
            ), 1)  # fmt: skip
        finish(total, total_up, squares, row, row < N, bias, residual, out, eps, N, K, NORM, ACTIVATION, BIAS, RESIDUAL)
        tile, factor, shift = tile_next, factor_next, shift_next
        tile_up, factor_up, shift_up = tile_up_next, factor_up_next, shift_up_next


@triton.jit
def gemv_int4_long(
    x, gain, weight, scale, zero, bias, residual, out, eps, N,
    K: tl.constexpr, GROUP: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_K < K: the program keeps its BLOCK_N rows and walks the columns; arguments as above."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    held = tl.minimum(row, N - 1).to(tl.int64)
    opaque = tl.cast(eps, tl.float32).to(tl.uint32, bitcast=True) >> 31
    word, column = tl.arange(0, BLOCK_K // 8), tl.arange(0, BLOCK_K // 32) * 32
    base = weight + held[:, None] * (K // 8)
    second = weight + (held + N)[:, None] * (K // 8)
    tile = chunk(base, word, K // 8)
    factor, shift = scales(scale, zero, held, column, K, GROUP)
    tile_up, factor_up, shift_up = tile, factor, shift
    if ACTIVATION != "none":
        tile_up = chunk(second, word, K // 8)
        factor_up, shift_up = scales(scale, zero, held + N, column, K, GROUP)
    wait_for_previous(PDL)
    total = tl.zeros([BLOCK_N, BLOCK_K // 32], tl.float32)
    total_up = tl.zeros([BLOCK_N, BLOCK_K // 32], tl.float32)
    squares = tl.zeros([BLOCK_K // 8], tl.float32)
    for start in tl.range(0, K, BLOCK_K):
        here, beyond = start // 8 + word, start + BLOCK_K
        g0, g1, g2, g3, g4, g5, g6, g7 = gains(gain, here, K, NORM)
        l0, l1, l2, l3, h0, h1, h2, h3, square, constant, whole = vectors(
            x, here, g0, g1, g2, g3, g4, g5, g6, g7, K, NORM
        )
        tile_next = chunk(base, beyond // 8 + word, K // 8)
        factor_next, shift_next = scales(scale, zero, held, beyond + column, K, GROUP)
        tile_up_next, factor_up_next, shift_up_next = tile_next, factor_next, shift_next
        if ACTIVATION != "none":
            tile_up_next = chunk(second, beyond // 8 + word, K // 8)
            factor_up_next, shift_up_next = scales(scale, zero, held + N, beyond + column, K, GROUP)
        if NORM:
            squares += square
        total += products(tile, l0, l1, l2, l3, h0, h1, h2, h3, constant, whole, factor, shift, opaque)
        if ACTIVATION != "none":
            total_up += products(tile_up, l0, l1, l2, l3, h0, h1, h2, h3, constant, whole, factor_up, shift_up, opaque)
        tile, factor, shift = tile_next, factor_next, shift_next
        tile_up, factor_up, shift_up = tile_up_next, factor_up_next, shift_up_next
    finish(
        tl.sum(total, 1), tl.sum(total_up, 1), tl.sum(squares, 0), row, row < N, bias, residual, out, eps, N,
        K, NORM, ACTIVATION, BIAS, RESIDUAL,
    )  # fmt: skip
