"""A linear layer: one fused matrix, or several of different formats side by side."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import groupby

import torch
from torch import Tensor

from fewer.formats.base import WeightFormat


class Linear:
    """x [..., K] -> x Wᵀ + b [..., N]. Neighbours of one format are stacked into one part; the bias is of all parts."""

    __slots__ = ("bias", "parts")

    def __init__(self, parts: Sequence[WeightFormat], bias: Tensor | None = None):
        runs = [list(run) for _, run in groupby(parts, key=_kind)]
        self.parts = [run[0] if len(run) == 1 else type(run[0]).concatenate(run) for run in runs]
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
    def compute_dtype(self) -> torch.dtype:
        """The widest dtype that a part computes in."""
        return reduce(torch.promote_types, (part.compute_dtype for part in self.parts))

    @property
    def widths(self) -> list[int]:
        """How many of the N outputs each part yields."""
        return [part.shape[0] for part in self.parts]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts) + (0 if self.bias is None else self.bias.nbytes)


def _kind(part: WeightFormat) -> tuple[object, ...]:
    """Equal for matrices that `concatenate` can stack."""
    return type(part), getattr(part, "group_size", 0), getattr(part, "halves", False), part.compute_dtype
