"""LServe on real models: what chosen pages catch of attention, whether a passkey is still known, time and memory.

    python -m benchmarks.cache_lserve

- `mass`: the share of true attention that chosen pages hold (`benchmarks.cache_lserve_mass`).
- `passkey`: a text is prefilled once with full attention. The question and the answer are then fed token by token
  through each cache, which takes over the keys of the text.
- `time`: CPU time of one layer's decoding step over random keys, one thread, by the length of the text.
- `memory`: bytes allocated for a text.
- `rounding`: nats a token of a text whose keys and values are stored in fewer bits.

Writes `results/cache_lserve.json`.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cache_lserve_mass import mass
from benchmarks.records import RESULTS, write
from fewer.cache import FullCache, LServeCache, LServeConfig
from fewer.cache.head_gates import gates_of, inverted_gates, random_gates
from fewer.cache.page_statistics import choose_pages, physical_scores
from fewer.cache.quantised_pages import Bits, RowLayout
from fewer.cache.retrieval_pages import PageChoice, RetrievalPages
from fewer.engine.session import Session
from fewer.errors import CheckpointError
from fewer.evaluation.machine import machine
from fewer.evaluation.perplexity import surprise
from fewer.language_model import LanguageModel, load
from fewer.model.step import Step
from fewer.registry import parse_spec
from fewer.training.adapter_store import find_adapter
from fewer.training.adapters import Adapter, Provenance
from fewer.training.haystack import Haystack, filler
from fewer.training.passkeys import CLOSING, hidden_answer, question

Results = dict[str, Any]
CPU = torch.device("cpu")


def passkey_text(model: LanguageModel, length: int, number: int, of: int) -> tuple[list[int], list[int], list[int]]:
    """(the text with its passkey, the question, the answer) in tokens."""
    haystack, generator = Haystack(filler(), model.tokenizer), random.Random(f"lserve/{number}")
    asked = question("passkey", generator, 4)
    whole = hidden_answer(haystack, asked, (number + 0.5) / of, length, generator.randrange(len(haystack)))
    cue = len(model.tokenizer.encode(CLOSING + asked.cue, bos=False))
    return whole.prompt[:-cue], whole.prompt[-cue:], whole.answer


# ── the passkey ──────────────────────────────────────────────────────────────────────────────────────────────────────


def settings_for(length: int) -> dict[str, tuple[str, LServeConfig]]:
    """name -> (which gates, settings). A budget of an eighth of the text, or the same for all lengths."""

    def of(**changes: Any) -> LServeConfig:
        return LServeConfig(
            **{"sparsity": 0.0, "budget": max(96, length // 8), "page_size": 32, "sinks": 16, "window": 64} | changes
        )

    half = {"sparsity": 0.5}
    return {
        "everything": ("none", of(budget=2 * length)),
        "pages 32/16": ("none", of()),
        "pages 32/16, chosen every step": ("none", of(interval=1)),
        "pages 32/16 for a key head": ("none", of(sets="key-head")),
        "pages 16/16": ("none", of(page_size=16)),
        "pages 32/32": ("none", of(logical_size=32)),
        "pages 32/16, 256 tokens": ("none", of(budget=256)),
        "8 bits": ("none", of(budget=2 * length, bits=8)),
        "4 bits": ("none", of(budget=2 * length, bits=4)),
        "half of the heads stream": ("learnt", of(budget=2 * length, **half)),
        "half stream, random gates": ("random", of(budget=2 * length, **half)),
        "half stream, inverted gates": ("inverted", of(budget=2 * length, **half)),
        "all heads stream": ("random", of(sparsity=1.0)),
        "half stream, pages, 8 bits": ("learnt", of(bits=8, **half)),
    }


def gates(model: LanguageModel) -> dict[str, Tensor]:
    """Those that duo-attention learnt, where there are any, and what they are compared with."""
    found = {"none": torch.ones(model.config.layers, model.config.kv_heads), "random": random_gates(model.config)}
    try:
        learnt = gates_of(find_adapter(parse_spec("cache", "lserve"), model.checkpoint), model.config)
    except CheckpointError:
        return found
    return found | {"learnt": learnt, "inverted": inverted_gates(learnt)}


def full_session(model: LanguageModel, length: int) -> Session:
    cache = FullCache(model.config, 1, length, model.transformer.dtype, model.transformer.device)
    return Session(model.runner, cache, model.context_length)


def taking_over(model: LanguageModel, text: Session, settings: LServeConfig, alpha: Tensor) -> Session:
    """A session over LServe's cache with the keys of a text that full attention has read, as LServe's own prefill makes
    them while its prefill window holds the text."""
    length, transformer = text.lengths[0], model.transformer
    adapter = Adapter({"gates": alpha}, Provenance("duo-attention", {}, "", "", 0))
    cache = LServeCache(model.config, 1, length, transformer.dtype, transformer.device, settings, adapter=adapter)
    cache.begin(Step(torch.zeros(1, length, dtype=torch.int64), torch.arange(length)[None]))
    assert isinstance(text.cache, FullCache) and settings.prefill_window >= length
    for index, (ours, theirs) in enumerate(zip(cache.layers, text.cache.layers, strict=True)):
        k, v = theirs.keys[:, :, :length], theirs.values[:, :, :length]
        retrieval, streaming = ours.parts
        if retrieval is not None:
            cache.pages.write(index, k[:, retrieval[1]], v[:, retrieval[1]])
        if streaming is not None:
            ours.ring.write(ours.span, k[:, streaming[1]], v[:, streaming[1]])
    cache.commit([length])
    return Session(model.runner, cache, model.context_length)


@torch.inference_mode()
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


def texts(model: LanguageModel, length: int, count: int) -> tuple[Results, Results]:
    """(passkeys, mass of the first text) at one length."""
    alphas, shares = gates(model), dict[str, Any]()
    scores: dict[str, list[tuple[float, float, int]]] = {}
    for number in range(count):
        text, cue, answer = passkey_text(model, length, number, count)
        session = full_session(model, length)
        session.prefill([text])
        if number == 0:
            shares = mass(session, [*cue, *answer], (max(128, length // 8), max(256, length // 4)))
        for name, (which, settings) in settings_for(length).items():
            if which in alphas:
                ours = taking_over(model, session, settings, alphas[which])
                scores.setdefault(name, []).append((*score(ours, cue, answer), ours.cache.nbytes))
    passkeys = {
        name: {
            "nll": round(sum(nll for nll, _, _ in found) / count, 4),
            "most_likely": round(sum(share for _, share, _ in found) / count, 4),
            "kv_bytes": found[0][2],
        }
        for name, found in scores.items()
    }
    return passkeys, shares


# ── time, memory, rounding ───────────────────────────────────────────────────────────────────────────────────────────


def seconds(work: Callable[[], object], steps: int) -> float:
    """CPU seconds of one call, the median of three runs of `steps`."""
    work()
    runs = []
    for _ in range(3):
        start = time.process_time()
        for _ in range(steps):
            work()
        runs.append((time.process_time() - start) / steps)
    return sorted(runs)[1]


@torch.inference_mode()
def step_times(heads: int, kv_heads: int, head_dim: int, lengths: list[int], budget: int) -> Results:
    """Microseconds of one layer's step in bfloat16, by length: everything, chosen pages, and choosing alone."""
    found: Results = {}
    for length in lengths:
        row: Results = {}
        ways: list[tuple[str, int, int, Bits, bool]] = [
            ("everything", 2 * length, 4, 16, False),
            ("everything, 8 bits", 2 * length, 4, 8, False),
            ("pages, every 1", budget, 1, 16, False),
            ("pages, every 4", budget, 4, 16, False),
            ("pages, every 16", budget, 16, 16, False),
            ("pages for a key head, every 4", budget, 4, 16, True),
            ("pages, every 4, 8 bits", budget, 4, 8, False),
        ]
        for name, limit, interval, bits, shared in ways:
            layout = RowLayout(head_dim, bits, torch.bfloat16)
            choice = PageChoice(64, 16, limit, interval, shared)
            pages = RetrievalPages(1, [kv_heads], layout, choice, length + 128, CPU)
            count = length - 128
            pages.begin([0], [count], torch.arange(count)[None], decodes=False)
            pages.write(0, *torch.randn(2, 1, kv_heads, count, head_dim, dtype=torch.bfloat16))
            pages.commit([count])
            counts, new = [count], torch.randn(3, 1, heads, 1, head_dim, dtype=torch.bfloat16)

            def step(pages: RetrievalPages = pages, counts: list[int] = counts, new: Tensor = new) -> None:
                pages.begin(counts, [1], torch.tensor([counts]), decodes=True)
                pages.attend(0, new[0], new[1, :, :kv_heads], new[2, :, :kv_heads], head_dim**-0.5, 0.0)
                counts[0] += 1
                pages.commit(counts)

            row[name] = round(1e6 * seconds(step, 16), 1)
            if name == "pages, every 1":
                table, lengths_now = pages.pool.table, torch.tensor(counts)

                def choose(pages: RetrievalPages = pages, q: Tensor = new[0, :, :, 0]) -> None:
                    scores = pages.statistics[0].upper_bounds(0, q, table, lengths_now)  # noqa: B023
                    choose_pages(physical_scores(scores, 4), lengths_now, 64, choice.pages)  # noqa: B023

                row["choosing alone"] = round(1e6 * seconds(choose, 16), 1)
        found[str(length)] = row
    return found


def memory(model: LanguageModel, length: int) -> Results:
    """Bytes allocated for one text of this length and one generated token; rings take what `window` says."""
    config, dtype = model.config, model.transformer.dtype
    full = FullCache(config, 1, length + 1, dtype, CPU)
    found = {"full": full.nbytes}
    adapter = Adapter({"gates": random_gates(config)}, Provenance("duo-attention", {}, "", "", 0))
    options: tuple[Bits, ...] = (16, 8, 4)
    for sparsity in (0.0, 0.5):
        for bits in options:
            settings = LServeConfig(sparsity=sparsity, bits=bits, budget=512, sinks=64, window=256)
            cache = LServeCache(config, 1, length + 1, dtype, CPU, settings, adapter=adapter)
            for count, role in ((length, "prompt"), (1, "generated")):
                positions = torch.arange(count)[None] + cache.lengths[0]
                cache.begin(Step(torch.zeros(1, count, dtype=torch.int64), positions, role=role))  # type: ignore[arg-type]
                cache.commit([count])
            found[f"sparsity {sparsity}, {bits} bits"] = cache.nbytes
    return found


@torch.inference_mode()
def rounding(model: LanguageModel, length: int) -> Results:
    """Mean nats a token of a text, read in one pass from rounded keys and values."""
    text = torch.tensor(model.tokenizer.encode(filler())[: length + 1])
    found: Results = {}
    options: tuple[Bits, ...] = (16, 8, 4)
    for bits in options:
        transformer, settings = model.transformer, LServeConfig(sparsity=0, bits=bits)
        cache = LServeCache(model.config, 1, length, transformer.dtype, transformer.device, settings)
        step = Step(text[None, :-1], torch.arange(length)[None], logits="all")
        logits = model.runner.step(step, cache).logits
        assert logits is not None
        found[f"{bits} bits"] = round(float(torch.nn.functional.cross_entropy(logits[0], text[1:])), 4)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rounded", nargs="*", default=["smollm2", "qwen-coder-0.5b"], help="models of `rounding`")
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=[512, 1024, 2048], help="tokens of texts with a passkey"
    )
    parser.add_argument("--texts", type=int, default=2, help="of each length (default: %(default)s)")
    parser.add_argument("--steps", nargs="+", type=int, default=[1024, 4096, 16384, 32768], help="of `time`")
    parser.add_argument("--out", type=Path, default=RESULTS / "cache_lserve.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report: Results = {"machine": machine(CPU), "model": options.model, "texts": options.texts}
    shapes = {"smollm2": (9, 3, 64), "Llama-3-8B": (32, 8, 128)}
    report["time"] = {name: step_times(*shape, options.steps, 512) for name, shape in shapes.items()}
    write(options.out, report)
    report["rounding"] = {name: rounding(load(name, device="cpu"), 256) for name in options.rounded}
    model = load(options.model, device="cpu")
    report["memory"] = {str(length): memory(model, length) for length in (4096, 8000)}
    report["gates"] = [name for name in gates(model) if name != "none"]
    report["passkey"], report["mass"] = {}, {}
    for length in options.lengths:
        report["passkey"][str(length)], report["mass"][str(length)] = texts(model, length, options.texts)
        write(options.out, report)  # a run that is stopped keeps what it has


if __name__ == "__main__":
    main()
