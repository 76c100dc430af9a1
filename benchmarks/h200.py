"""One run on one GPU: kernels against float64, then speed against the targets, then peers on the same shapes.

    python -m benchmarks.h200 --out results

Each section stands alone: a failure is recorded and the next one runs. `results/h200.json` is rewritten after each.
`--tiny --device cpu` walks the same code at toy sizes through Triton's interpreter.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

TINY_ON_CPU = "--tiny" in sys.argv and "cpu" in sys.argv
if TINY_ON_CPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch  # noqa: E402

from benchmarks import h200_kernels as kernels  # noqa: E402
from benchmarks import h200_models as models  # noqa: E402
from benchmarks import h200_peers as peers  # noqa: E402
from benchmarks.h200_report import Report, Results  # noqa: E402
from fewer.engine import cuda  # noqa: E402
from fewer.engine.runner import Runner  # noqa: E402
from fewer.evaluation.machine import machine  # noqa: E402
from fewer.model.config import ModelConfig  # noqa: E402


def _number(result: object, key: str, default: float) -> float:
    return float(result[key]) if isinstance(result, dict) and key in result else default


def run_model(
    report: Report, name: str, config: ModelConfig, kind: str, options: argparse.Namespace, flops: float
) -> None:
    """Builds one model, then decodes, checks and, for the dense one, prefills and runs the compiled peer."""
    device, tiny = torch.device(options.device), options.tiny
    prompt, tokens = (16, 3) if tiny else (512, 128)
    model = models.random_model(config, kind, device)
    runner = Runner(model)
    if device.type == "cpu":
        runner.single, runner.cuda = None, cuda.CudaDecoder(model)
    if options.no_pdl and runner.cuda is not None:
        runner.cuda.pdl = False
    report.section(f"{name} agrees", lambda: models.decode_agrees(runner, prompt))
    report.section(f"{name} decode", lambda: models.decode_speed(runner, prompt, tokens))
    if runner.cuda is not None and runner.cuda.pdl:
        runner.cuda.graphs.clear()
        runner.cuda.pdl = False
        report.section(f"{name} decode without pdl", lambda: models.decode_speed(runner, prompt, tokens, 2))
        runner.cuda.graphs.clear()
        runner.cuda.pdl = True
    rows = [9, 16, 5] if tiny else [512, 100, 300, 40, 256, 512, 77, 400]
    report.section(f"{name} batch", lambda: models.decode_batch(runner, rows, 2 if tiny else 64))
    if config is not models.SMOLLM2_135M:
        length = 32 if tiny else 8192
        report.section(f"{name} prefill", lambda: models.prefill_speed(runner, length, flops))
    if kind == "dense" and device.type == "cuda" and config is models.LLAMA_8B:
        report.section(f"peer compiled loop {name}", lambda: peers.compiled_loop_speed(model, prompt, tokens))
    runner.cuda = None


def run(options: argparse.Namespace) -> Results:
    device, tiny = torch.device(options.device), options.tiny
    report = Report(options.out / "h200.json", options.only, options.seconds)
    report.results["environment"] = _environment(device)
    rates = report.section("bandwidth", lambda: kernels.bandwidth(device, tiny))
    read = max(_number(rates, "read_bytes_per_second", 4.3e12), _number(rates, "copy_bytes_per_second", 0))
    flops = _number(rates, "bf16_flops", 7.9e14)
    pdl = device.type == "cuda" and not options.no_pdl
    large = models.TINY if tiny else models.LLAMA_8B
    small = models.TINY if tiny else models.SMOLLM2_135M
    for name, kind in (("llama bf16", "dense"), ("llama int4", "int4")):
        report.section(f"sweep {kind}", lambda k=kind: kernels.sweep(k, device, tiny, read, 45.0, pdl))
        guard(report, name, lambda n=name, k=kind: run_model(report, n, large, k, options, flops))
    report.section("attention", lambda: kernels.attention_speed(device, tiny, read, pdl))
    guard(report, "smollm2", lambda: run_model(report, "smollm2 bf16", small, "dense", options, flops))
    report.section("check attention", lambda: kernels.check_attention(device, tiny))
    for compiled in (True, False):
        name = f"peer transformers {'static' if compiled else 'eager'}"
        sizes = (16, 8) if tiny else (512, 128)
        report.section(
            name, lambda c=compiled, s=sizes: peers.transformers_speed(large, *s, device, c and device.type == "cuda")
        )
    report.section("check products", lambda: kernels.check_products(device, tiny))
    report.section("sweep int8", lambda: kernels.sweep("int8", device, tiny, read, 30.0, pdl))
    guard(report, "llama int8", lambda: run_model(report, "llama int8", large, "int8", options, flops))
    report.section("prefill parts", lambda: models.prefill_parts(large, 32 if tiny else 8192, device))
    return report.results


def guard(report: Report, name: str, work: Callable[[], None]) -> None:
    """A model that cannot be built loses only its own sections."""
    wanted = not report.only or any(prefix.startswith(name) or name.startswith(prefix) for prefix in report.only)
    if not wanted or time.monotonic() > report.stop:
        return
    try:
        work()
    except Exception as error:
        traceback.print_exc(limit=6)
        report.results[f"{name} build"] = {"failed": repr(error)[:500]}
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _environment(device: torch.device) -> Results:
    import triton

    return machine(device) | {"triton": triton.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--no-pdl", action="store_true", help="without programmatic dependent launch")
    parser.add_argument("--only", nargs="*", default=[], help="prefixes of the sections to run")
    parser.add_argument("--seconds", type=float, default=560.0, help="start no section after this long")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
