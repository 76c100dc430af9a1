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
def vectors(x, gain, word, K: tl.constexpr, NORM: tl.constexpr):
    """What `word` (index in a row) multiplies: x·g for its low nibbles l and high ones h; Σ x²; the sums that the
    constants need, by block. gain [K] in word order (`fewer.kernels.triton.linear.word_order`)."""
    inside = word < K // 8
    at = (word // 4) * 8 + word % 4  # byte b of word j of a block: columns 4j + b and 4j + b + 16
    l0, l1, l2, l3 = four(x, at, inside)
    h0, h1, h2, h3 = four(x, at + 4, inside)
    squares = l0
    if NORM:
        squares = l0 * l0 + l1 * l1 + l2 * l2 + l3 * l3 + h0 * h0 + h1 * h1 + h2 * h2 + h3 * h3
        l0 *= tl.load(gain + word, mask=inside, other=0.0)
        l1 *= tl.load(gain + K // 8 + word, mask=inside, other=0.0)
        l2 *= tl.load(gain + 2 * (K // 8) + word, mask=inside, other=0.0)
        l3 *= tl.load(gain + 3 * (K // 8) + word, mask=inside, other=0.0)
        h0 *= tl.load(gain + 4 * (K // 8) + word, mask=inside, other=0.0)
        h1 *= tl.load(gain + 5 * (K // 8) + word, mask=inside, other=0.0)
        h2 *= tl.load(gain + 6 * (K // 8) + word, mask=inside, other=0.0)
        h3 *= tl.load(gain + 7 * (K // 8) + word, mask=inside, other=0.0)
    at_16, at_12, at_8 = l2 + h0 + h3, l0 + h1 + l3, l1 + h2
    constant = block_sum(136.0 * at_16 + 2056.0 * at_12 + 32776.0 * at_8)
    return l0, l1, l2, l3, h0, h1, h2, h3, squares, constant, block_sum(at_16 + at_12 + at_8)


@triton.jit
def nibble(word, pattern, MASK: tl.constexpr):
    """2^e + the nibble under the mask; `pattern` is 2^e."""
    return ((word & MASK) | pattern).to(tl.float32, bitcast=True)


@triton.jit
def products(
    tile, l0, l1, l2, l3, h0, h1, h2, h3, constant, whole, scale, zero, held, column, opaque,
    K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """tile int32 [BLOCK_N, words], rows `held`, blocks that begin at `column` -> Σ w x by block [BLOCK_N, blocks].

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
    at = held[:, None] * (K // GROUP) + (column // GROUP)[None, :]
    inside = (column < K)[None, :]
    factor = tl.load(scale + at, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(zero + at, mask=inside, other=0.0).to(tl.float32)
    return factor * (blocks - constant[None, :]) + shift * whole[None, :]


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
    tile_up = tile
    if ACTIVATION != "none":
        tile_up = chunk(weight + (held + N)[:, None] * (K // 8), word, K // 8)
    wait_for_previous(PDL)
    l0, l1, l2, l3, h0, h1, h2, h3, square, constant, whole = vectors(x, gain, word, K, NORM)
    squares = tl.sum(square, 0)
    for begin in tl.range(first, N, stride):
        row = begin + tl.arange(0, BLOCK_N)
        held = tl.minimum(row, N - 1).to(tl.int64)
        following = tl.minimum(row + stride, N - 1).to(tl.int64)
        tile_next = chunk(weight + following[:, None] * (K // 8), word, K // 8)
        tile_up_next = tile_next
        if ACTIVATION != "none":
            tile_up_next = chunk(weight + (following + N)[:, None] * (K // 8), word, K // 8)
        total = tl.sum(products(
            tile, l0, l1, l2, l3, h0, h1, h2, h3, constant, whole, scale, zero, held, column, opaque, K, GROUP
        ), 1)  # fmt: skip
        total_up = total
        if ACTIVATION != "none":
            total_up = tl.sum(products(
                tile_up, l0, l1, l2, l3, h0, h1, h2, h3, constant, whole, scale, zero, held + N, column, opaque,
                K, GROUP,
            ), 1)  # fmt: skip
        finish(total, total_up, squares, row, row < N, bias, residual, out, eps, N, K, NORM, ACTIVATION, BIAS, RESIDUAL)
        tile = tile_next
        tile_up = tile_up_next


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
    tile_up = tile
    if ACTIVATION != "none":
        tile_up = chunk(second, word, K // 8)
    wait_for_previous(PDL)
    total = tl.zeros([BLOCK_N, BLOCK_K // 32], tl.float32)
    total_up = tl.zeros([BLOCK_N, BLOCK_K // 32], tl.float32)
    squares = tl.zeros([BLOCK_K // 8], tl.float32)
    for start in tl.range(0, K, BLOCK_K):
        here = start // 8 + word
        l0, l1, l2, l3, h0, h1, h2, h3, square, constant, whole = vectors(x, gain, here, K, NORM)
        tile_next = chunk(base, here + BLOCK_K // 8, K // 8)
        tile_up_next = tile_next
        if ACTIVATION != "none":
            tile_up_next = chunk(second, here + BLOCK_K // 8, K // 8)
        if NORM:
            squares += square
        total += products(
            tile, l0, l1, l2, l3, h0, h1, h2, h3, constant, whole, scale, zero, held, start + column, opaque, K, GROUP
        )
        if ACTIVATION != "none":
            total_up += products(
                tile_up, l0, l1, l2, l3, h0, h1, h2, h3, constant, whole, scale, zero, held + N, start + column, opaque,
                K, GROUP,
            )  # fmt: skip
        tile = tile_next
        tile_up = tile_up_next
    finish(
        tl.sum(total, 1), tl.sum(total_up, 1), tl.sum(squares, 0), row, row < N, bias, residual, out, eps, N,
        K, NORM, ACTIVATION, BIAS, RESIDUAL,
    )  # fmt: skip
