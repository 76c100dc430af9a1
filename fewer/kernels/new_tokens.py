"""One new token a row on its way into attention, as the projections leave it: what kernels of replayed passes take."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


class Workspace:
    """Tensors that the launches of passes share, one behind another: zero when they are made, and kept."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._tensors: dict[tuple[str, tuple[int, ...], torch.dtype], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """The tensor of this name, shape and dtype. What it holds is of no use to the next launch that takes it,
        unless every launch leaves it as it was."""
        key = name, shape, dtype
        if key not in self._tensors:
            with torch.inference_mode(False):
                self._tensors[key] = torch.zeros(shape, dtype=dtype, device=self.device)
        return self._tensors[key]


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a few on the CPU, where Triton's interpreter runs."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@dataclass(frozen=True)
class Fusion:
    """What is done to the query and the new key before they meet."""

    table: Tensor | None  # [positions, r/2, 2] float32 cos and sin; None: no rotation
    rotary_dim: int
    q_gain: Tensor | None = None  # [D] float32
    k_gain: Tensor | None = None
    eps: float = 0.0


@dataclass(frozen=True)
class NewTokens:
    """A layer's projections of one new token in each of B rows, and where its attention goes."""

    projected: Tensor  # [B, (H + 2·Hk)·D]: heads of q, k and v, before norms and rotation
    positions: Tensor  # [B] int32
    out: Tensor  # [B, H·D], to be filled
    heads: int
    kv_heads: int
    scale: float
    softcap: float | None
    fusion: Fusion
    workspace: Workspace
    pdl: bool  # kernels start while the one in front drains, and wait for it themselves

    @property
    def batch(self) -> int:
        return self.projected.shape[0]

    @property
    def head_dim(self) -> int:
        return self.projected.shape[1] // (self.heads + 2 * self.kv_heads)
