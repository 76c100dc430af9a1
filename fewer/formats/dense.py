"""Dense: the matrix as it is, in one floating-point dtype."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from fewer.formats.base import WeightFormat
from fewer.kernels.packed_product import DENSE, Packed


class DenseFormat(WeightFormat):
    name = "dense"

    def __init__(self, weight: Tensor):
        self.weight = weight  # [N, K]
        self.shape = (weight.shape[0], weight.shape[1])

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.weight.dtype

    def operands(self) -> Packed | None:
        return Packed(DENSE, self.weight, self.weight.new_empty(0), 0, self.shape[0], self.weight.dtype)

    def matmul(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:
            return functional.linear(x, self.weight)
        return functional.linear(x.to(self.weight.dtype), self.weight).to(x.dtype)

    def rows(self, index: Tensor) -> Tensor:
        return functional.embedding(index, self.weight).float()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.weight.to(dtype)

    def state_dict(self) -> dict[str, Tensor]:
        return {"weight": self.weight}

    @classmethod
    def from_state_dict(cls, tensors: Mapping[str, Tensor], device: torch.device) -> Self:
        return cls(tensors["weight"].to(device))

    def to(self, device: torch.device) -> Self:
        return type(self)(self.weight.to(device))

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        return cls(torch.cat([part.weight for part in parts]))
