"""Attention of a prompt's newest tokens to all tokens up to themselves, however many are cached, without a mask.

T queries are the last of S keys: query t sees keys 0..S-T+t, a triangle that ends at the bottom right. A mask of T x S
would cost gigabytes for a chunk of a long prompt, and the kernels that take one are slow. The ways on CUDA:

- `cudnn`: cuDNN's kernel, made for Hopper. Its triangles begin at the top left, and for every shape and stride it takes
  half a second to make a plan. So the keys before the chunk are read without a mask, in runs of T·2^k, then the chunk's
  square, and parts are merged; and a call serves few heads, whatever cache they are in.
- `flash`: PyTorch's FlashAttention-2, whose triangle ends at the bottom right.
- `triton`: our kernel over kept tiles, with windows that hold everything. It takes every type, and caps scores.

Nothing repeats the keys for the query heads that share them. A way is taken by default only where a small problem gave
what the reference gives.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from fewer.kernels.attention import attend, merge
from fewer.kernels.tile_attention import EVERYTHING, Lambda, attend_tiles

Way = Literal["cudnn", "flash", "triton"]
Part = tuple[Tensor, Tensor]  # output [B, H, T, D] in q's dtype, log-sum-exp [B, H, T] float32
Kernel = Callable[[Tensor, Tensor, Tensor, float, bool], Part]  # q, k, v, scale, causal

HALVES = (torch.bfloat16, torch.float16)
LONG = 32_768  # keys from which on cuDNN's plans are worth making
PLANNED = 1024  # queries come in multiples of this, or there would be a plan for every length of a prompt
FEWEST_HEADS = 4  # query heads that fill a GPU with a chunk of 8,192 tokens
TOLERANCE = 0.02  # of 16-bit outputs and their log-sum-exp, about 1 in size


def needs_no_mask(device: torch.device) -> bool:
    """Whether a triangle behind cached tokens is best left to `causal_attention`; elsewhere all layers share a mask."""
    return device.type == "cuda"


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float = 0.0, way: Way | None = None
) -> Part:
    """q [B, H, T, D], k and v [B, Hk, S, D], S >= T -> (output [B, H, T, D] in q's dtype, natural log-sum-exp
    [B, H, T] float32).

    `way` None: the fastest that this device and these tensors allow, and the next one where it raises.
    """
    if way is not None:
        return _attend(way, q, k, v, scale, softcap)
    for fast in fast_ways(q, k, softcap):
        try:
            return _attend(fast, q, k, v, scale, softcap)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as fault:
            warnings.warn(f"attention by {fast} failed, a slower kernel serves: {fault}", stacklevel=2)
    return _attend("triton", q, k, v, scale, softcap)


def fast_ways(q: Tensor, k: Tensor, softcap: float = 0.0) -> list[Way]:
    """The ways before `triton` that take these tensors, the fastest first."""
    head_dim, (queries, keys) = q.shape[3], (q.shape[2], k.shape[2])
    if not q.is_cuda or softcap or q.dtype not in HALVES or k.dtype != q.dtype or head_dim % 8:
        return []
    ways: list[Way] = []
    hopper = torch.cuda.get_device_capability(q.device) >= (9, 0)
    if hopper and head_dim <= 128 and keys >= LONG and queries % PLANNED == 0:
        ways.append("cudnn")
    if head_dim <= 256:
        ways.append("flash")
    return [way for way in ways if is_sound(way, q.device, q.dtype, head_dim, q.shape[1] // k.shape[1])]


@cache
def is_sound(way: Way, device: torch.device, dtype: torch.dtype, head_dim: int, group: int) -> bool:
    """Whether the way runs here and gives what the reference gives: kernels and their alignment differ by version."""
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(1, length, heads, head_dim, dtype=dtype, device=device, generator=generator).transpose(1, 2)
        for length, heads in ((64, 2 * group), (256, 2), (256, 2))
    )
    scale = head_dim**-0.5
    try:
        found = _attend(way, q, k, v, scale, 0.0)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AttributeError, TypeError):  # not built in, or of another signature
        return False
    seen = torch.ones(64, 256, dtype=torch.bool, device=device).tril(192)
    wanted = attend(q, k, v, scale, seen[None, None])
    return all(
        bool((one.float() - other.float()).abs().max() < TOLERANCE) for one, other in zip(found, wanted, strict=True)
    )


def _attend(way: Way, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float) -> Part:
    if way == "triton":
        heads = torch.zeros(q.shape[1], dtype=torch.int32, device=q.device)
        rule = Lambda(heads, heads + EVERYTHING)
        return attend_tiles(q, k, v, k.shape[2] - q.shape[2], rule, scale, softcap or None)
    if softcap:
        raise ValueError(f"attention by {way} cannot cap scores: use triton")
    return _flash(q, k, v, scale, True) if way == "flash" else in_runs(q, k, v, scale, _cudnn, _flash)


def in_runs(q: Tensor, k: Tensor, v: Tensor, scale: float, of_square: Kernel, of_rectangle: Kernel) -> Part:
    """Parts over runs of T·2^k keys without a mask, and over the square or rectangle that is left, merged.

    `of_square` knows the triangle of a square alone, `of_rectangle` that of any rectangle.
    """
    width, parts, at = q.shape[2], [], 0
    for length in run_lengths(k.shape[2] - width, width):
        run = slice(at, at + length)
        parts.append(of_square(q, k[:, :, run], v[:, :, run], scale, False))
        at += length
    last = of_square if k.shape[2] - at == width else of_rectangle
    parts.append(last(q, k[:, :, at:], v[:, :, at:], scale, True))
    return parts[0] if len(parts) == 1 else merge(parts)


def run_lengths(keys: int, unit: int) -> list[int]:
    """Powers of two times `unit`, descending, that leave less than `unit` of `keys`: few shapes for any number."""
    count = keys // unit
    return [unit << bit for bit in reversed(range(count.bit_length())) if count >> bit & 1]


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Part:
    found = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return found[0], found[1]


def _cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Part:
    """The fewest heads at a time that fill the GPU with a chunk of a prompt."""
    call = torch.ops.aten._scaled_dot_product_cudnn_attention
    (batch, heads, queries, _), kv_heads = q.shape, k.shape[1]
    group = heads // kv_heads
    together = max(1, FEWEST_HEADS // group)
    rows: list[Part] = []
    for row in range(batch):
        outs, lses = [], []
        for first in range(0, kv_heads, together):
            some = slice(first, min(kv_heads, first + together))
            query = q[row, some.start * group : some.stop * group].contiguous()[None]
            key, value = (
                part[row, some].flatten(0, 1)[None, None] if together == 1 else part[row, some][None] for part in (k, v)
            )
            found = call(query, key, value, None, True, 0.0, causal, False, scale=scale)
            outs.append(found[0])
            lses.append(found[1].view(1, -1, queries))  # some versions give [1, H, T, 1]
        rows.append((torch.cat(outs, dim=1), torch.cat(lses, dim=1)))
    return rows[0] if batch == 1 else (torch.cat([out for out, _ in rows]), torch.cat([lse for _, lse in rows]))
