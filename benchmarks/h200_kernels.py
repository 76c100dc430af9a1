"""Kernels: their errors against float64, the bandwidth they reach, and a small sweep of block sizes."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.h200_timing import median_rate, seconds_in_graph
from fewer.kernels.triton import attention_decode as decode
from fewer.kernels.triton.block_sizes import Blocks
from fewer.kernels.triton.linear import Fused, Stored, dequantize, multiply
from fewer.kernels.triton.norm import add_rms_norm, rms_norm

Results = dict[str, object]


def random_matrix(kind: str, rows: int, columns: int, group: int, device: torch.device) -> Stored:
    """W [rows, columns] of standard deviation about 0.02."""
    if kind == "dense":
        return Stored("dense", torch.empty(rows, columns, dtype=torch.bfloat16, device=device).normal_(0, 0.02))
    groups = 1 if group == 0 else columns // group
    spread = torch.empty(rows, groups, device=device).uniform_(0.5, 1.5)
    if kind == "int8":
        codes = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device=device)
        return Stored("int8", codes, (spread * 0.02 / 73).bfloat16())
    packed = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device=device)
    scale = (spread * 0.02 / 4.6).bfloat16()
    return Stored("int4", packed, scale, (0.5 * scale.float()).bfloat16())


def relative_error(found: Tensor, wanted: Tensor) -> float:
    wanted = wanted.double()
    return float((found.double() - wanted).norm() / wanted.norm())


def bandwidth(device: torch.device, tiny: bool) -> Results:
    """Bytes a second of a copy (read + written) and of reads alone, and the bfloat16 matrix rate on random data."""
    count = 1 << (20 if tiny else 30)
    source = torch.empty(count, device=device).normal_()
    target = torch.empty_like(source)
    size = 256 if tiny else 8192
    a, b = (torch.empty(size, size, dtype=torch.bfloat16, device=device).normal_() for _ in "ab")
    reads = [median_rate(work, 4 * count) for work in (source.sum, source.amax)]
    return {
        "copy_bytes_per_second": median_rate(lambda: target.copy_(source), 8 * count),
        "read_bytes_per_second": max(reads),
        "bf16_flops": median_rate(lambda: torch.matmul(a, b), 2 * size**3, 9),
    }


def check_products(device: torch.device, tiny: bool) -> Results:
    """Relative error of every product kernel against float64 on the same stored numbers; bfloat16 x, float32 out."""
    errors: Results = {}
    rows, columns = (48, 256) if tiny else (1536, 4096)
    cases = [("dense", 0), ("int8", 0), ("int8", 32), ("int4", 32), ("int4", 64), ("int4", 128)]
    for kind, group in cases:
        matrix = random_matrix(kind, rows, columns, group, device)
        dense = dequantize(matrix, torch.float32).double()
        for count in (1, 5) if tiny else (1, 2, 7, 16, 64):
            x = torch.randn(count, columns, device=device).bfloat16()
            gain = torch.rand(columns, device=device) + 0.5
            residual = torch.randn(count, rows, device=device).bfloat16()
            plain = x.double() @ dense.T
            out = torch.empty(count, rows, device=device)
            name = f"{kind}{group or ''} x{count}"
            errors[name] = relative_error(multiply(x, matrix, out), plain)
            normed = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt() * gain.double()
            both = normed @ dense.T
            multiply(x, matrix, out, Fused(gain, 1e-5, None, "none", residual))
            errors[name + " norm residual"] = relative_error(out, both + residual.double())
            gated = torch.empty(count, rows // 2, device=device)
            multiply(x, matrix, gated, Fused(gain, 1e-5, None, "silu"))
            gate, up = both.chunk(2, -1)
            errors[name + " norm silu"] = relative_error(gated, torch.nn.functional.silu(gate) * up)
    x, y = (torch.randn(3, 576, device=device).bfloat16() for _ in "xy")
    gain = torch.rand(576, device=device)
    total = (x.double() + y.double()).bfloat16().double()
    wanted = [v * (v.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * gain.double() for v in (x.double(), total)]
    errors["rms_norm"] = relative_error(rms_norm(x, gain, 1e-5, torch.float32), wanted[0])
    errors["add_rms_norm"] = relative_error(add_rms_norm(x, y, gain, 1e-5, torch.float32)[1], wanted[1])
    worst = max(errors, key=lambda key: float(str(errors[key])))
    return {"errors": errors, "worst": worst, "worst_error": errors[worst]}


def attention_reference(q: Tensor, keys: Tensor, values: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """float64: q [B, H, D] over the first lengths[b] keys -> out [B, H, D], lse [B, H]."""
    outs, lses = [], []
    group = q.shape[1] // keys.shape[1]
    for row, length in enumerate(lengths):
        k, v = (part[row, :, :length].double().repeat_interleave(group, 0) for part in (keys, values))  # [H, S, D]
        scores = (k @ q[row].double()[..., None])[..., 0] * q.shape[-1] ** -0.5
        outs.append((scores.softmax(-1)[:, None] @ v)[:, 0])
        lses.append(scores.logsumexp(-1))
    return torch.stack(outs), torch.stack(lses)


def check_attention(device: torch.device, tiny: bool) -> Results:
    errors: Results = {}
    cases = [(8, 2, 64, [97]), (4, 4, 32, [1, 64, 33])]
    if not tiny:
        cases += [(32, 8, 128, [4097]), (32, 8, 128, [1, 17, 1000, 8191]), (9, 3, 64, [700, 20])]
    for heads, kv_heads, head_dim, lengths in cases:
        batch, longest = len(lengths), max(lengths)
        q = torch.randn(batch, heads, head_dim, device=device).bfloat16()
        keys, values = (torch.randn(batch, kv_heads, longest, head_dim, device=device).bfloat16() for _ in "kv")
        at = torch.tensor(lengths, dtype=torch.int32, device=device)
        out, lse = decode.attention_decode(q, keys, values, at, head_dim**-0.5)
        wanted, wanted_lse = attention_reference(q, keys, values, lengths)
        name = f"{heads}/{kv_heads} D{head_dim} {lengths}"
        errors[name] = relative_error(out, wanted)
        errors[name + " lse"] = float((lse.double() - wanted_lse).abs().max())
    return errors


def attention_speed(device: torch.device, tiny: bool, read: float, pdl: bool) -> Results:
    """Decode attention, 32 query and 8 key heads of 128, as a fraction of the read bandwidth."""
    found: Results = {}
    long = [96, 128] if tiny else [32768, 131072]
    mixed = [128, 32, 64] if tiny else [32768, 16384, 8192, 24576, 4096, 30000, 12288, 20480]
    for lengths in ([long[0]], [long[1]], mixed):
        name = f"{lengths[0]} x1" if len(lengths) == 1 else f"unequal {lengths}"
        found[name] = best = {}
        for tiling in _attention_tilings(len(lengths), max(lengths), device):
            try:
                rate = _attention_rate(lengths, tiling, device, 1 if tiny else None, pdl)
                best[str(tuple(tiling))] = {"bytes_per_second": rate, "of_read": rate / read}
            except Exception as error:  # one tiling that does not fit loses only itself
                best[str(tuple(tiling))] = repr(error)[:200]
    return found


def _attention_tilings(batch: int, longest: int, device: torch.device) -> Iterator[decode.Tiling]:
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    first = decode.tiling_for(batch, 8, longest, processors)
    yield first
    if device.type != "cuda":
        return
    for share in (1, 2) if batch == 1 else (0.5, 1):
        programs = int(share * first.programs)
        for shape in ((64, 4, 3), (64, 4, 4), (128, 4, 2), (128, 8, 3)):
            yield decode.Tiling(max(1, programs // 8), programs, *shape)


def _attention_rate(
    lengths: list[int], tiling: decode.Tiling, device: torch.device, copies: int | None, pdl: bool
) -> float:
    batch, heads, kv_heads, head_dim, longest = len(lengths), 32, 8, 128, max(lengths)
    bytes_read = sum(lengths) * kv_heads * head_dim * 2 * 2
    copies = copies or max(1, int(1e9 // (batch * longest * kv_heads * head_dim * 4)))
    at = torch.tensor(lengths, dtype=torch.int32, device=device)
    q = torch.randn(batch, heads, head_dim, device=device).bfloat16()
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, device=device)
    scratch = decode.Scratch.allocate(batch, heads, kv_heads, head_dim, tiling.splits, device)
    launches: list[Callable[[], object]] = []
    for _ in range(copies):
        shape = (batch, kv_heads, longest, head_dim)
        keys, values = (torch.empty(shape, dtype=torch.bfloat16, device=device).normal_() for _ in "kv")
        arguments = (q, keys, values, at, out, lse, scratch, tiling, heads, head_dim**-0.5)
        launches.append(functools.partial(decode.launch, *arguments, pdl=pdl))
    return bytes_read / seconds_in_graph(launches * max(1, 8 // copies))


SHAPES = {  # name: rows of the output, columns, gated, normed, residual
    "qkv": (6144, 4096, False, True, False),
    "o": (4096, 4096, False, False, True),
    "gate_up": (14336, 4096, True, True, False),
    "down": (4096, 14336, False, False, True),
    "head": (128256, 4096, False, True, False),
}
CANDIDATES = {  # rows, columns, warps, stages, programs a multiprocessor
    "dense": [(4, 2048, 4), (2, 4096, 4), (1, 4096, 4), (2, 4096, 8), (4, 4096, 8), (1, 4096, 2), (4, 1024, 4)],
    "int8": [(4, 2048, 4), (8, 1024, 4), (4, 4096, 4), (2, 4096, 4)],
    "int4": [
        (4, 4096, 4, 1, 4),
        (4, 4096, 4, 1, 3),
        (2, 4096, 4, 1, 5),
        (2, 4096, 4, 1, 4),
        (4, 4096, 8, 1, 3),
        (8, 4096, 8, 1, 2),
        (4, 16384, 16, 1, 1),
        (2, 16384, 8, 1, 2),
    ],
}


def sweep(kind: str, device: torch.device, tiny: bool, read: float, seconds: float, pdl: bool) -> Results:
    """Fraction of the read bandwidth that each block size reaches on each matrix of Llama-3-8B, one row.

    Neighbours in a pass change the order of close ones, so `fewer/kernels/triton/block_sizes.py` holds what was fastest
    there."""
    found: Results = {}
    stop = time.monotonic() + seconds
    group = {"dense": 0, "int8": 0, "int4": 128}[kind]
    for name, (rows, columns, gated, normed, added) in SHAPES.items():
        if tiny:
            rows, columns = 32, 256
        matrix_rows = rows * (2 if gated else 1)
        bytes_each = matrix_rows * columns * {"dense": 2.0, "int8": 1.0, "int4": 0.53125}[kind]
        copies = 1 if tiny else max(1, min(16, int(6e8 // bytes_each)))
        matrices = [random_matrix(kind, matrix_rows, columns, group, device) for _ in range(copies)]
        x = torch.randn(1, columns, device=device).bfloat16()
        out = torch.randn(1, rows, device=device).bfloat16()
        gain = torch.ones(columns, device=device) if normed else None
        fused = Fused(gain, 1e-5, None, "silu" if gated else "none", out if added else None)
        found[name] = rates = {}
        for candidate in CANDIDATES[kind][: 1 if tiny else None]:
            if candidate[1] >= 2 * columns and not tiny:
                continue
            blocks = Blocks(*candidate)
            blocks = blocks._replace(columns=256) if tiny else blocks
            if time.monotonic() > stop:
                break
            try:
                launches = [functools.partial(multiply, x, matrix, out, fused, pdl, blocks) for matrix in matrices]
                time_each = seconds_in_graph(launches * max(1, 16 // copies))
                rates[str(candidate)] = round(bytes_each / time_each / read, 3)
            except Exception as error:
                rates[str(candidate)] = repr(error)[:200]
        reached = {key: rate for key, rate in rates.items() if isinstance(rate, float)}
        if reached and not tiny:
            rates["best"] = max(reached, key=lambda key: reached[key])
    return found
