"""Selection of keys at decode on real models: what is found, what it costs, and what earlier layers know of later ones.

    python -m benchmarks.cache_tidal_decode

- `retrieval`: a passkey in a text. The text is prefilled once; the question and the answer are then fed token by token
  through each cache, so that every token after the text is read by selection. Caches that drop keys prefill it again.
- `reselection`: the same with one text, for every layer that may select again.
- `overlap`: what the shipped adapters say of every layer's best tokens.
- `time`: CPU time of a decoding step over caches filled with random keys, one thread, and the slope over their length.
- `correction`: how far keys of sparsely generated tokens are from those of a dense prefill, before and after.

Writes `results/cache_tidal_decode.json`.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.records import RESULTS, read, write
from fewer.cache import FullCache
from fewer.cache.selected import SelectedCache
from fewer.engine.runner import Runner
from fewer.engine.session import Session
from fewer.evaluation.machine import machine
from fewer.evaluation.perplexity import surprise
from fewer.language_model import LanguageModel, load
from fewer.recipe import Recipe
from fewer.training.haystack import Haystack, filler
from fewer.training.passkeys import CLOSING, hidden_answer, question

BUDGETS = (64, 128, 256)
SELECTING = ("tidal-decode", "tidal-decode:reselect=none", "quest", "oracle-topk", "random-topk")
Results = dict[str, Any]


def with_budget(spec: str, budget: int) -> str:
    return f"{spec}{',' if ':' in spec else ':'}budget={budget}"


def recipes() -> list[str]:
    """The caches that are compared: full, those that select, and those that drop what does not fit the budget."""
    found = ["full", *(with_budget(spec, budget) for budget in BUDGETS for spec in SELECTING)]
    return found + [f"sink-window:sinks=4,window={budget - 4}" for budget in BUDGETS[-1:]]


# ── retrieval ────────────────────────────────────────────────────────────────────────────────────────────────────────


def texts(model: LanguageModel, count: int, length: int, words: int, seed: int = 0) -> Iterator[tuple[list[int], ...]]:
    """(the text with its passkey, the question, the answer) in tokens."""
    haystack = Haystack(filler(), model.tokenizer)
    for number in range(count):
        generator = random.Random(f"{seed}/{number}")
        asked = question("passkey", generator, words)
        depth = (number + 0.5) / count
        whole = hidden_answer(haystack, asked, depth, length, generator.randrange(len(haystack)))
        cue = len(model.tokenizer.encode(CLOSING + asked.cue, bos=False))
        yield whole.prompt[:-cue], whole.prompt[-cue:], whole.answer


@torch.inference_mode()
def retrieval(model: LanguageModel, count: int, length: int, words: int) -> Results:
    """Nats a token of the answer, and the share of its tokens that are the most likely ones: for each cache."""
    found: dict[str, list[tuple[float, float]]] = {spec: [] for spec in recipes()}
    for text, cue, answer in texts(model, count, length, words):
        prefilled = FullCache(model.config, 1, length, model.transformer.dtype, model.transformer.device)
        Session(model.runner, prefilled, model.context_length).prefill([text])
        for spec, scores in found.items():
            session = model.with_recipe(Recipe(cache=spec)).session(1, length)
            if isinstance(session.cache, SelectedCache):
                session.cache.adopt(prefilled)
            else:
                session.prefill([text])
            scores.append(score(session, cue, answer))
    return {
        spec: {
            "nll": sum(nll for nll, _ in scores) / count,
            "most_likely": sum(share for _, share in scores) / count,
        }
        for spec, scores in found.items()
    }


@torch.inference_mode()
def reselection(model: LanguageModel, length: int = 1024, words: int = 4, budget: int = 128) -> Results:
    """How much the answer hangs on the layer that selects again: nats a token of one text's answer, for each r."""
    ((text, cue, answer),) = texts(model, 1, length, words, seed=1)
    prefilled = FullCache(model.config, 1, length, model.transformer.dtype, model.transformer.device)
    Session(model.runner, prefilled, model.context_length).prefill([text])
    choices = ["none", *map(str, range(3, model.config.layers - 1))]
    found: Results = {"length": length, "words": words, "budget": budget}
    for spec in (f"quest:budget={budget}", *(f"tidal-decode:budget={budget},reselect={r}" for r in choices)):
        session = model.with_recipe(Recipe(cache=spec)).session(1, length)
        assert isinstance(session.cache, SelectedCache)
        session.cache.adopt(prefilled)
        found[spec] = round(score(session, cue, answer)[0], 3)
    return found


def score(session: Session, cue: list[int], answer: list[int]) -> tuple[float, float]:
    """Feeds the question and the answer one token at a time: (mean nats a token, share of tokens on top)."""
    for token in cue:
        logits = session.decode([token])
    total, hits = 0.0, 0
    for token in answer:
        total += float(surprise(logits, [token]))
        hits += int(logits.argmax()) == token
        logits = session.decode([token])
    return total / len(answer), hits / len(answer)


# ── what layers know of each other ───────────────────────────────────────────────────────────────────────────────────


def overlap(model: LanguageModel) -> Results:
    """From the adapter: mean overlap of two layers' best tokens by their distance, and recall by re-selection layer."""
    adapter = model.with_recipe(Recipe(cache="tidal-decode")).choices["cache"].method.target.keywords["adapter"]
    matrix: Tensor = adapter.tensors["overlap"]
    first = adapter.provenance.config["start"]
    known = matrix[first:, first:]
    return {
        "fitted_with": dict(adapter.provenance.config),
        "reselect": adapter.tensors["reselect"].tolist(),
        "held_out": dict(adapter.provenance.metrics),
        "recall": [round(value, 4) for value in adapter.tensors["recall"].tolist()],
        "by_distance": {str(gap): round(float(known.diagonal(gap).mean()), 4) for gap in (1, 2, 4, 8, 12, 16, 20)},
    }


# ── time ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@torch.inference_mode()
def step_seconds(model: LanguageModel, spec: str, length: int, repeats: int, in_c: bool = False) -> float:
    """The least CPU time of a step over `length` random keys, on the general path unless `in_c`."""
    runner = Runner(model.transformer)
    if not in_c:
        runner.single = None  # the step in C serves `full` alone
    session = Session(runner, model.with_recipe(Recipe(cache=spec)).new_cache(1, length + 8), model.context_length)
    filled = FullCache(model.config, 1, length, model.transformer.dtype, model.transformer.device)
    filled.pools[0].copy_(torch.randn(filled.pools[0].shape, generator=torch.Generator().manual_seed(0)))
    filled.maps[0].table[0] = torch.arange(length)
    filled.maps[0].counts, filled.committed = [length], [length]
    if isinstance(session.cache, SelectedCache):
        session.cache.adopt(filled)
    else:
        session.cache = filled
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()
        session.decode([1])
        times.append(time.process_time() - start)
        session.rollback([length])
    return min(times[1:])


def timing(model: LanguageModel, lengths: list[int], repeats: int) -> Results:
    specs = ["full", "tidal-decode:budget=256", "tidal-decode:budget=256,sets=key-head", "quest:budget=256"]
    found: Results = {}
    for name in (*specs, "full, in C"):
        spec, in_c = name.removesuffix(", in C"), name.endswith(", in C")
        seconds = [step_seconds(model, spec, length, repeats, in_c) for length in lengths]
        found[name] = {
            "milliseconds": {str(length): round(1e3 * one, 2) for length, one in zip(lengths, seconds, strict=True)},
            "milliseconds_per_1000_tokens": round(1e6 * slope(lengths, seconds), 3),
        }
    dense = found["full"]["milliseconds_per_1000_tokens"]
    for each in found.values():
        each["slope_of_full"] = round(each["milliseconds_per_1000_tokens"] / dense, 3)
    found["dense_layers_of_all"] = round(4 / model.config.layers, 3)
    return found


def slope(lengths: list[int], seconds: list[float]) -> float:
    """Least squares: seconds a token."""
    x, y = torch.tensor(lengths, dtype=torch.float64), torch.tensor(seconds, dtype=torch.float64)
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


# ── correction ───────────────────────────────────────────────────────────────────────────────────────────────────────


@torch.inference_mode()
def correction(model: LanguageModel, prompt: int = 512, tokens: int = 64, budget: int = 64) -> Results:
    """Relative L2 distance of the generated tokens' keys and values to a dense prefill of them, before and after."""
    text = model.tokenizer.encode(filler())[: prompt + tokens + 1]
    spec = f"tidal-decode:budget={budget},correct_every={tokens}"
    dense, sparse = model.session(1, prompt + tokens), model.with_recipe(Recipe(cache=spec)).session(1, prompt + tokens)
    for session in (dense, sparse):
        session.prefill([text[:prompt]])
    dense.prefill([text[prompt:-1]])
    for token in text[prompt:-1]:
        sparse.decode([token])
    before = distance(sparse, dense, prompt, tokens)
    sparse.decode([text[-1]])
    return {"before": before, "after": distance(sparse, dense, prompt, tokens), "prompt": prompt, "tokens": tokens}


def distance(one: Session, other: Session, start: int, tokens: int) -> float:
    parts: list[Tensor] = []
    for session in (one, other):
        cache = session.cache
        assert isinstance(cache, (FullCache, SelectedCache))
        parts.append(cache.pools[0][..., start : start + tokens, :].float())
    return float((parts[0] - parts[1]).norm() / parts[1].norm())


PARTS = ("overlap", "correction", "time", "retrieval", "reselection")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2"])
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, help="the others stay as they were measured"
    )
    parser.add_argument("--texts", type=int, default=4, help="with a passkey")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a text, its question and its answer")
    parser.add_argument("--words", type=int, default=6, help="of a passkey")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8000], help="of the timed caches")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps, of which the fastest counts")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    report: Results = read("cache_tidal_decode", options.out) or {}
    for name in options.models:
        model = load(name)
        dtype = str(model.transformer.dtype).removeprefix("torch.")
        own = report.setdefault(name, {}) | {"environment": machine(), "layers": model.config.layers, "dtype": dtype}
        report[name] = own
        if "overlap" in options.parts:
            own["overlap"] = overlap(model)
        if "correction" in options.parts:
            own["correction"] = correction(model)
        if "time" in options.parts:
            own["time"] = {"repeats": options.repeats, **timing(model, options.lengths, options.repeats)}
        if "retrieval" in options.parts:
            about = {"texts": options.texts, "length": options.length, "words": options.words}
            own["retrieval"] = about | {"caches": retrieval(model, options.texts, options.length, options.words)}
        if "reselection" in options.parts:
            own["reselection"] = reselection(model)
        write(options.out / "cache_tidal_decode.json", report)


if __name__ == "__main__":
    main()
