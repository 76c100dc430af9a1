"""Products of more rows than `matmul_rows` takes, with the same fusions: cuBLAS, and one kernel on either side of it.

Arithmetic is the bound here, so matrices are multiplied as dense ones; what is quantised is decoded first. The norm is
a kernel of its own in front, and [bias · gating · residual] is one behind.
"""
# mypy: allow-untyped-defs
# (the arguments of kernels are of Triton's language, not of Python)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewer.kernels.new_tokens import Workspace
from fewer.kernels.triton.gemv import activate, wait_for_previous
from fewer.kernels.triton.linear import PLAIN, Fused, Stored, dequantize
from fewer.kernels.triton.norm import rms_norm

COLUMNS = 1024  # of a row that a program finishes


@triton.jit
def finish_rows(
    product, bias, residual, out, N,
    ACTIVATION: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (c, m): columns c·BLOCK.. of row m of product [M, N], or [M, 2N] when gated, into out [M, N]."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    inside = column < N
    wait_for_previous(PDL)
    base = product + row * (N if ACTIVATION == "none" else 2 * N) + column
    total = tl.load(base, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        total += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION != "none":
        up = tl.load(base + N, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            up += tl.load(bias + N + column, mask=inside, other=0.0).to(tl.float32)
        total = activate(total, up, ACTIVATION)
    if RESIDUAL:
        total += tl.load(residual + row * N + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * N + column, total.to(out.dtype.element_ty), mask=inside)


def multiply_wide(
    x: Tensor, matrix: Stored, out: Tensor, workspace: Workspace, fused: Fused = PLAIN, pdl: bool = False
) -> Tensor:
    """As `fewer.kernels.triton.linear.multiply`: x [M, K] times `matrix`, with the fusions, into `out` [M, N]."""
    bias, residual = fused.bias, fused.residual
    dtype = matrix.codes.dtype if matrix.kind == "dense" else torch.bfloat16
    if fused.gain is not None:
        x = rms_norm(x, fused.gain, fused.eps, dtype, workspace.take("normed", tuple(x.shape), dtype), pdl)
    x, weight = x.to(dtype), dequantize(matrix, dtype).t()  # [K, N]
    if out.dtype == dtype and bias is None and fused.activation == "none":
        if residual is None:
            return torch.mm(x, weight, out=out)
        if residual is out:
            return out.addmm_(x, weight)
    product = torch.mm(x, weight, out=workspace.take("product", (x.shape[0], matrix.shape[0]), dtype))
    (count, size), options = out.shape, {"launch_pdl": True} if pdl else {}
    block = min(COLUMNS, triton.next_power_of_2(size))
    finish_rows[(-(-size // block), count)](
        product, product if bias is None else bias, product if residual is None else residual, out, size,
        fused.activation, bias is not None, residual is not None, block, pdl, num_warps=max(1, block // 256), **options,
    )  # fmt: skip
    return out
