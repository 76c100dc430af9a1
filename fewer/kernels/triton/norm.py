"""RMSNorm of whole rows in one pass, optionally with the residual added first."""
# mypy: allow-untyped-defs
# (the arguments of kernels are of Triton's language, not of Python)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewer.kernels.triton.gemv import wait_for_previous


@triton.jit
def norm_rows(
    x, residual, gain, total, out, eps, K, ADD: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """One program a row: s = x (+ residual, stored in `total`), out = s·rsqrt(mean(s²) + eps)·gain, in float32."""
    row = tl.program_id(0).to(tl.int64) * K
    column = tl.arange(0, BLOCK_K)
    inside = column < K
    wait_for_previous(PDL)
    values = tl.load(x + row + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        values += tl.load(residual + row + column, mask=inside, other=0.0).to(tl.float32)
        values = values.to(total.dtype.element_ty)  # the norm sees what is stored
        tl.store(total + row + column, values, mask=inside)
        values = values.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(values * values, 0) / K + eps)
    values = values * inverse * tl.load(gain + column, mask=inside, other=0.0)
    tl.store(out + row + column, values.to(out.dtype.element_ty), mask=inside)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, out: Tensor | None = None, pdl: bool = False
) -> Tensor:
    """x [..., d] of any dtype, weight [d] float32 -> [..., d] in `dtype`, into `out` where it is given."""
    x = x.contiguous()
    if out is None:
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
    _launch(x, x, weight, x, out, eps, add=False, pdl=pdl)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x and residual [..., d] -> (x + residual in the residual's dtype, its RMSNorm in `dtype`)."""
    x, residual = x.contiguous(), residual.contiguous()
    total, out = torch.empty_like(residual), torch.empty(x.shape, dtype=dtype, device=x.device)
    _launch(x, residual, weight, total, out, eps, add=True)
    return total, out


def _launch(
    x: Tensor, residual: Tensor, weight: Tensor, total: Tensor, out: Tensor, eps: float, *, add: bool, pdl: bool = False
) -> None:
    width = x.shape[-1]
    rows = x.numel() // width
    if not rows:
        return
    block = 1 << (width - 1).bit_length()
    warps = min(16, max(1, block // 512))
    options: dict[str, object] = {"launch_pdl": True} if pdl else {}
    norm_rows[(rows,)](x, residual, weight, total, out, eps, width, add, block, pdl, num_warps=warps, **options)
