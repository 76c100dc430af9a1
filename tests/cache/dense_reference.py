"""Attention in float64, one query at a time, over the keys that a cache promises: the reference of stored caches."""

from __future__ import annotations

import torch
from torch import Tensor

THETA = 1e4


def rotate(x: Tensor, positions: list[int]) -> Tensor:
    """x [H, S, D] float64 with interleaved pairs, turned to `positions` [S]."""
    half = x.shape[-1] // 2
    frequencies = THETA ** -(torch.arange(half, dtype=torch.float64) / half)
    angles = torch.tensor(positions, dtype=torch.float64)[:, None] * frequencies
    pairs = torch.view_as_complex(x.unflatten(-1, (half, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def visible(position: int, window: int | None, sinks: int) -> list[int]:
    """Positions that the query at `position` sees, itself the last."""
    seen = range(position + 1)
    return [at for at in seen if window is None or position - at < window or at < sinks]


def attention_at(
    q: Tensor, k: Tensor, v: Tensor, position: int, window: int | None, sinks: int, renumber: bool, scale: float
) -> Tensor:
    """q [H, D] at `position`, k and v [Hk, S, D] of the whole text, all unrotated -> [H, D] float64."""
    seen = visible(position, window, sinks)
    places = list(range(len(seen))) if renumber else seen
    query = rotate(q[:, None].double(), places[-1:])[:, 0]
    keys = rotate(k[:, seen].double(), places)
    keys = keys.repeat_interleave(len(q) // len(k), dim=0)  # [H, S, D]
    values = v[:, seen].double().repeat_interleave(len(q) // len(k), dim=0)
    weights = (torch.einsum("hd,hsd->hs", query, keys) * scale).softmax(-1)
    return torch.einsum("hs,hsd->hd", weights, values)
