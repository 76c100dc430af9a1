"""A linear layer: one fused matrix, or several of different formats side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewer.formats.base import WeightFormat


class Linear:
    """x [..., K] -> x Wᵀ + b [..., N]. Parts of one format are stacked into one matrix."""

    __slots__ = ("bias", "parts")

    def __init__(self, parts: Sequence[WeightFormat], bias: Tensor | None = None):
        kinds = {(type(part), getattr(part, "group_size", 0), getattr(part, "halves", False)) for part in parts}
        dtypes = {part.compute_dtype for part in parts}
        fused = len(parts) > 1 and len(kinds) == 1 and len(dtypes) == 1
        self.parts = [type(parts[0]).concatenate(parts)] if fused else list(parts)
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        parts = self.parts
        out = parts[0].matmul(x) if len(parts) == 1 else torch.cat([part.matmul(x) for part in parts], dim=-1)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    @property
    def is_fused(self) -> bool:
        return len(self.parts) == 1

    @property
    def format(self) -> WeightFormat:
        """The one matrix; `is_fused` says whether there is one."""
        return self.parts[0]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts) + (0 if self.bias is None else self.bias.nbytes)
