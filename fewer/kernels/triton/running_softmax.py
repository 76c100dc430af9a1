"""The running softmax of FlashAttention, and where its results go: shared by attention over lists, tiles and prefixes.

Source: FlashAttention, arXiv 2205.14135, section 3. Scores are kept in units of log2, so that exp2 serves.
"""
# mypy: allow-untyped-defs
# (the arguments of kernels are of Triton's language, not of Python)

from __future__ import annotations

import triton
import triton.language as tl

from fewer.kernels.triton.attention import LOG2_E, cap
from fewer.kernels.triton.matmul import multiply_tiles


@triton.jit
def scores_of(
    q, key, scale, softcap, SOFTCAP: tl.constexpr, ON_CPU: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """q [M, DIM], key [N, DIM] -> the logits that enter the softmax, in units of log2: [M, N] float32."""
    products = multiply_tiles(q, tl.trans(key), tl.zeros([q.shape[0], key.shape[0]], tl.float32), ON_CPU, PRECISION)
    if SOFTCAP:
        return cap(products * scale, softcap, SOFTCAP) * LOG2_E
    else:
        return products * (scale * LOG2_E)


@triton.jit
def fold(scores, value, top, total, out, ON_CPU: tl.constexpr, PRECISION: tl.constexpr):
    """Take in a tile: scores [M, N] (-inf where unseen) and value [N, DIM]; top, total [M], out [M, DIM]."""
    higher = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)  # a query that has seen nothing yet
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(weights, 1)
    out = multiply_tiles(weights.to(value.dtype), value, out * shrink[:, None], ON_CPU, PRECISION)
    return higher, total, out


@triton.jit
def fold_tall(scores, value, top, sums, out, ON_CPU: tl.constexpr, PRECISION: tl.constexpr):
    """`fold` for few queries: scores [N, M], top [M], out [DIM, M]. Keys and values are the tall side of both products,
    so tensor cores read them from shared memory. sums [N, M] is to be summed over N after the last tile."""
    higher = tl.maximum(top, tl.max(scores, 0))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores - base[None, :])
    shrink = tl.exp2(top - base)[None, :]
    out = multiply_tiles(tl.trans(value), weights.to(value.dtype), out * shrink, ON_CPU, PRECISION)
    return higher, sums * shrink + weights, out


@triton.jit
def normalised(top, total, out):
    """-> output [M, DIM] and log2-sum-exp2 [M]; zeros and -inf where nothing was seen."""
    out = out / tl.where(total > 0, total, 1.0)[:, None]
    return out, tl.where(total > 0, top + tl.log2(total), float("-inf"))


SHARED_BYTES = 200_000  # of a Hopper multiprocessor's shared memory, for queries, keys and values


def stages_for(queries: int, keys: int, width: int) -> int:
    """Steps of the loop that may be on their way, with tiles of `queries` and `keys` rows of `width` bytes."""
    return max(1, min(3, (SHARED_BYTES - queries * width) // (2 * keys * width)))
