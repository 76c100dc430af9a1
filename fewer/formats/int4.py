"""int4: 4-bit codes in groups of 32, 64 or 128 columns, each group with a scale and a zero (asymmetric).

    w = (q - 8)·scale + zero,   q in 0..15,   scale and zero bfloat16

Scales are rounded to bfloat16 before codes are chosen, so the stored matrix is exactly the one multiplied.
Files that hold 4-bit blocks (GGUF Q4_0, Q4_1, Q4_K) keep their codes; only their float16 scales are rounded.
On the CPU products run in bfloat16 with float32 accumulation, whatever the dtype of x.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from fewer.errors import UsageError
from fewer.formats.base import WeightFormat
from fewer.kernels import nibbles
from fewer.kernels.packed_product import INT4, Packed

GROUP_SIZES = (32, 64, 128)


class Int4Format(WeightFormat):
    name = "int4"

    def __init__(self, shape: tuple[int, int], group_size: int, packed: Tensor, scale: Tensor, zero: Tensor | None):
        """CPU: `packed` in PyTorch's layout, `scale` [G, N', 2] (with zeros inside), `zero` None.
        CUDA: `packed` [N, K/2] in nibble order, `scale` and `zero` [N, G]."""
        self.shape = shape
        self.group_size = group_size
        self.packed = packed
        self.scale = scale
        self.zero = zero

    @classmethod
    def from_codes(cls, codes: Tensor, scale: Tensor, zero: Tensor) -> Self:
        """codes uint8 [N, K] of 0..15, scale and zero [N, G]."""
        rows, columns = codes.shape
        group_size = columns // scale.shape[1]
        _check_group(columns, group_size)
        if codes.is_cuda:
            parts = nibbles.pack_nibbles(codes), scale.bfloat16(), zero.bfloat16()
            return cls((rows, columns), group_size, *parts)
        packed = nibbles.pack_for_cpu(codes)
        return cls((rows, columns), group_size, packed, nibbles.scales_for_cpu(scale, zero), None)

    @classmethod
    def from_nibbles(cls, packed: Tensor, scale: Tensor, zero: Tensor) -> Self:
        """packed uint8 [N, K/2] in nibble order (fewer.kernels.nibbles), scale and zero [N, G]."""
        if not packed.is_cuda:
            return cls.from_codes(nibbles.unpack_nibbles(packed), scale, zero)
        rows, columns = packed.shape[0], 2 * packed.shape[1]
        _check_group(columns, columns // scale.shape[1])
        return cls((rows, columns), columns // scale.shape[1], packed, scale.bfloat16(), zero.bfloat16())

    @classmethod
    def from_dense(cls, weight: Tensor, group_size: int = 32) -> Self:
        """Round to nearest, minimum and maximum of each group on the grid's ends."""
        _check_group(weight.shape[1], group_size)
        groups = weight.float().unflatten(1, (-1, group_size))  # [N, G, g]
        low, high = groups.amin(-1), groups.amax(-1)
        scale = ((high - low) / 15).clamp_min(1e-8).bfloat16()
        zero = (low + 8 * scale.float()).bfloat16()
        codes = ((groups - zero.float()[..., None]) / scale.float()[..., None]).round().add(8).clamp(0, 15)
        return cls.from_codes(codes.to(torch.uint8).flatten(1), scale, zero)

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scale.nbytes + (0 if self.zero is None else self.zero.nbytes)

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.bfloat16

    def operands(self) -> Packed | None:
        if self.zero is not None:
            return None
        return Packed(INT4, self.packed, self.scale, self.group_size, self.shape[0], torch.bfloat16)

    def matmul(self, x: Tensor) -> Tensor:
        if self.zero is not None:
            from fewer.kernels.triton.linear import int4_matmul

            out = int4_matmul(x.reshape(-1, self.shape[1]), self.packed, self.scale, self.zero)
            return out.view(*x.shape[:-1], self.shape[0])
        flat = x.reshape(-1, self.shape[1]).to(torch.bfloat16)
        out = nibbles.matmul_cpu(flat, self.packed, self.group_size, self.scale, self.shape[0])
        return out.view(*x.shape[:-1], self.shape[0]).to(x.dtype)

    def rows(self, index: Tensor) -> Tensor:
        flat = index.reshape(-1)
        if self.zero is not None:
            codes, scale, zero = nibbles.unpack_nibbles(self.packed[flat]), self.scale[flat], self.zero[flat]
        else:
            codes = nibbles.rows_from_cpu(self.packed, flat)
            scale, zero = self.scale[:, flat].unbind(-1)
            scale, zero = scale.t(), zero.t()
        return _decode(codes, scale, zero, self.group_size).view(*index.shape, self.shape[1])

    def codes(self) -> tuple[Tensor, Tensor, Tensor]:
        """codes uint8 [N, K], scale and zero bfloat16 [N, G], as stored."""
        if self.zero is not None:
            return nibbles.unpack_nibbles(self.packed), self.scale, self.zero
        scale, zero = self.scale[:, : self.shape[0]].unbind(-1)
        return nibbles.unpack_from_cpu(self.packed, self.shape[0]), scale.t().contiguous(), zero.t().contiguous()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return _decode(*self.codes(), self.group_size).to(dtype)

    def state_dict(self) -> dict[str, Tensor]:
        codes, scale, zero = self.codes()
        return {"packed": nibbles.pack_nibbles(codes), "scale": scale, "zero": zero}

    @classmethod
    def from_state_dict(cls, tensors: Mapping[str, Tensor], device: torch.device) -> Self:
        return cls.from_nibbles(*(tensors[key].to(device) for key in ("packed", "scale", "zero")))

    def to(self, device: torch.device) -> Self:
        return self if device == self.device else type(self).from_state_dict(self.state_dict(), device)

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        group_size = parts[0].group_size
        if any(part.group_size != group_size for part in parts):
            raise ValueError("int4 matrices of different group sizes cannot be stacked")
        shape = sum(part.shape[0] for part in parts), parts[0].shape[1]
        if all(part.zero is not None for part in parts):
            zero = torch.cat([part.zero for part in parts if part.zero is not None])
            packed, scale = torch.cat([p.packed for p in parts]), torch.cat([p.scale for p in parts])
            return cls(shape, group_size, packed, scale, zero)
        whole_tiles = all(part.shape[0] % nibbles.ROWS == 0 for part in parts[:-1])
        if all(part.zero is None for part in parts) and whole_tiles:  # tiles stay tiles: no unpacking
            packed, scale = torch.cat([p.packed for p in parts]), torch.cat([p.scale for p in parts], dim=1)
            return cls(shape, group_size, packed, scale, None)
        codes, scales, zeros = zip(*(part.codes() for part in parts), strict=True)
        return cls.from_codes(torch.cat(codes), torch.cat(scales), torch.cat(zeros))


def _decode(codes: Tensor, scale: Tensor, zero: Tensor, group_size: int) -> Tensor:
    """float32 [N, K] of (q - 8)·scale + zero."""
    centred = codes.unflatten(-1, (-1, group_size)).float() - 8
    return torch.addcmul(zero.float()[..., None], centred, scale.float()[..., None]).flatten(-2)


def _check_group(columns: int, group_size: int) -> None:
    if group_size not in GROUP_SIZES or columns % group_size:
        fitting = [g for g in GROUP_SIZES if columns % g == 0]
        advice = f"use {' or '.join(map(str, fitting))}" if fitting else "keep this matrix dense or int8"
        raise UsageError(f"int4 group size {group_size} does not fit a matrix of {columns} columns: {advice}")
