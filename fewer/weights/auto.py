"""Keep what the file holds: its 4- and 8-bit matrices as they are, everything else dense at the chosen dtype.

GGUF Q4_0, Q4_1 and Q4_K go straight into int4, Q5_0 and Q8_0 into int8, with the same codes; no dense copy is made.
With `activations=int8` the CPU's decoding step rounds what meets 4-bit codes to 8 bits, a scale for 32 numbers, as
llama.cpp does: a pass over several tokens, such as a draft's, then takes half the time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewer.formats import DenseFormat, WeightFormat
from fewer.registry import method


@dataclass(frozen=True)
class AutoConfig:
    activations: Literal["float", "int8"] = "float"  # what 4-bit weights are multiplied with when the CPU decodes


@method("auto", slot="weights", lossless=True, config=AutoConfig)
@dataclass(frozen=True)
class AutoWeights:
    dtype: torch.dtype
    config: AutoConfig = AutoConfig()

    needs_calibration = False
    keeps_file_format = True

    @property
    def reads(self) -> torch.dtype:
        return self.dtype

    def quantize(self, name: str, weight: Tensor, hessian: Tensor | None = None) -> WeightFormat:
        return DenseFormat(weight.to(self.dtype))
