"""One row times a stored matrix: y = f(x) Wᵀ, the product that bounds decoding.

Each program owns BLOCK_N rows of W and walks K in chunks of BLOCK_K. The first chunk is requested before the program
waits for the kernel in front of it (programmatic dependent launch), so memory stays busy across kernel borders.
Fused around the product: RMSNorm of x (its scale factors out of the sum, so x is read once), bias, residual, gating.

    out[n] = act(r·Σ_k x_k g_k W[n, k] + bias[n]) (· the same for row N + n, when gated) + residual[n]
"""
# mypy: allow-untyped-defs
# (the arguments of kernels are of Triton's language, not of Python)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(gate, up, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return gate * tl.sigmoid(gate) * up
    if ACTIVATION == "gelu_tanh":  # 0.5·(1 + tanh u) = sigmoid(2u)
        return gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) * up
    return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up


@triton.jit
def finish(
    total, up, squares, row, live, bias, residual, out, eps, N,
    K: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Scale of the norm, bias, gating, residual; then the store. total and up [BLOCK_N] float32."""
    if NORM:
        inverse = tl.rsqrt(squares / K + eps)
        total *= inverse
        up *= inverse
    if BIAS:
        total += tl.load(bias + row, mask=live, other=0.0).to(tl.float32)
    if ACTIVATION != "none":
        if BIAS:
            up += tl.load(bias + N + row, mask=live, other=0.0).to(tl.float32)
        total = activate(total, up, ACTIVATION)
    if RESIDUAL:
        total += tl.load(residual + row, mask=live, other=0.0).to(tl.float32)
    tl.store(out + row, total.to(out.dtype.element_ty), mask=live)


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Let the next kernel start, then wait until the one in front has written everything."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def chunk(base, index, K: tl.constexpr):
    """Columns `index` of the rows at `base` [BLOCK_N, 1], zeros beyond K. Read once, so first to leave the caches."""
    return tl.load(base + index[None, :], mask=(index < K)[None, :], other=0, eviction_policy="evict_first")


@triton.jit
def vector(x, gain, index, K: tl.constexpr, NORM: tl.constexpr):
    """x and x·g at `index`, float32, zeros beyond K."""
    raw = tl.load(x + index, mask=index < K, other=0.0).to(tl.float32)
    if NORM:
        return raw, raw * tl.load(gain + index, mask=index < K, other=0.0)
    return raw, raw


@triton.jit
def gemv_dense(
    x, gain, weight, scale, zero, bias, residual, out, eps, N,
    K: tl.constexpr, GROUP: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """weight [N or 2N, K] floating point. `scale`, `zero` and GROUP are unused: all gemv kernels take one list."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = row < N
    held = tl.minimum(row, N - 1).to(tl.int64)  # rows beyond N read the last one and are not stored
    column = tl.arange(0, BLOCK_K)
    base = weight + held[:, None] * K
    second = weight + (held + N)[:, None] * K
    tile = chunk(base, column, K)
    tile_up = tile
    if ACTIVATION != "none":
        tile_up = chunk(second, column, K)
    wait_for_previous(PDL)
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    total_up = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    squares = tl.zeros([BLOCK_K], tl.float32)
    for start in tl.range(0, K, BLOCK_K):
        raw, scaled = vector(x, gain, start + column, K, NORM)
        following = chunk(base, start + BLOCK_K + column, K)  # on its way while this one is multiplied
        following_up = following
        if ACTIVATION != "none":
            following_up = chunk(second, start + BLOCK_K + column, K)
        if NORM:
            squares += raw * raw
        total += tile.to(tl.float32) * scaled[None, :]
        if ACTIVATION != "none":
            total_up += tile_up.to(tl.float32) * scaled[None, :]
        tile = following
        tile_up = following_up
    finish(
        tl.sum(total, 1), tl.sum(total_up, 1), tl.sum(squares, 0), row, live, bias, residual, out, eps, N,
        K, NORM, ACTIVATION, BIAS, RESIDUAL,
    )  # fmt: skip


@triton.jit
def gemv_int8(
    x, gain, weight, scale, zero, bias, residual, out, eps, N,
    K: tl.constexpr, GROUP: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """weight int8 [N or 2N, K], scale [.., K / GROUP] with GROUP 32 or K. Sums 32 columns, then scales."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = row < N
    held = tl.minimum(row, N - 1).to(tl.int64)
    block = tl.arange(0, BLOCK_K // 32)
    inner = tl.arange(0, 32)
    wait_for_previous(PDL)
    total = tl.zeros([BLOCK_N, BLOCK_K // 32], tl.float32)
    total_up = tl.zeros([BLOCK_N, BLOCK_K // 32], tl.float32)
    squares = tl.zeros([BLOCK_K // 32], tl.float32)
    for start in tl.range(0, K, BLOCK_K):
        column = start + block[:, None] * 32 + inner[None, :]  # [blocks, 32]
        raw, scaled = vector(x, gain, column, K, NORM)
        if NORM:
            squares += tl.sum(raw * raw, 1)
        total += int8_blocks(weight, scale, held, column, start, block, scaled, K, GROUP)
        if ACTIVATION != "none":
            total_up += int8_blocks(weight, scale, held + N, column, start, block, scaled, K, GROUP)
    finish(
        tl.sum(total, 1), tl.sum(total_up, 1), tl.sum(squares, 0), row, live, bias, residual, out, eps, N,
        K, NORM, ACTIVATION, BIAS, RESIDUAL,
    )  # fmt: skip


@triton.jit
def int8_blocks(weight, scale, held, column, start, block, scaled, K: tl.constexpr, GROUP: tl.constexpr):
    """Scaled sums of 32 columns each: [BLOCK_N, blocks]."""
    at = weight + held[:, None, None] * K + column[None, :, :]
    codes = tl.load(at, mask=column[None, :, :] < K, other=0, eviction_policy="evict_first")
    group = (start + block * 32) // GROUP
    factor = tl.load(
        scale + held[:, None] * (K // GROUP) + group[None, :], mask=(start + block * 32)[None, :] < K, other=0
    )
    return factor.to(tl.float32) * tl.sum(codes.to(tl.float32) * scaled[None, :, :], 2)
