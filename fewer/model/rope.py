"""Rotary position embedding, in the interleaved (complex) layout.

Channels 2i and 2i+1 of a head form one complex number that position p turns by p·θ_i. Hugging Face checkpoints pair
channel i with i + D/2 instead; the loader permutes the rows of q and k once, so rotation here is one complex product.
Query-key products do not change under a permutation that both share.

Source: RoFormer, arXiv 2104.09864; frequency scalings: Llama 3.1, YaRN arXiv 2309.00071, LongRoPE arXiv 2402.13753.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fewer.model.config import RopeScaling


def interleave_rows(weight: Tensor, heads: int, rotary_dim: int) -> Tensor:
    """Permute the output rows of a q or k matrix (or bias) [heads·D, ...] from half-split to interleaved pairs.

    Within each head, the first `rotary_dim` rows (i, i + r/2) become (2i, 2i + 1); the others stay.
    """
    head_dim = weight.shape[0] // heads
    order = interleaved_order(head_dim, rotary_dim).to(weight.device)
    return weight.reshape(heads, head_dim, *weight.shape[1:]).index_select(1, order).reshape(weight.shape)


def interleaved_order(head_dim: int, rotary_dim: int) -> Tensor:
    """Source row of each row of one head: [0, r/2, 1, r/2 + 1, …, r, r + 1, …]."""
    pairs = torch.arange(rotary_dim).reshape(2, -1).t().reshape(-1)
    return torch.cat((pairs, torch.arange(rotary_dim, head_dim)))


class Rotary:
    """Turns q or k to their positions: x [..., T, D] at positions [B, T], computed in float32."""

    def __init__(self, rotary_dim: int, head_dim: int, theta: float, context: int, scaling: RopeScaling | None = None):
        self.rotary_dim = rotary_dim
        self.head_dim = head_dim
        self.context = context
        self.frequencies, self.magnitude = _frequencies(rotary_dim, theta, context, scaling)  # [r/2] float64
        self._memo: tuple[Tensor, Tensor] | None = None  # the last positions and their factors: layers share a step
        self._table = torch.empty(0, rotary_dim // 2, dtype=torch.complex64)  # [positions, r/2], grown on demand

    def table(self, positions: int, device: torch.device) -> Tensor:
        """The factors magnitude·exp(i·p·θ) of the first `positions` positions or more: [≥ positions, r/2] complex64."""
        if self._table.shape[0] < positions or self._table.device != device:
            count = max(positions, min(self.context, max(2048, 2 * self._table.shape[0])))
            angles = torch.arange(count, dtype=torch.float64)[:, None] * self.frequencies
            self._table = torch.polar(torch.full_like(angles, self.magnitude), angles).to(torch.complex64).to(device)
        return self._table

    def factors(self, positions: Tensor) -> Tensor:
        """positions [B, T] -> [B, T, r/2] complex64. Any position works, also beyond the trained context."""
        if self._memo is not None and self._memo[0] is positions:
            return self._memo[1]
        angles = positions.to(torch.float64)[..., None] * self.frequencies.to(positions.device)
        factors = torch.polar(torch.full_like(angles, self.magnitude), angles).to(torch.complex64)
        self._memo = positions, factors
        return factors

    def apply(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [B, H, T, D], positions [B, T] -> the same shape and dtype, rotated."""
        if x.is_cuda and not (torch.is_grad_enabled() and x.requires_grad):
            from fewer.kernels.triton.rotate import rotate  # Triton is imported only where there is a GPU

            return rotate(x, self.factors(positions))
        return self.rotate(x, self.factors(positions)[:, None])

    def rotate(self, x: Tensor, factors: Tensor) -> Tensor:
        """x [..., D] times factors [..., r/2] (broadcast), as complex pairs."""
        turned, rest = x[..., : self.rotary_dim], x[..., self.rotary_dim :]
        pairs = torch.view_as_complex(turned.float().unflatten(-1, (-1, 2)).contiguous())
        turned = torch.view_as_real(pairs * factors).flatten(-2).to(x.dtype)
        return turned if self.rotary_dim == self.head_dim else torch.cat((turned, rest), dim=-1)


def _frequencies(dim: int, theta: float, context: int, scaling: RopeScaling | None) -> tuple[Tensor, float]:
    """Angles per position [dim/2] float64, and the factor on cos and sin."""
    base = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    if scaling is None:
        return base, 1.0
    if scaling.kind == "linear":
        return base / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(base, scaling), 1.0
    if scaling.kind == "yarn":
        return _yarn(base, dim, theta, scaling)
    if scaling.kind == "longrope":
        return _longrope(base, context, scaling)
    return _dynamic(base, dim, theta, context, scaling), 1.0


def _dynamic(base: Tensor, dim: int, theta: float, context: int, scaling: RopeScaling) -> Tensor:
    """NTK-aware scaling for the whole context at once: unchanged up to the original length, stretched beyond it."""
    if context <= scaling.original_context or dim == 2:
        return base
    growth = scaling.factor * context / scaling.original_context - (scaling.factor - 1)
    stretched: float = theta * growth ** (dim / (dim - 2))
    return stretched ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def _llama3(base: Tensor, scaling: RopeScaling) -> Tensor:
    wavelength = 2 * math.pi / base
    low = scaling.original_context / scaling.low_freq_factor
    high = scaling.original_context / scaling.high_freq_factor
    smooth = (scaling.original_context / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - smooth) * base / scaling.factor + smooth * base
    return torch.where(wavelength > low, base / scaling.factor, torch.where(wavelength < high, base, blended))


def _yarn(base: Tensor, dim: int, theta: float, scaling: RopeScaling) -> tuple[Tensor, float]:
    def dimension(rotations: float) -> float:
        return dim * math.log(scaling.original_context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)
    magnitude = scaling.attention_factor
    if magnitude is None:
        magnitude = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return base / scaling.factor * ramp + base * (1 - ramp), magnitude


def _longrope(base: Tensor, context: int, scaling: RopeScaling) -> tuple[Tensor, float]:
    factors = scaling.long_factor if context > scaling.original_context else scaling.short_factor
    magnitude = scaling.attention_factor
    if magnitude is None:
        stretch = context / scaling.original_context
        magnitude = math.sqrt(1 + math.log(stretch) / math.log(scaling.original_context)) if stretch > 1 else 1.0
    return base / torch.tensor(factors, dtype=torch.float64), magnitude
