"""4-bit weights by round-to-nearest, asymmetric, a scale and a zero for every group of 32, 64 or 128 columns.

    scale = (max - min) / 15,   zero = min + 8·scale,   q = round((w - zero) / scale) + 8

The embedding and the output head, which are one matrix in small models and hurt most, take 8 bits unless told
otherwise. Routers of experts stay dense.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewer.errors import UsageError
from fewer.formats import DenseFormat, Int4Format, Int8Format, WeightFormat
from fewer.formats.int4 import GROUP_SIZES
from fewer.registry import method


@dataclass(frozen=True)
class Int4Config:
    group: int = 32  # columns that share a scale and a zero: 32, 64 or 128
    head: Literal["int8", "int4", "dense"] = "int8"  # the embedding and the output head
    activations: Literal["float", "int8"] = "float"  # what 4-bit weights are multiplied with when the CPU decodes

    def __post_init__(self) -> None:
        if self.group not in GROUP_SIZES:
            raise UsageError(
                f"int4: group={self.group} is not allowed: choose one of {', '.join(map(str, GROUP_SIZES))}"
            )


@method("int4", slot="weights", lossless=False, config=Int4Config)
@dataclass(frozen=True)
class Int4Weights:
    dtype: torch.dtype
    config: Int4Config = Int4Config()

    needs_calibration = False
    keeps_file_format = False
    reads = torch.float32

    def quantize(self, name: str, weight: Tensor, hessian: Tensor | None = None) -> WeightFormat:
        if name.endswith((".router.weight", ".shared_expert_gate.weight")):
            return DenseFormat(weight.to(self.dtype))
        if name in ("embed.weight", "head.weight") and self.config.head != "int4":
            return Int8Format.from_dense(weight) if self.config.head == "int8" else DenseFormat(weight.to(self.dtype))
        return Int4Format.from_dense(weight, self.config.group)
