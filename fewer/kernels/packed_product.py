"""One row times a stored matrix on the CPU, in words that TorchScript takes: the products of the flat decoding path."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DENSE, INT4, INT8, INT8_HALVES = 0, 1, 2, 3


class Packed(NamedTuple):
    """A matrix W [N, K] as PyTorch's CPU kernels take it."""

    kind: int
    weight: Tensor
    scale: Tensor  # an empty tensor for DENSE
    group_size: int  # 0 where there is none
    rows: int  # N; int4 pads its own
    dtype: torch.dtype  # of x


def packed_product(x: Tensor, kind: int, weight: Tensor, scale: Tensor, group_size: int, rows: int) -> Tensor:
    """x [M, K], contiguous, in the matrix's dtype -> x Wᵀ [M, N]."""
    if kind == 0:
        return torch.nn.functional.linear(x, weight)
    if kind == 2:
        return torch._weight_int8pack_mm(x, weight, scale)
    if kind == 3:
        x = torch.cat([x, x], dim=1)
    out = torch._weight_int4pack_mm_for_cpu(x, weight, group_size, scale)
    return out if out.size(1) == rows else out.narrow(1, 0, rows)
