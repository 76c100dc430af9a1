"""Attention over part of the keys on one GPU: what share of the read bandwidth lists, tiles and shared prefixes reach.

    python -m benchmarks.h200_lists --out benchmarks/results

32 query heads, 8 key heads of 128 channels, bfloat16. Launches are timed in CUDA graphs; each reads other keys than the
one before, so that none lie in the L2 cache. `results/h200_lists.json` is rewritten after each section.
`--tiny --device cpu` walks the same code at toy sizes through Triton's interpreter.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

if "--tiny" in sys.argv and "cpu" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.h200_kernels import bandwidth  # noqa: E402
from benchmarks.h200_timing import seconds_in_graph  # noqa: E402
from benchmarks.records import write  # noqa: E402
from fewer.evaluation.machine import machine  # noqa: E402
from fewer.kernels.list_attention import Unit  # noqa: E402
from fewer.kernels.tile_attention import EVERYTHING, Lambda  # noqa: E402
from fewer.kernels.triton import list_attention, shared_prefix, tile_attention  # noqa: E402
from fewer.kernels.triton.attention_decode import Scratch, Tiling  # noqa: E402

Results = dict[str, Any]
HEADS, KV_HEADS, HEAD_DIM, PAGE = 32, 8, 128, 64
TOKEN_BYTES = 2 * 2 * HEAD_DIM  # key and value of one key head


class Bench(NamedTuple):
    device: torch.device
    tiny: bool
    read: float  # bytes a second

    def tokens(self, count: int) -> int:
        return max(PAGE, count // 2048) if self.tiny else count

    def rows(self, count: int) -> int:
        return min(2, count) if self.tiny else count

    def pool(self, rows: int, tokens: int, page_size: int) -> tuple[Tensor, Tensor]:
        """[2, pages, Hk, page_size, D] with `tokens` of every row, and a table of scattered pages."""
        pages = tokens // page_size
        shape = 2, rows * pages, KV_HEADS, page_size, HEAD_DIM
        pool = torch.empty(shape, dtype=torch.bfloat16, device=self.device).normal_()
        return pool, torch.randperm(rows * pages, device=self.device).view(rows, pages).int()

    def queries(self, rows: int) -> Tensor:
        return torch.randn(rows, HEADS, HEAD_DIM, device=self.device).bfloat16()

    def filled(self, *shape: int, value: int) -> Tensor:
        return torch.full(shape, value, dtype=torch.int32, device=self.device)

    def random_lists(self, rows: int, heads: int, choices: int, count: int) -> Tensor:
        """Distinct entries, ascending, as a selection of the largest would be after a sort."""
        order = torch.rand(rows, heads, choices, device=self.device).topk(count, -1).indices
        return order.sort(-1).values.int()

    def processors(self) -> int:
        on_gpu = self.device.type == "cuda"
        return torch.cuda.get_device_properties(self.device).multi_processor_count if on_gpu else 4

    def best_of(self, tilings: Iterator[Any], seconds: Callable[[Any], float], amount: float, unit: str) -> Results:
        """Every tiling's rate, first that of what callers get; a tiling that does not fit loses only itself."""
        rates: Results = {}
        for tiling in tilings:
            try:
                took = seconds(tiling)
                rates[str(tuple(tiling))] = {"microseconds": took * 1e6, unit: amount / took}
                if unit == "bytes_per_second":
                    rates[str(tuple(tiling))]["of_read"] = amount / took / self.read
            except Exception as error:
                rates[str(tuple(tiling))] = repr(error)[:200]
        return rates


def tilings(bench: Bench, default: Tiling) -> Iterator[Tiling]:
    yield default
    if bench.device.type != "cuda":
        return
    per_program = default.splits / default.programs
    for slots, stages, resident in (
        (64, 2, 2),
        (64, 2, 4),
        (64, 2, 8),
        (64, 3, 2),
        (128, 2, 1),
        (128, 2, 2),
        (32, 3, 4),
    ):
        programs = resident * bench.processors()
        found = Tiling(max(1, round(per_program * programs)), programs, slots, stages=stages)
        if found != default:
            yield found


def time_lists(
    bench: Bench, pool: Tensor, table: Tensor, lists: list[Tensor | None], counts: Tensor | None, unit: Unit,
    lengths: Tensor, tokens: int, scores: bool = False,
) -> Results:  # fmt: skip
    """Launches with each of `lists` in turn, over one pool; `tokens` are read by all heads together, once a launch."""
    rows, page_size = len(lengths), pool.shape[3]
    list_heads = KV_HEADS if lists[0] is None else lists[0].shape[1]
    longest = table.shape[1] * page_size
    if lists[0] is not None:
        longest = lists[0].shape[2] * (page_size if unit == "page" else 1)
    q, out = bench.queries(rows), torch.empty(rows, HEADS, HEAD_DIM, device=bench.device)
    lse = torch.empty(rows, HEADS, device=bench.device)
    logits = torch.empty(rows, HEADS, longest, device=bench.device) if scores else None

    def seconds(tiling: Tiling) -> float:
        scratch = Scratch.allocate(rows, HEADS, list_heads, HEAD_DIM, tiling.splits, bench.device)
        tensors = [(q, *pool, table, one, counts, unit, lengths, out, lse, logits, scratch) for one in lists]
        return seconds_in_graph([partial(list_attention.launch, *t, tiling, HEAD_DIM**-0.5) for t in tensors])

    even = lists[0] is None and rows == 1
    sizes = rows * list_heads, longest, even, 2 * HEAD_DIM, page_size
    default = list_attention.tiling_for(*sizes, bench.processors())
    return bench.best_of(tilings(bench, default), seconds, tokens * TOKEN_BYTES, "bytes_per_second")


def everything(bench: Bench, rows: int, length: int, page_size: int | None, scores: bool = False) -> Results:
    rows, length = bench.rows(rows), bench.tokens(length)
    pool, table = bench.pool(rows, length, page_size or length)
    repeats: list[Tensor | None] = [None] * (1 if bench.tiny else 4)  # each is larger than the cache
    lengths = bench.filled(rows, value=length)
    return time_lists(bench, pool, table, repeats, None, "page", lengths, rows * KV_HEADS * length, scores)


def unequal_heads(bench: Bench, length: int) -> Results:
    """Half of the heads keep 384 tokens (two pages of sinks, four of window), half everything, as page lists."""
    length = bench.tokens(length)
    pool, table = bench.pool(1, length, PAGE)
    pages = length // PAGE
    kept = min(6, pages)
    lists = torch.arange(pages, device=bench.device).expand(1, KV_HEADS, -1).int().contiguous()
    counts = bench.filled(1, KV_HEADS, value=pages)
    counts[:, KV_HEADS // 2 :] = kept
    lists[:, KV_HEADS // 2 :, :kept] = torch.tensor([0, 1, *range(pages - 4, pages)][:kept], device=bench.device)
    tokens = KV_HEADS // 2 * (length + kept * PAGE)
    repeats: list[Tensor | None] = [lists] * (1 if bench.tiny else 4)
    return time_lists(bench, pool, table, repeats, counts, "page", bench.filled(1, value=length), tokens)


def chosen(bench: Bench, rows: int, unit: Unit, count: int, list_heads: int) -> Results:
    """`count` random pages or tokens of a long context for each list head. Every launch has other ones, of so many that
    hardly any lie in the cache from the launches before."""
    rows, context = bench.rows(rows), bench.tokens(min(262144, 2097152 // rows))
    choices = context // PAGE if unit == "page" else context
    count = min(count, choices)
    pool, table = bench.pool(rows, context, PAGE)
    launches = 1 if bench.tiny else 16
    lists: list[Tensor | None] = [bench.random_lists(rows, list_heads, choices, count) for _ in range(launches)]
    tokens = rows * list_heads * count * (PAGE if unit == "page" else 1)
    counts = bench.filled(rows, list_heads, value=count)
    return time_lists(bench, pool, table, lists, counts, unit, bench.filled(rows, value=context), tokens)


def prefix(bench: Bench, batch: int, length: int) -> Results:
    """One prefix under all rows: as one product, and read by every row from the same pages."""
    batch, length = (8, PAGE) if bench.tiny else (batch, length)
    pool, table = bench.pool(1, length, PAGE)
    q, pointers = bench.queries(batch), torch.tensor([0, batch], dtype=torch.int32, device=bench.device)
    lengths = bench.filled(1, value=length)
    flops = 4 * batch * HEADS * length * HEAD_DIM
    sizes = batch, KV_HEADS, HEADS // KV_HEADS, HEAD_DIM, 2, 1, length
    default = shared_prefix.blocks_for(*sizes, bench.processors())
    candidates = [default]
    if bench.device.type == "cuda":
        shapes = ((128, 64, 1, 4, 2), (128, 64, 1, 8, 3), (128, 128, 1, 8, 3), (64, 64, 1, 4, 3), (128, 128, 2, 8, 2))
        candidates += [shared_prefix.Blocks(*shape) for shape in shapes]

    def seconds(blocks: shared_prefix.Blocks) -> float:
        arguments = q, *pool, table, lengths, pointers, HEAD_DIM**-0.5, None, blocks
        return seconds_in_graph([partial(shared_prefix.attend_prefix, *arguments)] * (1 if bench.tiny else 4))

    one_product = bench.best_of(iter(candidates), seconds, flops, "flops")
    tables, all_lengths = table.expand(batch, -1).contiguous(), bench.filled(batch, value=length)
    whole = None, None, "page", all_lengths, HEAD_DIM**-0.5
    apart = partial(list_attention.attend_list, q, *pool, tables, *whole)
    same = (
        (shared_prefix.attend_prefix(q, *pool, table, lengths, pointers, HEAD_DIM**-0.5)[0] - apart().out).abs().max()
    )
    return {
        "one product": one_product,
        "read by every row": {"microseconds": seconds_in_graph([apart] * (1 if bench.tiny else 2)) * 1e6},
        "largest difference": float(same),
    }


def prefill(bench: Bench, length: int) -> Results:
    """One row's causal prefill: sinks and windows against dense attention, ours and PyTorch's; and column sums."""
    length = 64 if bench.tiny else length
    shape = 1, length, HEADS + 2 * KV_HEADS, HEAD_DIM
    projected = torch.empty(shape, dtype=torch.bfloat16, device=bench.device).normal_().transpose(1, 2)
    q, k, v = projected.split((HEADS, KV_HEADS, KV_HEADS), 1)
    scale, once = HEAD_DIM**-0.5, 1 if bench.tiny else 2
    sdpa = torch.nn.functional.scaled_dot_product_attention
    dense = partial(sdpa, q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    found: Results = {"sdpa dense": {"milliseconds": 1e3 * seconds_in_graph([dense] * once, 3)}}
    for name, sinks, window in (("dense", 0, EVERYTHING), ("128 + 8192", 128, 8192), ("128 + 256", 128, 256)):
        windows = bench.filled(HEADS, value=window)
        cases = {name: windows}
        if window != EVERYTHING:
            cases["half of the heads " + name] = windows.where(
                torch.arange(HEADS, device=bench.device) % 8 < 4, EVERYTHING
            )
        seen = sum(min(i + 1, window + sinks) for i in range(length))
        for title, of_heads in cases.items():
            tiles = Lambda(bench.filled(HEADS, value=sinks), of_heads)
            for blocks in prefill_blocks(bench, tiles):
                run = partial(tile_attention.attend_tiles, q, k, v, 0, tiles, scale, blocks=blocks)
                took = seconds_in_graph([run] * once, 3)
                entry = {"milliseconds": 1e3 * took}
                if title == name:
                    entry["flops"] = 4 * HEADS * HEAD_DIM * seen / took
                found[f"{title} {tuple(blocks)}"] = entry
    tiles = Lambda(bench.filled(HEADS, value=0), bench.filled(HEADS, value=EVERYTHING))
    lse = tile_attention.attend_tiles(q, k, v, 0, tiles, scale)[1]
    for queries in (min(32, length), length):
        part = q[:, :, -queries:], k, lse[:, :, -queries:], torch.ones(queries, device=bench.device), length - queries
        run = partial(tile_attention.column_sums, *part, tiles, scale)
        found[f"column sums of {queries} queries"] = {"milliseconds": 1e3 * seconds_in_graph([run] * once, 3)}
    return found


def prefill_blocks(bench: Bench, tiles: Lambda) -> Iterator[tile_attention.Blocks]:
    yield tile_attention.blocks_for(tiles, HEAD_DIM, 2)
    if bench.device.type == "cuda":
        for shape in ((128, 128, 8, 2), (128, 64, 4, 3), (64, 64, 4, 3)):
            yield tile_attention.Blocks(*shape)


def sections(bench: Bench) -> dict[str, Callable[[], Results]]:
    long = 262144
    found = {
        "full 256k x1 contiguous": partial(everything, bench, 1, long, None),
        "full 256k x1 pages of 64": partial(everything, bench, 1, long, PAGE),
        "full 256k x1 pages of 16": partial(everything, bench, 1, long, 16),
        "full 256k x1 with scores": partial(everything, bench, 1, long, None, True),
        "full 32k x8 pages of 64": partial(everything, bench, 8, 32768, PAGE),
        "256k x1, half of the heads 384": partial(unequal_heads, bench, long),
    }
    for rows in (1, 4, 32):
        found[f"64 pages of 64 x{rows}"] = partial(chosen, bench, rows, "page", 64, KV_HEADS)
    found["64 pages of 64 x4 per query head"] = partial(chosen, bench, 4, "page", 64, HEADS)
    for rows in (1, 8):
        for heads, name in ((HEADS, "query"), (KV_HEADS, "key")):
            found[f"1024 tokens per {name} head x{rows}"] = partial(chosen, bench, rows, "token", 1024, heads)
    found["prefix 16k under 1024 rows"] = partial(prefix, bench, 1024, 16384)
    found["prefix 16k under 64 rows"] = partial(prefix, bench, 64, 16384)
    found["prefill 32k"] = partial(prefill, bench, 32768)
    found["prefill 128k"] = partial(prefill, bench, 131072)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", nargs="*", default=[], help="prefixes of the sections to run")
    parser.add_argument("--seconds", type=float, default=560.0, help="start no section after this long")
    options = parser.parse_args()
    device, stop = torch.device(options.device), time.monotonic() + options.seconds
    rates = bandwidth(device, options.tiny)
    read = max(float(rates[name]) for name in ("read_bytes_per_second", "copy_bytes_per_second"))  # type: ignore[arg-type]
    results: Results = {"environment": machine(device), "bandwidth": rates}
    for name, work in sections(Bench(device, options.tiny, read)).items():
        if options.only and not any(name.startswith(prefix) for prefix in options.only):
            continue
        if time.monotonic() > stop:
            results[name] = "skipped: out of time"
            continue
        torch.manual_seed(0)
        try:
            results[name] = work()
        except Exception as error:
            traceback.print_exc(limit=6)
            results[name] = {"failed": repr(error)[:500]}
        print(f"== {name}: {results[name]}", flush=True)
        write(options.out / "h200_lists.json", results)
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
