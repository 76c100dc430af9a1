"""The seam of the `weights` slot at run time: how one matrix is stored and multiplied.

A format holds a matrix W [N, K] (N out_features, K in_features) and answers the calls below. It never keeps a dense
copy beside its own storage. Methods that quantise (`fewer/weights/`) produce formats; the network only ever calls
`matmul` and `rows`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor

from fewer.kernels.packed_product import Packed


class WeightFormat(ABC):
    """One stored matrix W [N, K]."""

    name: ClassVar[str]
    shape: tuple[int, int]

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the tensors really held, scales included."""

    @abstractmethod
    def matmul(self, x: Tensor) -> Tensor:
        """x [..., K] -> x Wᵀ [..., N], in the dtype of x."""

    @property
    @abstractmethod
    def compute_dtype(self) -> torch.dtype:
        """The dtype that the product runs in on this device; other inputs are cast to it and back."""

    def operands(self) -> Packed | None:
        """The matrix as `packed_product` takes it, or None where the CPU has no such kernel for it."""
        return None

    @abstractmethod
    def rows(self, index: Tensor) -> Tensor:
        """Rows of W (an embedding lookup): index [...] -> [..., K] float32, without a dense copy of W."""

    @abstractmethod
    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense matrix [N, K] that `matmul` multiplies by."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """Tensors for safetensors, independent of the device's private layout; `from_state_dict` restores them."""

    @classmethod
    @abstractmethod
    def from_state_dict(cls, tensors: Mapping[str, Tensor], device: torch.device) -> Self: ...

    @abstractmethod
    def to(self, device: torch.device) -> Self: ...

    @classmethod
    @abstractmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """Stack matrices of one K along N: the fused QKV and gate-up projections."""

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])
