"""The uncompressed model: every matrix in one floating-point dtype, decoded from whatever the file holds.

This is the baseline. A file that is already quantised is decoded; the original weights are not in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewer.formats import DenseFormat, WeightFormat
from fewer.registry import method


@method("dense", slot="weights", lossless=True)
@dataclass(frozen=True)
class DenseWeights:
    dtype: torch.dtype
    config: None = None

    needs_calibration = False
    keeps_file_format = False

    @property
    def reads(self) -> torch.dtype:
        return self.dtype

    def quantize(self, name: str, weight: Tensor, hessian: Tensor | None = None) -> WeightFormat:
        return DenseFormat(weight.to(self.dtype))
