"""A decoding step over a long text under every cache method, beside the plain cache on the same machine.

    python -m benchmarks.cache_steps                 # smollm2, 8,192 tokens

Every method reads the same text through its own prefill, then decodes; steps of all methods are timed in turns, so that
a machine that slows down slows all of them. Settings are the methods' defaults, and budgets of an eighth of the text
where a default would keep all of it. Writes `results/cache_steps.json`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import fewer
from benchmarks.records import RESULTS, write
from fewer.engine.session import Session
from fewer.errors import FewerError
from fewer.evaluation.machine import machine
from fewer.training.haystack import Haystack, filler

CACHES = (
    "full",
    "paged",
    "sink-window:window=1020",
    "duo-attention",
    "a2sf:budget=1024",
    "h2o:budget=1024",
    "tova:budget=1024",
    "snapkv:budget=1024",
    "quest",
    "tidal-decode",
    "lserve",
    "oracle-topk",
)
ROUNDS, STEPS = 5, 8


def read_text(model: fewer.LanguageModel, length: int) -> tuple[Session, int, float]:
    """A session that has read `length` tokens, the token that comes next, and the seconds that reading took."""
    haystack = Haystack(filler(sentences=length // 8), model.tokenizer)
    text = [token for piece in haystack.pieces(length - 1) for token in piece]
    session = model.session(1, length + (ROUNDS + 1) * STEPS)
    start = time.perf_counter()
    token = int(session.prefill([text])[0].argmax())
    token = next(session.greedy(token, 1))  # what evicts at a prompt's end does so now
    return session, token, time.perf_counter() - start


def seconds_a_step(session: Session, token: int) -> tuple[float, int]:
    start = time.perf_counter()
    last = list(session.greedy(token, STEPS))[-1]
    return (time.perf_counter() - start) / STEPS, last


def measure(name: str, length: int, caches: list[str]) -> dict[str, Any]:
    rows: dict[str, dict[str, Any]] = {}
    running: dict[str, tuple[Session, int]] = {}
    for cache in caches:
        try:
            model = fewer.load(name, cache=cache)
            session, token, seconds = read_text(model, length)
        except FewerError as error:
            rows[cache] = {"failure": str(error)}
            continue
        path = type(model.runner.single).__name__ if model.runner.has_fast_path(session.cache) else "general"
        rows[cache] = {"prefill_seconds": seconds, "kv_bytes": session.cache.nbytes, "path": path, "step_seconds": []}
        running[cache] = session, seconds_a_step(session, token)[1]  # the first steps choose threads
        print(f"{cache}: read in {seconds:.1f} s, {session.cache.nbytes / 1e6:.1f} MB", flush=True)
    for _ in range(ROUNDS):
        for cache, (session, token) in running.items():
            seconds, token = seconds_a_step(session, token)
            rows[cache]["step_seconds"].append(seconds)
            running[cache] = session, token
    plain = rows["full"]["step_seconds"]
    for cache in running:
        steps = rows[cache]["step_seconds"]
        rows[cache]["median_step_seconds"] = statistics.median(steps)
        rows[cache]["of_full"] = statistics.median(a / b for a, b in zip(steps, plain, strict=True))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=8000, help="length of the text (default: 8000)")
    parser.add_argument("--caches", nargs="+", default=list(CACHES))
    parser.add_argument("--out", type=Path, default=RESULTS / "cache_steps.json")
    options = parser.parse_args()
    rows = measure(options.model, options.tokens, ["full", *(each for each in options.caches if each != "full")])
    report = {"machine": machine(torch.device("cpu")), "model": options.model, "tokens": options.tokens, "caches": rows}
    write(options.out, report)
    for cache, row in rows.items():
        if "failure" in row:
            print(f"{cache:28} {row['failure']}")
            continue
        print(
            f"{cache:28} {row['median_step_seconds'] * 1e3:7.1f} ms a step, {row['of_full']:5.2f} of full, "
            f"{row['kv_bytes'] / 1e6:6.1f} MB, {row['path']}"
        )


if __name__ == "__main__":
    main()
