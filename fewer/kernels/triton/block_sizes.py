"""Block sizes of the products: measured ones for the shapes of Llama-3-8B on an H200, a rule for all others."""

from __future__ import annotations

from typing import NamedTuple


class Blocks(NamedTuple):
    rows: int  # BLOCK_N
    columns: int  # BLOCK_K
    warps: int
    stages: int = 1
    resident: int = 4  # programs a multiprocessor, where they keep x in registers and walk the rows


# (kind, output rows, columns, gated) -> the fastest of the best of benchmarks/h200.py's sweep, timed in whole passes
MEASURED: dict[tuple[str, int, int, bool], Blocks] = {
    ("dense", 6144, 4096, False): Blocks(2, 4096, 4),
    ("dense", 4096, 4096, False): Blocks(2, 4096, 4),
    ("dense", 14336, 4096, True): Blocks(2, 4096, 4),
    ("dense", 4096, 14336, False): Blocks(4, 2048, 4),
    ("dense", 128256, 4096, False): Blocks(2, 4096, 4),
    ("int8", 6144, 4096, False): Blocks(4, 2048, 4),
    ("int8", 4096, 4096, False): Blocks(2, 4096, 4),
    ("int8", 14336, 4096, True): Blocks(8, 1024, 4),
    ("int8", 4096, 14336, False): Blocks(4, 2048, 4),
    ("int8", 128256, 4096, False): Blocks(8, 1024, 4),
    ("int4", 6144, 4096, False): Blocks(4, 4096, 4),
    ("int4", 4096, 4096, False): Blocks(8, 4096, 8, resident=2),
    ("int4", 14336, 4096, True): Blocks(2, 4096, 4, resident=5),
    ("int4", 4096, 14336, False): Blocks(4, 16384, 16, resident=1),
    ("int4", 128256, 4096, False): Blocks(4, 4096, 4),
}


def gemv_blocks(kind: str, rows: int, columns: int, gated: bool) -> Blocks:
    """Block sizes for one row of x."""
    known = MEASURED.get((kind, rows, columns, gated))
    if known is not None:
        return known
    whole = max(32, 1 << (columns - 1).bit_length())  # int8 sums 32 columns at a time
    if kind == "dense":
        return Blocks(2, whole, 4) if whole <= 4096 else Blocks(4, 2048, 4)
    if kind == "int8":
        return Blocks(4, min(whole, 2048), 4)
    if whole <= 4096:
        return Blocks(2 if gated else 4, whole, max(1, whole // 1024))
    return Blocks(2 if gated else 4, whole, 16, resident=1) if whole <= 16384 else Blocks(8, 2048, 2)


SHARED = 200_000  # bytes of shared memory that the loop of `matmul_rows` may take on Hopper


def rows_tile(count: int) -> int:
    """Rows of x that one program multiplies (BLOCK_M), of `count`."""
    return max(16, min(64, 1 << (count - 1).bit_length()))


def rows_blocks(kind: str, count: int, rows: int, columns: int, gated: bool, itemsize: int) -> Blocks:
    """Block sizes for 2 and more rows of x; `itemsize`: bytes of one number of x, and of a dense matrix."""
    if kind == "dense":
        tile, width, warps, stages = (64, 128, 4, 4) if rows > 8192 else (64, 256, 4, 3)
    else:
        tile, width, warps, stages = (32, 256, 2, 4) if kind == "int4" else (32, 128, 4, 5)
    width = min(width, max(32, 1 << (columns - 1).bit_length()))
    stored = {"dense": float(itemsize), "int8": 1.0, "int4": 0.5}[kind] * tile * (2 if gated else 1)
    while width > 32 and stages * width * (stored + itemsize * rows_tile(count)) > SHARED:
        width //= 2
    return Blocks(tile, width, warps, stages)
