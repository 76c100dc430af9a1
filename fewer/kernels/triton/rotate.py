"""Rotary positions in one pass over memory: every pair of channels 2i, 2i + 1 of a head times a complex factor.

`fewer.model.rope` has the factors, and the same in PyTorch with five passes.
"""
# mypy: allow-untyped-defs
# (the arguments of kernels are of Triton's language, not of Python)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

HEADS = 8  # of a token that a program turns: they share its factors
TILE = 4096  # numbers of a program


@triton.jit
def rotate_heads(
    x, factors, out, stride_b, stride_h, stride_t, heads, tokens,
    HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of tokens, tiles of heads, B). x [B, H, T, HEAD_DIM] of these strides, factors [B, T, ROTARY_DIM / 2,
    2 (cosine, sine)], out [B, T, H, HEAD_DIM] contiguous."""
    row = tl.program_id(2).to(tl.int64)
    line = tl.arange(0, BLOCK_T * BLOCK_H)  # the heads of a token lie side by side
    token = tl.program_id(0) * BLOCK_T + line // BLOCK_H
    head = tl.program_id(1) * BLOCK_H + line % BLOCK_H
    channel = tl.arange(0, DIM)
    inside = ((token < tokens) & (head < heads))[:, None]
    if DIM != HEAD_DIM:
        inside = inside & (channel < HEAD_DIM)[None, :]
    start = row * stride_b + head.to(tl.int64) * stride_h + token.to(tl.int64) * stride_t
    value = tl.load(x + start[:, None] + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    of_token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    pair = tl.arange(0, DIM // 2)
    at = factors + (row * tokens + of_token)[:, None] * ROTARY_DIM + 2 * pair[None, :]
    turned = (of_token < tokens)[:, None] & (pair < ROTARY_DIM // 2)[None, :]
    cosine = tl.load(at, mask=turned, other=1.0)  # channels behind the rotary ones stay
    sine = tl.load(at + 1, mask=turned, other=0.0)
    real, imaginary = tl.split(tl.reshape(value, [BLOCK_T, BLOCK_H, DIM // 2, 2]))
    cosine, sine = cosine[:, None, :], sine[:, None, :]
    value = tl.join(real * cosine - imaginary * sine, imaginary * cosine + real * sine)
    value = tl.reshape(value, [BLOCK_T * BLOCK_H, DIM])
    place = ((row * tokens + token) * heads + head) * HEAD_DIM
    tl.store(out + place[:, None] + channel[None, :], value.to(out.dtype.element_ty), mask=inside)


def rotate(x: Tensor, factors: Tensor) -> Tensor:
    """x [B, H, T, D], D even, factors [B, T, r/2] complex64 -> the same shape and dtype, the first r channels turned.

    In memory the result is [B, T, H, D], as projections leave it and the next one takes it.
    """
    batch, heads, tokens, head_dim = x.shape
    if x.stride(3) != 1:
        x = x.contiguous()
    out = torch.empty(batch, tokens, heads, head_dim, dtype=x.dtype, device=x.device)
    if out.numel():
        dim = next_power_of_2(head_dim)
        block_h = min(HEADS, next_power_of_2(heads))
        block_t = min(next_power_of_2(tokens), max(1, TILE // (dim * block_h)))
        pairs = torch.view_as_real(factors.expand(batch, -1, -1).contiguous())
        rotate_heads[(triton.cdiv(tokens, block_t), triton.cdiv(heads, block_h), batch)](
            x, pairs, out, *x.stride()[:3], heads, tokens, head_dim, 2 * factors.shape[2], dim, block_h, block_t,
        )  # fmt: skip
    return out.transpose(1, 2)
