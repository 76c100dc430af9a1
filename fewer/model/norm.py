"""RMSNorm, computed in float32: x · rsqrt(mean(x²) + eps) · weight."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x [..., d] of any dtype, weight [d] float32 -> [..., d] in `dtype`."""
    if torch.is_grad_enabled() and x.requires_grad:  # nothing that a backward pass needs may be overwritten
        values = x.float()
        return (values * (values.square().mean(-1, keepdim=True) + eps).rsqrt() * weight).to(dtype)
    if x.is_cuda:
        from fewer.kernels.triton.norm import rms_norm as fused

        return fused(x, weight, eps, dtype)
    values = x.float()
    inverse = torch.linalg.vector_norm(values, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (values * inverse).mul_(weight).to(dtype)
