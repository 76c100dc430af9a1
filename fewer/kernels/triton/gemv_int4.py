"""One row times an int4 matrix, w = (q - 8)·scale + zero, in nibble order (fewer.kernels.nibbles).

Unpacking costs as much as the memory traffic if done by conversion, so a nibble becomes a float by bit pattern: four
bits in the mantissa of 2^7 (bits 16..19) read 128 + q, in that of 2^11 (bits 12..15) 2048 + q. One shift serves two
nibbles. The constants leave the sum once a group:

    Σ w x = scale·(Σ_low (128 + q) x + Σ_high (2048 + q) x - 136 Σ_low x - 2056 Σ_high x) + zero·Σ x
"""
# mypy: allow-untyped-defs
# (the arguments of kernels are of Triton's language, not of Python)

from __future__ import annotations

import triton
import triton.language as tl

from fewer.kernels.triton.gemv import chunk, finish, vector, wait_for_previous


@triton.jit
def at_16(word, pattern):
    """128 + the nibble in bits 16..19."""
    return ((word & 0x000F0000) | pattern).to(tl.float32, bitcast=True)


@triton.jit
def at_12(word, pattern):
    """2048 + the nibble in bits 12..15."""
    return ((word & 0x0000F000) | pattern).to(tl.float32, bitcast=True)


@triton.jit
def group_sums(
    tile, low0, low1, low2, low3, high0, high1, high2, high3, opaque, GROUP: tl.constexpr
):  # fmt: skip
    """tile int32 [BLOCK_N, words] times x in eight pieces [words] -> biased sums over groups [BLOCK_N, groups].

    Byte b of word j of a 32-column block holds column 4j + b in its low nibble and 4j + b + 16 in its high one.
    `opaque` is 0, which the compiler cannot know: it keeps the patterns in registers, so that one instruction both
    masks and merges.
    """
    pattern7, pattern11 = opaque + 0x43000000, opaque + 0x45000000
    word = tile.to(tl.uint32, bitcast=True)
    left, right = word << 8, word >> 8
    total = at_16(word << 16, pattern7) * low0[None, :]
    total += at_12(left, pattern11) * high0[None, :]
    total += at_16(left, pattern7) * low1[None, :]
    total += at_12(word, pattern11) * high1[None, :]
    total += at_16(word, pattern7) * low2[None, :]
    total += at_12(right, pattern11) * high2[None, :]
    total += at_16(right, pattern7) * low3[None, :]
    total += at_12(word >> 16, pattern11) * high3[None, :]
    return tl.sum(by_group(total, GROUP), 2)


@triton.jit
def by_group(values, GROUP: tl.constexpr):
    """[n, words] -> [n, groups, words of a group]."""
    return tl.reshape(values, [values.shape[0], values.shape[1] * 8 // GROUP, GROUP // 8])


@triton.jit
def scaled_sums(sums, constant, whole, scale, zero, held, group, K: tl.constexpr, GROUP: tl.constexpr):
    """scale·(sums - constant) + zero·whole: [BLOCK_N, groups]."""
    at = held[:, None] * (K // GROUP) + group[None, :]
    inside = (group < K // GROUP)[None, :]
    factor = tl.load(scale + at, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(zero + at, mask=inside, other=0.0).to(tl.float32)
    return factor * (sums - constant[None, :]) + shift * whole[None, :]


@triton.jit
def gemv_int4(
    x, gain, weight, scale, zero, bias, residual, out, eps, N,
    K: tl.constexpr, GROUP: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """weight int32 [N or 2N, K/8] (the packed bytes, four at a time), scale and zero [.., K / GROUP]."""
    WORDS: tl.constexpr = BLOCK_K // 8
    GROUPS: tl.constexpr = BLOCK_K // GROUP
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = row < N
    held = tl.minimum(row, N - 1).to(tl.int64)
    opaque = tl.cast(eps, tl.float32).to(tl.uint32, bitcast=True) >> 31  # its sign: 0
    word = tl.arange(0, WORDS)
    first = (word // 4) * 32 + (word % 4) * 4  # column of byte 0's low nibble
    base = weight + held[:, None] * (K // 8)
    second = weight + (held + N)[:, None] * (K // 8)
    tile = chunk(base, word, K // 8)
    tile_up = tile
    if ACTIVATION != "none":
        tile_up = chunk(second, word, K // 8)
    wait_for_previous(PDL)
    total = tl.zeros([BLOCK_N, GROUPS], tl.float32)
    total_up = tl.zeros([BLOCK_N, GROUPS], tl.float32)
    squares = tl.zeros([WORDS], tl.float32)
    for start in tl.range(0, K, BLOCK_K):
        column = start + first
        raw0, low0 = vector(x, gain, column, K, NORM)
        raw1, low1 = vector(x, gain, column + 1, K, NORM)
        raw2, low2 = vector(x, gain, column + 2, K, NORM)
        raw3, low3 = vector(x, gain, column + 3, K, NORM)
        raw4, high0 = vector(x, gain, column + 16, K, NORM)
        raw5, high1 = vector(x, gain, column + 17, K, NORM)
        raw6, high2 = vector(x, gain, column + 18, K, NORM)
        raw7, high3 = vector(x, gain, column + 19, K, NORM)
        following = chunk(base, (start + BLOCK_K) // 8 + word, K // 8)
        following_up = following
        if ACTIVATION != "none":
            following_up = chunk(second, (start + BLOCK_K) // 8 + word, K // 8)
        if NORM:
            squares += raw0 * raw0 + raw1 * raw1 + raw2 * raw2 + raw3 * raw3
            squares += raw4 * raw4 + raw5 * raw5 + raw6 * raw6 + raw7 * raw7
        low, high = low0 + low1 + low2 + low3, high0 + high1 + high2 + high3
        constant = tl.sum(tl.sum(by_group((136.0 * low + 2056.0 * high)[None, :], GROUP), 2), 0)  # [groups]
        whole = tl.sum(tl.sum(by_group((low + high)[None, :], GROUP), 2), 0)
        group = start // GROUP + tl.arange(0, GROUPS)
        sums = group_sums(tile, low0, low1, low2, low3, high0, high1, high2, high3, opaque, GROUP)
        total += scaled_sums(sums, constant, whole, scale, zero, held, group, K, GROUP)
        if ACTIVATION != "none":
            sums = group_sums(tile_up, low0, low1, low2, low3, high0, high1, high2, high3, opaque, GROUP)
            total_up += scaled_sums(sums, constant, whole, scale, zero, held + N, group, K, GROUP)
        tile = following
        tile_up = following_up
    finish(
        tl.sum(total, 1), tl.sum(total_up, 1), tl.sum(squares, 0), row, live, bias, residual, out, eps, N,
        K, NORM, ACTIVATION, BIAS, RESIDUAL,
    )  # fmt: skip
