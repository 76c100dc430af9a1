"""DuoAttention on a real model on the CPU: what its gates are worth, what it saves, and how much faster a step gets.

    python -m benchmarks.cache_duo_attention

- the gates of the model's adapter: how they are spread, and what training left of the distance;
- a passkey at equal tokens held: gates learnt, by lot, inverted, from profiles; windows and H2O in all heads;
- perplexity of a text and the passkey's negative log-likelihood as more heads stream;
- bytes of keys and values against the formula 2·b·D·(ΣHf·T + ΣHs·(sinks + window));
- time of a decoding step over caches that hold T tokens, and the share of attention's time that is left.

Writes `results/cache_duo_attention.json` after every row.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fewer
from benchmarks.records import RESULTS, write
from fewer.cache import DuoAttentionCache
from fewer.cache.gate_profile import profiled_gates
from fewer.cache.head_gates import GATES, inverted_gates, random_gates, streaming_share
from fewer.engine.session import Session
from fewer.evaluation.machine import machine
from fewer.evaluation.needle import Cell, NeedleSettings, needle
from fewer.evaluation.perplexity import perplexity
from fewer.language_model import LanguageModel
from fewer.recipe import Recipe
from fewer.registry import parse_spec
from fewer.training import Adapter, Haystack, Provenance, save_adapter
from fewer.training.adapter_store import find_adapter
from fewer.training.haystack import filler

SINKS, WINDOW = 32, 64  # what the shipped gates were learnt with
STEPS = 24  # decoding steps of a timing
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of heads that stream


def spec(sparsity: float, gates: Path | None = None) -> str:
    named = "" if gates is None else f",adapter={gates}"
    return f"duo-attention:sparsity={sparsity},sinks={SINKS},window={WINDOW}{named}"


def with_cache(model: LanguageModel, cache: str) -> LanguageModel:
    return model.with_recipe(Recipe(cache=cache))


def gate_files(model: LanguageModel, learnt: Tensor, seeds: int, folder: Path) -> dict[str, Path]:
    """Baselines as adapters: what is chosen is all that differs."""
    choices = {"profile": profiled_gates(model, filler()), "inverted": inverted_gates(learnt)}
    choices |= {f"random {seed}": random_gates(model.config, seed) for seed in range(seeds)}
    origin = Provenance("duo-attention", {}, model.checkpoint.fingerprint(), "none", 0)
    paths = {}
    for name, gates in choices.items():
        paths[name] = folder / f"{name.replace(' ', '-')}.safetensors"
        save_adapter(paths[name], Adapter({GATES: gates}, origin))
    return paths


def measure_gates(adapter: Adapter) -> Iterator[dict[str, Any]]:
    gates = adapter.tensors[GATES]
    edges = torch.histc(gates, 10, 0, 1).int().tolist()
    yield {
        "heads": gates.numel(),
        "tenths": edges,  # heads whose gate is in [0, 0.1), [0.1, 0.2), …
        "between": float(((gates > 0.1) & (gates < 0.9)).float().mean()),
        "means_by_third_of_layers": [float(part.mean()) for part in gates.chunk(3)],
        "fitted_with": dict(adapter.provenance.config),
        **adapter.provenance.metrics,
    }


def score(model: LanguageModel, cache: str, settings: NeedleSettings) -> dict[str, Any]:
    start = time.perf_counter()
    cell = Cell.of(list(needle(with_cache(model, cache), Haystack(filler(), model.tokenizer), settings)))
    assert cell is not None
    return {"exact": cell.exact, "nll": cell.nll, "trials": cell.trials, "kv_bytes": cell.kv_bytes,
            "seconds": round(time.perf_counter() - start, 1)}  # fmt: skip


def measure_passkey(
    model: LanguageModel, files: dict[str, Path], sparsities: Sequence[float], settings: NeedleSettings
) -> Iterator[dict[str, Any]]:
    """At the same tokens held: (1 - sparsity)·T + sparsity·(sinks + window) a head."""
    yield {"policy": "full", "sparsity": 0.0, **score(model, "full", settings)}
    (length,) = settings.lengths
    for sparsity in sparsities:
        budget = round((1 - sparsity) * length + sparsity * (SINKS + WINDOW))
        rows = {"learnt": spec(sparsity), **{name: spec(sparsity, path) for name, path in files.items()}}
        rows["sinks and window"] = f"sink-window:sinks={SINKS},window={budget - SINKS}"
        rows["h2o"] = f"h2o:budget={budget}"
        for name, cache in rows.items():
            yield {"policy": name, "sparsity": sparsity, "held": budget, **score(model, cache, settings)}


def measure_shares(model: LanguageModel, tokens: int, settings: NeedleSettings) -> Iterator[dict[str, Any]]:
    for sparsity in SHARES:
        found = perplexity(with_cache(model, spec(sparsity)), filler(1), window=tokens, limit=tokens)
        passkey = score(model, spec(sparsity), settings)
        yield {"sparsity": sparsity, "perplexity": found.perplexity, "nll": found.nll, "scored": found.tokens,
               "passkey_nll": passkey["nll"], "passkey_exact": passkey["exact"]}  # fmt: skip


def filled(model: LanguageModel, cache: str, tokens: int) -> Session:
    """A session whose cache holds noise as if it had read `tokens` tokens."""
    found = with_cache(model, cache).new_cache(1, tokens + STEPS + 8)
    kinds = [pool.slots for pool in found.pools] if isinstance(found, DuoAttentionCache) else found.maps  # type: ignore[attr-defined]
    stores = [pool.storage for pool in found.pools] if isinstance(found, DuoAttentionCache) else found.pools  # type: ignore[attr-defined]
    for slots, store in zip(kinds, stores, strict=True):
        count = tokens if slots.window is None else min(tokens, slots.sinks + slots.window)
        positions = torch.arange(tokens)
        slots.table[0, :count] = torch.cat(
            (positions[: min(slots.sinks, count)], positions[tokens - count + slots.sinks :])
        )[:count]
        slots.counts[0] = count
        store[..., :count, :].normal_(std=0.5)
    found.committed[0] = tokens  # type: ignore[attr-defined]
    return Session(model.runner, found, tokens + STEPS + 8)


def measure_steps(model: LanguageModel, lengths: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Steps in turn, so that whatever else runs slows all of them; the fastest quarter's mean."""
    caches = {"full": "full", **{f"duo {share}": spec(share) for share in (0.5, 0.75, 1.0)}}
    for length in lengths:
        sessions = {name: filled(model, cache, length) for name, cache in caches.items()}
        times: dict[str, list[float]] = {name: [] for name in sessions}
        for step in range(STEPS):
            for name, session in sessions.items():
                start = time.perf_counter()
                session.decode([step + 5])
                times[name].append(1000 * (time.perf_counter() - start))
        for name, session in sessions.items():
            cache, config = session.cache, model.config
            width = torch.finfo(model.transformer.dtype).bits // 8
            row = {"policy": name, "tokens": length, "step_ms": statistics.mean(sorted(times[name][4:])[: STEPS // 4]),
                   "kv_bytes": cache.nbytes}  # fmt: skip
            if isinstance(cache, DuoAttentionCache):
                full = int(cache.retrieval.sum())
                short = cache.retrieval.numel() - full
                held = full * length + short * min(length, SINKS + WINDOW)
                row |= {
                    "streaming": streaming_share(cache.retrieval, config),
                    "formula": 2 * width * config.head_dim * held,
                }
            yield row


def shares_of_attention(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What a step costs beyond one of streaming heads alone, as a share of what the full cache costs beyond it.
    Policies take turns within a length, so this holds where the machine's speed drifts between lengths."""
    for length in dict.fromkeys(row["tokens"] for row in rows):
        of = {row["policy"]: row for row in rows if row["tokens"] == length}
        floor, full = of["duo 1.0"]["step_ms"], of["full"]
        for name, row in of.items():
            time_left = (row["step_ms"] - floor) / (full["step_ms"] - floor)
            yield {"policy": name, "tokens": length, "time": time_left, "bytes": row["kv_bytes"] / full["kv_bytes"],
                   "speedup": full["step_ms"] / row["step_ms"]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", metavar="NAME")
    parser.add_argument("--length", type=int, default=768, help="tokens of a passkey's text (default: %(default)s)")
    parser.add_argument("--depths", type=float, nargs="+", default=[0.15, 0.4, 0.65])
    parser.add_argument("--samples", type=int, default=1, help="texts a depth (default: %(default)s)")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5], help="(default: 0.5)")
    parser.add_argument("--seeds", type=int, default=2, help="of gates by lot (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=768, help="of the text for perplexity (default: %(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384], help="for step times")
    parser.add_argument("--parts", nargs="+", default=["gates", "steps", "passkey", "shares"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS / "cache_duo_attention.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = fewer.load(options.model, device="cpu")
    adapter = find_adapter(parse_spec("cache", "duo-attention"), model.checkpoint)
    settings = NeedleSettings((options.length,), tuple(options.depths), options.samples, words=4)
    report: dict[str, Any] = {
        "machine": machine(torch.device("cpu")),
        "model": options.model,
        "dtype": str(model.transformer.dtype).removeprefix("torch."),
        "sinks": SINKS,
        "window": WINDOW,
        "passkey": {"length": options.length, "depths": options.depths, "samples": options.samples, "words": 4},
        "text": {"name": "built-in haystack, seed 1", "sha256": hashlib.sha256(filler(1).encode()).hexdigest()},
    }
    with tempfile.TemporaryDirectory() as folder:
        files = gate_files(model, adapter.tensors[GATES], options.seeds, Path(folder))
        parts = {
            "gates": measure_gates(adapter),
            "steps": measure_steps(model, options.lengths),
            "passkey": measure_passkey(model, files, options.sparsities, settings),
            "shares": measure_shares(model, options.tokens, settings),
        }
        for part in options.parts:
            report[part] = []
            for row in parts[part]:
                report[part].append(row)
                write(options.out, report)
                print(part, row, flush=True)
    if "steps" in report:
        report["shares_of_attention"] = list(shares_of_attention(report["steps"]))
    write(options.out, report)


if __name__ == "__main__":
    main()
