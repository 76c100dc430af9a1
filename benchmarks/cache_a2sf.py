"""Eviction by attention score (a2sf, h2o, tova, snapkv) beside windows and chance, on real models on the CPU.

    python -m benchmarks.cache_a2sf

- perplexity of one text, every token evicting (`mode=stepwise`), at equal budgets;
- a passkey in a prompt that is attended to whole and then cut to the budget, at several depths;
- what the forgetting factor is for: the rank correlation of a key's score with its position, without the first four;
- whether token 0 stays without being told to;
- time of a step and bytes of keys and values, at several lengths.

Random eviction and sums divided by a key's age (the other cure for the bias to old tokens) are defined here. Writes
`results/cache_a2sf.json` after every row; parts that are not asked for stay as they were measured.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fewer
from benchmarks.records import RESULTS, read, write
from fewer.cache.a2sf import A2sfCache, A2sfConfig
from fewer.cache.h2o import H2OCache, H2OConfig
from fewer.cache.scored import ScoredCache
from fewer.evaluation.machine import machine
from fewer.evaluation.needle import Cell, NeedleSettings, needle
from fewer.evaluation.perplexity import perplexity
from fewer.language_model import LanguageModel
from fewer.recipe import Recipe
from fewer.registry import method
from fewer.training.haystack import Haystack, filler

ALPHAS = (0.0, 0.2, 0.5, 0.9)
BIAS_ALPHAS = (0.1, 0.3, 0.5, 0.9, 1.0)
SINKS = 4  # first tokens that say nothing about age


class RandomEviction(A2sfCache):
    """Any key may go."""

    def importance(self, scores: Tensor, ages: Tensor) -> Tensor:
        return torch.rand_like(scores)


class MeanAttention(H2OCache):
    """H2O's sums divided by the number of queries that have seen the key."""

    def importance(self, scores: Tensor, ages: Tensor) -> Tensor:
        return scores / ages.clamp(min=1)


def register_baselines() -> None:
    method("random-eviction", slot="cache", lossless=False, config=A2sfConfig)(RandomEviction)
    method("mean-attention", slot="cache", lossless=False, config=H2OConfig)(MeanAttention)


def policies(budget: int, mode: str) -> Iterator[tuple[str, str]]:
    """(name, spec) of everything that holds `budget` keys."""
    yield "window", f"sink-window:sinks=0,window={budget}"
    yield "sinks and window", f"sink-window:sinks={SINKS},window={budget - SINKS}"
    yield "random", f"random-eviction:budget={budget},mode={mode}"
    yield "h2o", f"h2o:budget={budget},mode={mode}"
    yield "mean attention", f"mean-attention:budget={budget},mode={mode}"
    yield "tova", f"tova:budget={budget},mode={mode}"
    for alpha in ALPHAS:
        yield f"a2sf {alpha}", f"a2sf:budget={budget},alpha={alpha},mode={mode}"
    if mode == "prefill-then-evict":
        yield "snapkv", f"snapkv:budget={budget}"


def with_cache(model: LanguageModel, spec: str) -> LanguageModel:
    torch.manual_seed(0)  # random eviction draws
    return model.with_recipe(Recipe(cache=spec))


def measure_perplexity(model: LanguageModel, text: str, tokens: int, budgets: list[int]) -> Iterator[dict[str, Any]]:
    for budget in (None, *budgets):
        for name, spec in [("full", "full")] if budget is None else policies(budget, "stepwise"):
            start = time.perf_counter()
            found = perplexity(with_cache(model, spec), text, window=tokens, limit=tokens)
            seconds = round(time.perf_counter() - start, 1)
            yield {"policy": name, "budget": budget, "perplexity": found.perplexity, "scored": found.tokens,
                   "seconds": seconds}  # fmt: skip


def measure_passkey(
    model: LanguageModel, length: int, depths: list[float], budgets: list[int]
) -> Iterator[dict[str, Any]]:
    haystack = Haystack(filler(), model.tokenizer)
    settings = NeedleSettings(lengths=(length,), depths=tuple(depths), words=4)
    for budget in (None, *budgets):
        for name, spec in [("full", "full")] if budget is None else policies(budget, "prefill-then-evict"):
            cell = Cell.of(list(needle(with_cache(model, spec), haystack, settings)))
            assert cell is not None
            yield {"policy": name, "budget": budget, "exact": cell.exact, "nll": cell.nll, "trials": cell.trials,
                   "kv_bytes": cell.kv_bytes}  # fmt: skip


def after_prompt(model: LanguageModel, spec: str, prompt: list[int]) -> ScoredCache:
    """The cache when the prompt and one more token have been fed."""
    session = with_cache(model, spec).session(1, len(prompt) + 8)
    logits = session.prefill([prompt])
    session.decode([int(logits.argmax())])
    assert isinstance(session.cache, ScoredCache)
    session.cache.positions(0)  # settles what a fast path has left
    return session.cache


def measure_age(model: LanguageModel, prompt: list[int], budget: int) -> Iterator[dict[str, Any]]:
    for alpha in BIAS_ALPHAS:
        scores = after_prompt(model, f"a2sf:budget={2 * len(prompt)},alpha={alpha}", prompt).scores
        held = scores[:, 0, :, SINKS : len(prompt)].flatten(0, 1).double()
        ranks = held.argsort(-1).argsort(-1).double()
        position = torch.arange(ranks.shape[1]).double()
        found = [float(torch.corrcoef(torch.stack((row, position)))[0, 1]) for row in ranks]
        cache = after_prompt(model, f"a2sf:budget={budget},alpha={alpha}", prompt)
        heads = [(layer.index, head) for layer in cache.scored for head in range(model.config.kv_heads)]
        first = [int(cache.positions(0, layer, head)[0]) == 0 for layer, head in heads]
        yield {"alpha": alpha, "rank_correlation": statistics.mean(found), "lowest": min(found), "highest": max(found),
               "keeps_token_0": sum(first) / len(first), "budget": budget}  # fmt: skip


def measure_steps(model: LanguageModel, text: list[int], lengths: list[int], budget: int) -> Iterator[dict[str, Any]]:
    """All policies and lengths take turns, so that whatever else runs on the machine slows all of them."""
    specs = {"full": "full", **{name: f"{name}:budget={budget}" for name in ("a2sf", "h2o", "tova", "snapkv")}}
    sessions, prefills = {}, {}
    for length in lengths:
        for name, spec in specs.items():
            session = sessions[name, length] = with_cache(model, spec).session(1, length + 64)
            start = time.perf_counter()
            session.prefill([text[:length]])
            prefills[name, length] = time.perf_counter() - start
    times: dict[tuple[str, int], list[float]] = {which: [] for which in sessions}
    for token in text[max(lengths) : max(lengths) + 45]:
        for which, session in sessions.items():
            start = time.perf_counter()
            session.decode([token])
            times[which].append(1000 * (time.perf_counter() - start))
    for (name, length), session in sessions.items():
        steps = times[name, length][5:]  # the first one cuts the prompt
        yield {
            "policy": name, "tokens": length, "prefill_seconds": prefills[name, length],
            "step_ms": statistics.median(steps), "fastest_ms": min(steps), "kv_bytes": session.cache.nbytes,
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2"], metavar="NAME")
    parser.add_argument("--text", type=Path, help="for perplexity (default: the built-in haystack)")
    parser.add_argument("--tokens", type=int, default=1024, help="of the text (default: %(default)s)")
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 256], help="keys a head (default: 64 256)")
    parser.add_argument("--passkey-budgets", type=int, nargs="+", default=[128], help="(default: 128)")
    parser.add_argument("--passkey-length", type=int, default=640, help="tokens (default: %(default)s)")
    parser.add_argument("--depths", type=float, nargs="+", default=[0.2, 0.5, 0.8])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048], help="for step times")
    parser.add_argument("--parts", nargs="+", default=["perplexity", "passkey", "age", "steps"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS / "cache_a2sf.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    register_baselines()
    text = filler() if options.text is None else options.text.read_text(encoding="utf-8")
    report: dict[str, Any] = read(options.out.stem, options.out.parent) or {"runs": [], "models": {}}
    report["runs"].append(
        {
            "parts": options.parts,
            "machine": machine(torch.device("cpu")),
            "text": "built-in haystack" if options.text is None else options.text.name,
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "tokens": options.tokens,
            "passkey": {"tokens": options.passkey_length, "depths": options.depths, "words": 4},
        }
    )
    for name in options.models:
        model = fewer.load(name, device="cpu")
        tokens = model.tokenizer.encode(text)
        parts = {
            "perplexity": measure_perplexity(model, text, options.tokens, options.budgets),
            "passkey": measure_passkey(model, options.passkey_length, options.depths, options.passkey_budgets),
            "age": measure_age(model, tokens[: options.tokens], options.budgets[0]),
            "steps": measure_steps(model, tokens, options.lengths, options.budgets[-1]),
        }
        found = report["models"].setdefault(name, {})
        found["dtype"] = str(model.transformer.dtype).removeprefix("torch.")
        for part in options.parts:
            found[part] = []
            for row in parts[part]:
                found[part].append(row)
                write(options.out, report)
                print(name, part, row, flush=True)


if __name__ == "__main__":
    main()
