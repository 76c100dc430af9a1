"""int8: 8-bit codes with one scale a row (per channel), or one for every 32 columns (GGUF Q8_0).

    w = q·scale,   q in -128..127,   scale bfloat16

On the CPU a grouped matrix is stored as two 4-bit halves side by side, because PyTorch has a fast grouped product for
4-bit codes only: with q + 128 = 16·h + l,  q·s = (h - 8)·16s + (l - 8)·s + 8s, so x Wᵀ = [x x] [H L]ᵀ exactly.
Products on the CPU run in bfloat16 with float32 accumulation, whatever the dtype of x.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from fewer.formats.base import WeightFormat
from fewer.kernels import nibbles
from fewer.kernels.packed_product import INT8, INT8_HALVES, Packed

ALIGNMENT = 64  # bytes; PyTorch's own allocations have it
VECTOR = 16  # codes that PyTorch's int8 product reads at once: rows of other widths it reads beyond their end


class Int8Format(WeightFormat):
    name = "int8"

    def __init__(self, shape: tuple[int, int], codes: Tensor, scale: Tensor, *, halves: bool = False):
        """`codes` int8 [N, K] and `scale` [N, G]; with `halves` (CPU, grouped) the packed [N', 2K/2] and
        [2G, N', 2] of `nibbles.scales_for_cpu`."""
        self.shape = shape
        self.codes = codes
        self.scale = scale
        self.halves = halves

    @classmethod
    def from_codes(cls, codes: Tensor, scale: Tensor) -> Self:
        """codes int8 [N, K], scale [N, G] with G = 1 or K/32."""
        rows, columns = codes.shape
        if scale.shape[1] not in (1, columns / 32):
            raise ValueError(f"int8 takes 1 or {columns // 32} scales a row, not {scale.shape[1]}")
        scale = scale.to(torch.bfloat16)
        if scale.shape[1] == 1 or codes.is_cuda:
            return cls((rows, columns), _aligned(codes.contiguous()), _aligned(scale.contiguous()))
        shifted = codes.view(torch.uint8) ^ 128  # q + 128
        packed = nibbles.pack_for_cpu(torch.cat((shifted >> 4, shifted & 15), dim=1))
        scales = torch.cat((scale * 16, scale), dim=1)
        zeros = torch.cat((torch.zeros_like(scale), scale * 8), dim=1)
        return cls((rows, columns), packed, nibbles.scales_for_cpu(scales, zeros), halves=True)

    @classmethod
    def from_dense(cls, weight: Tensor) -> Self:
        """Round to nearest, symmetric, one scale a row."""
        scale = (weight.abs().amax(1, keepdim=True).float() / 127).clamp_min(1e-8).bfloat16()
        return cls.from_codes((weight / scale.float()).round().clamp(-127, 127).to(torch.int8), scale)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def group_size(self) -> int:
        return 32 if self.halves else self.shape[1] // self.scale.shape[1]

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.bfloat16

    def operands(self) -> Packed | None:
        rows, columns = self.shape
        if self.codes.is_cuda or (not self.halves and columns % VECTOR):
            return None
        if self.halves:
            return Packed(INT8_HALVES, self.codes, self.scale, 32, rows, torch.bfloat16)
        return Packed(INT8, self.codes, self.scale.view(-1), 0, rows, torch.bfloat16)

    def matmul(self, x: Tensor) -> Tensor:
        rows, columns = self.shape
        if self.codes.is_cuda:
            from fewer.kernels.triton.linear import int8_matmul

            return int8_matmul(x.reshape(-1, columns), self.codes, self.scale).view(*x.shape[:-1], rows)
        flat = x.reshape(-1, columns).to(torch.bfloat16)
        if self.halves:
            out = nibbles.matmul_cpu(torch.cat((flat, flat), dim=1), self.codes, 32, self.scale, rows)
        elif flat.shape[0] >= nibbles.DENSE_FROM or columns % VECTOR:
            # Codes are exact in bfloat16. The dense product is faster for many rows, and takes any width.
            out = torch.nn.functional.linear(flat, self.codes.to(torch.bfloat16)) * self.scale.view(-1)
        else:
            out = torch._weight_int8pack_mm(flat, self.codes, self.scale.view(-1))
        return out.view(*x.shape[:-1], rows).to(x.dtype)

    def rows(self, index: Tensor) -> Tensor:
        flat = index.reshape(-1)
        if self.halves:
            codes = _join(nibbles.rows_from_cpu(self.codes, flat))
            low = self.scale[self.scale.shape[0] // 2 :]  # [G, N', 2]
            scale = low[:, int(flat), :1].t() if len(flat) == 1 else low[:, flat, 0].t()
        else:
            codes, scale = self.codes[flat], self.scale[flat]
        return _decode(codes, scale).view(*index.shape, self.shape[1])

    def stored(self) -> tuple[Tensor, Tensor]:
        """codes int8 [N, K] and scale bfloat16 [N, G]."""
        if not self.halves:
            return self.codes, self.scale
        codes = _join(nibbles.unpack_from_cpu(self.codes, self.shape[0]))
        return codes, self.scale[self.scale.shape[0] // 2 :, : self.shape[0], 0].t().contiguous()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return _decode(*self.stored()).to(dtype)

    def state_dict(self) -> dict[str, Tensor]:
        codes, scale = self.stored()
        return {"codes": codes, "scale": scale}

    @classmethod
    def from_state_dict(cls, tensors: Mapping[str, Tensor], device: torch.device) -> Self:
        return cls.from_codes(tensors["codes"].to(device), tensors["scale"].to(device))

    def to(self, device: torch.device) -> Self:
        return self if device == self.device else type(self).from_state_dict(self.state_dict(), device)

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        shape = sum(part.shape[0] for part in parts), parts[0].shape[1]
        if any(part.halves != parts[0].halves or part.group_size != parts[0].group_size for part in parts):
            raise ValueError("int8 matrices of different groupings cannot be stacked")
        if parts[0].halves and all(part.shape[0] % nibbles.ROWS == 0 for part in parts[:-1]):
            scale = torch.cat([part.scale for part in parts], dim=1)
            return cls(shape, torch.cat([part.codes for part in parts]), scale, halves=True)
        codes, scales = zip(*(part.stored() for part in parts), strict=True)
        return cls.from_codes(torch.cat(codes), torch.cat(scales))


def _aligned(tensor: Tensor) -> Tensor:
    """PyTorch's int8 product reads whole vectors and faults on memory that does not begin on one, as a mapped file's
    tensors may."""
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def _join(halves: Tensor) -> Tensor:
    """[n, 2K] nibbles (high halves, then low) -> int8 codes [n, K]."""
    high, low = halves.chunk(2, dim=1)
    return (((high << 4) | low) ^ 128).view(torch.int8)


def _decode(codes: Tensor, scale: Tensor) -> Tensor:
    return (codes.unflatten(-1, (scale.shape[-1], -1)).float() * scale.float()[..., None]).flatten(-2)
