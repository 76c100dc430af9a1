"""One run on one GPU: the caches that keep or read fewer keys, with Llama-3-8B shapes, dense attention and peers.

    python -m benchmarks.h200_caches --out benchmarks/results

Random weights in bfloat16, random tokens, real prefills through `Session.prefill` and real steps through
`Session.greedy`. Each section stands alone: a failure is recorded and the next one runs. `h200_caches.json` is
rewritten after each. `--context` and `--layers` make a short run; `--tiny --device cpu` walks the same code at toy
sizes through Triton's interpreter.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

if "--tiny" in sys.argv and "cpu" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch  # noqa: E402

from benchmarks import h200_caches_methods as methods  # noqa: E402
from benchmarks import h200_caches_peers as peers  # noqa: E402
from benchmarks import h200_caches_prefix as prefix  # noqa: E402
from benchmarks.h200_caches_bench import TINY_SIZES, Bench, Sizes  # noqa: E402
from benchmarks.h200_caches_bytes import length_name  # noqa: E402
from benchmarks.h200_caches_targets import targets  # noqa: E402
from benchmarks.h200_kernels import bandwidth  # noqa: E402
from benchmarks.h200_report import Report, Results  # noqa: E402
from fewer.evaluation.machine import machine  # noqa: E402

Section = tuple[str, Callable[[], object]]


def sections(bench: Bench) -> Iterator[Section]:
    """In the order of importance; what one leaves on the GPU for the next is freed between them."""
    sizes, tiny, config = bench.sizes, bench.tiny, bench.config
    long = length_name(sizes.context)
    yield f"dense {long}", lambda: bench.measure_dense(sizes.context, config)
    yield "products", bench.products
    for budget in (sizes.budget, sizes.small_budget):
        kind = methods.tidal_decode(config, budget)
        yield f"tidal-decode {budget} {long}", partial(bench.adopted, kind, sizes.context, config)
    bench.dense = None
    duo = methods.duo_attention(config, tiny)
    yield f"duo-attention {long}", partial(bench.results, duo, sizes.context)
    narrow = methods.lserve(config, 4, tiny)
    for context in (sizes.context, sizes.short, sizes.medium):
        yield f"lserve 4-bit {length_name(context)}", partial(bench.results, narrow, context)
    for context in (sizes.short, sizes.medium, sizes.kept):
        yield f"dense {length_name(context)}", partial(bench.results, methods.dense(), context)
    for context in (sizes.medium, sizes.short, sizes.shortest):
        yield f"a2sf {length_name(context)}", partial(bench.results, methods.a2sf(sizes.kept), context)
    yield "prefix attention", lambda: prefix.attention_alone(bench)
    yield from prefix_sections(bench, "hydragen")
    yield from many_headed_sections(bench)
    wide = methods.lserve(config, 16, tiny)
    yield f"lserve 16-bit {long}", partial(bench.results, wide, sizes.context)
    yield f"lserve 16-bit {length_name(sizes.short)}", partial(bench.results, wide, sizes.short)
    yield f"peer decode attention {long}", lambda: peers.decode_attention(bench, sizes.context)
    square, chunk = (64, 32) if tiny else (32768, 8192)
    square, chunk = min(square, sizes.context), min(chunk, sizes.context // 2)
    yield f"peer prefill attention {length_name(square)}", lambda: peers.prefill_attention(bench, square, square)
    yield f"peer chunk attention {long}", lambda: peers.prefill_attention(bench, chunk, sizes.context)
    kind = methods.sink_window(sizes.kept)
    yield f"sink-window {length_name(sizes.short)}", partial(bench.results, kind, sizes.short)
    yield f"h2o {length_name(sizes.medium)}", lambda: bench.results(methods.h2o(sizes.kept), sizes.medium)
    yield f"quest {length_name(sizes.medium)}", lambda: bench.adopted(methods.quest(tiny), sizes.medium, config)
    bench.dense = None
    for way in ("paged", "full"):
        yield from prefix_sections(bench, way)
    yield f"peer transformers {long}", lambda: peers.transformers_step(bench, sizes.context)


def prefix_sections(bench: Bench, way: str) -> Iterator[Section]:
    for batch, length in prefix.cases(bench):
        yield f"{way} {batch} rows {length_name(length)}", partial(prefix.decoding, bench, way, batch, length)


def many_headed_sections(bench: Bench) -> Iterator[Section]:
    """A model with a key head for every query head."""
    context, config = bench.sizes.many_heads, bench.many_headed
    name = length_name(context)
    yield f"llama-2-7b dense {name}", lambda: bench.measure_dense(context, config)
    kind = methods.tidal_decode(config, bench.sizes.budget)
    yield f"llama-2-7b tidal-decode {name}", lambda: bench.adopted(kind, context, config)
    bench.dense = None


def run(options: argparse.Namespace) -> Results:
    device = torch.device(options.device)
    sizes = TINY_SIZES if options.tiny else Sizes.of(options.context, options.layers, options.steps)
    report = Report(options.out / "h200_caches.json", options.only, options.seconds)
    rates = bandwidth(device, options.tiny)
    rate = max(float(str(rates[name])) for name in ("read_bytes_per_second", "copy_bytes_per_second"))
    bench = Bench(device, options.tiny, sizes, rate, float(str(rates["bf16_flops"])), report.stop)
    bench.prefill_limit = options.prefill_seconds
    bench.pdl = False if options.no_pdl or device.type == "cpu" else None
    report.results |= {"environment": _environment(device), "bandwidth": rates, "settings": bench.settings()}
    for name, work in sections(bench):
        if name not in report.results:  # at a short context some are the same
            torch.manual_seed(0)
            report.section(name, work)
    found = targets(report.results)
    report.results["targets"] = [target.to_json() for target in found]
    report.write()
    print("\n".join(str(target) for target in found))
    return report.results


def _environment(device: torch.device) -> Results:
    import triton

    return machine(device) | {"triton": triton.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--no-pdl", action="store_true", help="without programmatic dependent launch")
    parser.add_argument("--only", nargs="*", default=[], help="prefixes of the sections to run")
    parser.add_argument("--seconds", type=float, default=470.0, help="start no section after this long")
    parser.add_argument("--prefill-seconds", type=float, default=90.0, help="give up a prompt after this long")
    parser.add_argument("--context", type=int, default=Sizes.context, help="tokens of the long context")
    parser.add_argument("--layers", type=int, default=Sizes.layers, help="of the models")
    parser.add_argument("--steps", type=int, default=Sizes.steps, help="decoding steps that count")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
