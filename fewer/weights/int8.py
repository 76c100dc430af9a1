"""8-bit weights by round-to-nearest, symmetric, one scale an output row.

    scale = max|w| / 127,   q = round(w / scale)

Routers of experts stay dense: they are tiny and decide much.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewer.formats import DenseFormat, Int8Format, WeightFormat
from fewer.registry import method


@method("int8", slot="weights", lossless=False)
@dataclass(frozen=True)
class Int8Weights:
    dtype: torch.dtype
    config: None = None

    needs_calibration = False
    keeps_file_format = False
    reads = torch.float32

    def quantize(self, name: str, weight: Tensor, hessian: Tensor | None = None) -> WeightFormat:
        if name.endswith((".router.weight", ".shared_expert_gate.weight")):
            return DenseFormat(weight.to(self.dtype))
        return Int8Format.from_dense(weight)
