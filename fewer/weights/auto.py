"""Keep what the file holds: its 4- and 8-bit matrices as they are, everything else dense at the chosen dtype.

GGUF Q4_0, Q4_1 and Q4_K go straight into int4, Q5_0 and Q8_0 into int8, with the same codes; no dense copy is made.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewer.formats import DenseFormat, WeightFormat
from fewer.registry import method


@method("auto", slot="weights", lossless=True)
@dataclass(frozen=True)
class AutoWeights:
    dtype: torch.dtype
    config: None = None

    needs_calibration = False
    keeps_file_format = True

    @property
    def reads(self) -> torch.dtype:
        return self.dtype

    def quantize(self, name: str, weight: Tensor, hessian: Tensor | None = None) -> WeightFormat:
        return DenseFormat(weight.to(self.dtype))
