"""One row times an int4 matrix, w = (q - 8)·scale + zero, in nibble order (fewer.kernels.nibbles).

Unpacking costs as much as the memory traffic if done by conversion, so a nibble becomes a float by bit pattern: four
bits in the mantissa of 2^7 (bits 16..19) read 128 + q, in that of 2^11 (bits 12..15) 2048 + q. One shift serves two
nibbles. The constants leave the sum once for every 32 columns:

    Σ w x = scale·(Σ_low (128 + q) x + Σ_high (2048 + q) x - 136 Σ_low x - 2056 Σ_high x) + zero·Σ x
"""

from __future__ import annotations

import triton
import triton.language as tl

from fewer.kernels.triton.gemv import finish, vector, wait_for_previous


@triton.jit
def at_16(word):
    """128 + the nibble in bits 16..19."""
    return ((word & 0x000F0000) | 0x43000000).to(tl.float32, bitcast=True)


@triton.jit
def at_12(word):
    """2048 + the nibble in bits 12..15."""
    return ((word & 0x0000F000) | 0x45000000).to(tl.float32, bitcast=True)


@triton.jit
def biased_sums(word, low0, low1, low2, low3, high0, high1, high2, high3):
    """word uint32 [BLOCK_N, blocks, 4] times x in eight pieces [blocks, 4] -> sums over 32 columns [BLOCK_N, blocks].

    Byte b of word j of a block holds column 4j + b in its low nibble and 4j + b + 16 in its high one.
    """
    left, right = word << 8, word >> 8
    total = at_16(word << 16) * low0[None, :, :] + at_12(left) * high0[None, :, :]
    total += at_16(left) * low1[None, :, :]
    total += at_12(word) * high1[None, :, :]
    total += at_16(word) * low2[None, :, :]
    total += at_12(right) * high2[None, :, :]
    total += at_16(right) * low3[None, :, :]
    total += at_12(word >> 16) * high3[None, :, :]
    return tl.sum(total, 2)


@triton.jit
def words(packed, held, word, start: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """uint32 [BLOCK_N, blocks, 4] from column `start` on, zeros beyond K."""
    at = packed + held[:, None, None] * (K // 8) + (start // 8 + word)[None, :, :]
    if start + BLOCK_K <= K:
        return tl.load(at, cache_modifier=".cg", eviction_policy="evict_first").to(tl.uint32, bitcast=True)
    inside = (start // 8 + word)[None, :, :] < K // 8
    loaded = tl.load(at, mask=inside, other=0, cache_modifier=".cg", eviction_policy="evict_first")
    return loaded.to(tl.uint32, bitcast=True)


@triton.jit
def factors(scale, held, block, start: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr):
    """Scales (or zeros) of each block of 32 columns: [BLOCK_N, blocks] as stored."""
    at = scale + held[:, None] * (K // GROUP) + ((start + block * 32) // GROUP)[None, :]
    if start + BLOCK_K <= K:
        return tl.load(at)
    return tl.load(at, mask=(start + block * 32)[None, :] < K, other=0.0)


@triton.jit
def gemv_int4(
    x, gain, weight, scale, zero, bias, residual, out, eps, N,
    K: tl.constexpr, GROUP: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """weight int32 [N or 2N, K/8] (the packed bytes, four at a time), scale and zero [.., K / GROUP]."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = row < N
    held = tl.minimum(row, N - 1).to(tl.int64)
    block = tl.arange(0, BLOCK_K // 32)
    word = block[:, None] * 4 + tl.arange(0, 4)[None, :]  # [blocks, 4]
    first = block[:, None] * 32 + 4 * tl.arange(0, 4)[None, :]  # column of byte 0's low nibble
    tile = words(weight, held, word, 0, K, BLOCK_K)
    tile_up = tile
    if ACTIVATION != "none":
        tile_up = words(weight, held + N, word, 0, K, BLOCK_K)
    wait_for_previous(PDL)
    total = tl.zeros([BLOCK_N, BLOCK_K // 32], tl.float32)
    total_up = tl.zeros([BLOCK_N, BLOCK_K // 32], tl.float32)
    squares = tl.zeros([BLOCK_K // 32], tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        raw0, low0 = vector(x, gain, start + first, K, NORM)
        raw1, low1 = vector(x, gain, start + first + 1, K, NORM)
        raw2, low2 = vector(x, gain, start + first + 2, K, NORM)
        raw3, low3 = vector(x, gain, start + first + 3, K, NORM)
        raw4, high0 = vector(x, gain, start + first + 16, K, NORM)
        raw5, high1 = vector(x, gain, start + first + 17, K, NORM)
        raw6, high2 = vector(x, gain, start + first + 18, K, NORM)
        raw7, high3 = vector(x, gain, start + first + 19, K, NORM)
        following = tile
        following_up = tile_up
        if start + BLOCK_K < K:
            following = words(weight, held, word, start + BLOCK_K, K, BLOCK_K)
            if ACTIVATION != "none":
                following_up = words(weight, held + N, word, start + BLOCK_K, K, BLOCK_K)
        if NORM:
            squares += tl.sum(
                raw0 * raw0 + raw1 * raw1 + raw2 * raw2 + raw3 * raw3
                + raw4 * raw4 + raw5 * raw5 + raw6 * raw6 + raw7 * raw7, 1,
            )  # fmt: skip
        low = tl.sum(low0 + low1 + low2 + low3, 1)  # [blocks]
        high = tl.sum(high0 + high1 + high2 + high3, 1)
        constant = (136.0 * low + 2056.0 * high)[None, :]
        whole = (low + high)[None, :]
        sums = biased_sums(tile, low0, low1, low2, low3, high0, high1, high2, high3) - constant
        factor = factors(scale, held, block, start, K, GROUP, BLOCK_K).to(tl.float32)
        shift = factors(zero, held, block, start, K, GROUP, BLOCK_K).to(tl.float32)
        total += factor * sums + shift * whole
        if ACTIVATION != "none":
            sums = biased_sums(tile_up, low0, low1, low2, low3, high0, high1, high2, high3) - constant
            factor = factors(scale, held + N, block, start, K, GROUP, BLOCK_K).to(tl.float32)
            shift = factors(zero, held + N, block, start, K, GROUP, BLOCK_K).to(tl.float32)
            total_up += factor * sums + shift * whole
        tile = following
        tile_up = following_up
    finish(
        tl.sum(total, 1), tl.sum(total_up, 1), tl.sum(squares, 0), row, live, bias, residual, out, eps, N,
        K, NORM, ACTIVATION, BIAS, RESIDUAL,
    )  # fmt: skip
