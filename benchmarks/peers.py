"""fewer, llama.cpp and transformers on the same GGUF file, two threads each, in turn.

    python -m benchmarks.peers            # the figures of the README: run it on a machine that does nothing else
    python -m benchmarks.peers --quick    # short: does everything work?

Each engine lives in a process of its own (`peer_engines`) that loads once and works only when it is asked to. A round
measures every engine once, so that a machine that slows down slows all of them; ratios are taken within a round.
Decoding is measured after a prompt of ordinary prose, alone and with another process keeping one core busy; loading in
fresh processes. Medians with lowest and highest go to `results/peers.json`, with every reading.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.records import RESULTS, write
from fewer.checkpoint.names import resolve
from fewer.checkpoint.open import open_checkpoint
from fewer.evaluation.bandwidth import BandwidthProbe
from fewer.evaluation.machine import machine
from fewer.evaluation.prompts import built_in_prompts, repeat_to
from fewer.evaluation.speed import Spread

ENGINES = ("fewer", "llama.cpp", "transformers")
UNDER_LOAD = ("fewer", "llama.cpp")  # measured beside a busy core too
QUESTION = "The first thing to know about the sea is"
IDLE_SHARE = 0.05  # of a core: more, and an engine that waits would disturb the others


@dataclass(frozen=True)
class Settings:
    """Lengths are tokens."""

    rounds: int = 7
    threads: int = 2
    prompt: int = 128  # before decoding
    decode: int = 128
    prefill: int = 1024
    loads: int = 5  # fresh processes an engine


QUICK = Settings(rounds=2, prompt=16, decode=8, prefill=64, loads=1)


class Worker:
    """An engine's process. Requests are answered in order; between them it sleeps."""

    def __init__(self, engine: str, path: Path, threads: int):
        self.engine, self.started = engine, time.perf_counter()
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.peer_engines", engine, str(path), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=Path(__file__).parents[1],
        )
        self._read()  # loaded

    def ask(self, do: str, **what: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(json.dumps({"do": do, **what}), file=self.process.stdin, flush=True)
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.engine} ended with exit code {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    @property
    def cpu_seconds(self) -> float:
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


@dataclass
class Readings:
    """One engine's figures, one a round; rates in tokens a second."""

    decode: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    busy_decode: list[float] = field(default_factory=list)
    first_token_seconds: list[float] = field(default_factory=list)
    after_torch_seconds: list[float] = field(default_factory=list)
    bytes_read: list[float] = field(default_factory=list)  # a second, by decoding: ours only


@contextmanager
def busy_core() -> Iterator[None]:
    """Another process that keeps one core busy."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.2)  # until it runs
        yield
    finally:
        process.kill()
        process.wait()


def idle_shares(workers: Sequence[Worker], seconds: float = 1.0) -> dict[str, float]:
    """How much of a core each waiting engine takes. Raises RuntimeError where one spins."""
    time.sleep(0.5)  # threads that spin briefly after work have gone to sleep
    before = [worker.cpu_seconds for worker in workers]
    time.sleep(seconds)
    shares = {w.engine: (w.cpu_seconds - b) / seconds for w, b in zip(workers, before, strict=True)}
    for engine, share in shares.items():
        if share > IDLE_SHARE:
            raise RuntimeError(f"{engine} takes {share:.0%} of a core while it waits: its figures would disturb others")
    return shares


def measure_round(workers: Sequence[Worker], readings: dict[str, Readings], words: list[int], s: Settings) -> None:
    """Every engine once at each measure, so that neighbours in time are compared."""
    prompt = repeat_to(words, s.prompt)
    for worker in workers:
        found = worker.ask("decode", prompt=prompt, tokens=s.decode)
        readings[worker.engine].decode.append(s.decode / found["seconds"])
        readings[worker.engine].bytes_read += [found["read_rate"]] if "read_rate" in found else []
    for worker in workers:
        seconds = worker.ask("prefill", prompt=repeat_to(words, s.prefill))["seconds"]
        readings[worker.engine].prefill.append(s.prefill / seconds)
    with busy_core():
        for worker in workers:
            if worker.engine in UNDER_LOAD:
                seconds = worker.ask("decode", prompt=prompt, tokens=s.decode)["seconds"]
                readings[worker.engine].busy_decode.append(s.decode / seconds)


def measure_load(engine: str, path: Path, threads: int, readings: Readings) -> None:
    """From starting Python to the first token of an answer, the file being in the system's cache."""
    worker = Worker(engine, path, threads)
    after_torch = worker.ask("first token", text=QUESTION)["after_torch"]
    readings.first_token_seconds.append(time.perf_counter() - worker.started)
    readings.after_torch_seconds += [after_torch] if after_torch is not None else []
    worker.close()


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def run(path: Path, settings: Settings) -> dict[str, Any]:
    """All measures of one file; returns the report."""
    torch.set_num_threads(settings.threads)
    tokenizer = open_checkpoint(path).tokenizer()
    words = [token for text in built_in_prompts() for token in tokenizer.encode(text)]
    readings = {engine: Readings() for engine in ENGINES}
    probe, bandwidths = BandwidthProbe(torch.device("cpu")), []
    base = Worker("import torch", path, settings.threads)
    imported = base.ask("peak")["bytes"]
    base.close()
    workers = [Worker(engine, path, settings.threads) for engine in ENGINES]
    try:
        warm_up = {engine: Readings() for engine in ENGINES}
        measure_round(workers, warm_up, words, settings)
        idle = idle_shares(workers)
        for number in range(settings.rounds):
            note(f"round {number + 1} of {settings.rounds}")
            bandwidths.append(probe.measure())
            measure_round(workers, readings, words, settings)
        bandwidths.append(probe.measure())
        peaks = {worker.engine: worker.ask("peak")["bytes"] for worker in workers}
        prompt = repeat_to(words, settings.prompt)
        texts = {w.engine: w.ask("decode", prompt=prompt, tokens=settings.decode)["tokens"] for w in workers}
    finally:
        for worker in workers:
            worker.close()
    for number in range(settings.loads):
        note(f"load {number + 1} of {settings.loads}")
        for engine in ENGINES:
            measure_load(engine, path, settings.threads, readings[engine])
    return {
        "machine": machine(torch.device("cpu")) | {"threads": settings.threads},
        "versions": {name: version(name) for name in ("llama-cpp-python", "transformers")},
        "file": path.name,
        "settings": asdict(settings),
        "engines": {engine: _summary(readings[engine]) for engine in ENGINES},
        "ratios": {peer: _ratios(readings["fewer"], readings[peer]) for peer in ENGINES[1:]},
        "bandwidth_bytes_per_second": asdict(Spread.of(bandwidths)),
        "bandwidth_fraction": asdict(Spread.of([each / max(bandwidths) for each in readings["fewer"].bytes_read])),
        "memory": {
            "file_bytes": path.stat().st_size,
            "import_torch_bytes": imported,
            "peak_bytes": peaks,
            "fewer_over_import_torch_bytes": peaks["fewer"] - imported,
        },
        "idle_share_of_a_core": idle,
        "same_tokens_as_fewer": {peer: common_prefix(texts["fewer"], texts[peer]) for peer in ENGINES[1:]},
        "readings": {engine: asdict(readings[engine]) for engine in ENGINES},
    }


def _summary(readings: Readings) -> dict[str, Any]:
    pairs = zip(readings.busy_decode, readings.decode, strict=False)
    figures = {
        "decode_tokens_per_second": readings.decode,
        "prefill_tokens_per_second": readings.prefill,
        "first_token_seconds": readings.first_token_seconds,
        "after_torch_seconds": readings.after_torch_seconds,
        "busy_decode_tokens_per_second": readings.busy_decode,
        "busy_share": [busy / idle for busy, idle in pairs],
    }
    return {name: asdict(Spread.of(values)) for name, values in figures.items() if values}


def _ratios(ours: Readings, theirs: Readings) -> dict[str, Any]:
    """How many times faster ours is, round by round; of loading, how many times shorter."""
    found = {
        "decode": [a / b for a, b in zip(ours.decode, theirs.decode, strict=True)],
        "prefill": [a / b for a, b in zip(ours.prefill, theirs.prefill, strict=True)],
        "first_token": [b / a for a, b in zip(ours.first_token_seconds, theirs.first_token_seconds, strict=True)],
        "busy_decode": [a / b for a, b in zip(ours.busy_decode, theirs.busy_decode, strict=False)],
    }
    return {name: asdict(Spread.of(values)) for name, values in found.items() if values}


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def show(report: dict[str, Any]) -> None:
    for engine, figures in report["engines"].items():
        for name, spread in figures.items():
            print(f"{engine:13} {name:32} {spread['median']:8.2f} ({spread['low']:.2f}–{spread['high']:.2f})")
    for peer, ratios in report["ratios"].items():
        print(f"fewer over {peer}: " + ", ".join(f"{name} {each['median']:.2f}" for name, each in ratios.items()))
    memory = report["memory"]
    print(f"peak memory over import torch: {memory['fewer_over_import_torch_bytes'] / 1e6:.0f} MB", end=", ")
    print(
        f"{report['bandwidth_fraction']['median']:.0%} of {report['bandwidth_bytes_per_second']['high'] / 1e9:.1f} GB/s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="an alias or a .gguf file (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="small sizes, two rounds; writes no file unless --out")
    parser.add_argument("--rounds", type=int, help=f"(default: {Settings.rounds})")
    parser.add_argument("--out", type=Path, help="(default: benchmarks/results/peers.json)")
    options = parser.parse_args()
    chosen = QUICK if options.quick else Settings()
    settings = chosen if options.rounds is None else Settings(**{**asdict(chosen), "rounds": options.rounds})
    report = run(resolve(options.model), settings)
    out = options.out or (None if options.quick else RESULTS / "peers.json")
    if out is not None:
        write(out, report)
    show(report)


if __name__ == "__main__":
    main()
