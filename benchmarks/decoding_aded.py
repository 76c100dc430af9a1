"""ADED on real models: speed beside plain decoding by kinds of prompts, and what its parts bring.

    python -m benchmarks.decoding_aded --prompts spec-bench.jsonl
    python -m benchmarks.decoding_aded --prompts spec-bench.jsonl --model qwen-coder-0.5b --each 4

`--prompts` names a file of JSON lines with "category" and "turns" (or "prompt"), such as Spec-Bench's.

- `timed`: every prompt is answered greedily by each way of decoding in turns; the order rotates, texts are compared.
  Ratios are rates over plain's, by the wall and by the processor, over all answers of a category.
- `replayed`: the texts that plain decoding wrote, gone through again by drafters without a gate at one node budget:
  tokens a pass of the searches, rewards, constants and tables (see `decoding_aded_replay`). `--corpus` names a text for
  tables.

Writes `results/decoding_aded.json`, one entry a model.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.decoding_aded_replay import Answer, replay
from benchmarks.records import RESULTS, read, write
from fewer.decoding.aded import Aded, AdedConfig, TrigramDrafter
from fewer.decoding.generate import Counts, generate
from fewer.decoding.prompt_lookup import PromptLookup, PromptLookupConfig
from fewer.decoding.rest import Rest, RestConfig
from fewer.decoding.sampling import SamplingConfig
from fewer.decoding.trigram_search import SearchName
from fewer.decoding.trigram_table import build_table
from fewer.evaluation.machine import machine
from fewer.language_model import LanguageModel, load
from fewer.recipe import Recipe

Results = dict[str, Any]
WAYS = (
    "plain",
    "prompt-lookup",
    "prompt-lookup:tokens=4,min_ngram=2",
    "rest:tokens=4",
    "aded",
    "aded:gate=false,tokens=4",
)
CATEGORIES = ("coding", "summarization", "rag", "qa", "math_reasoning", "translation", "other")
TARGET = ("coding", "summarization", "rag")
CHATTY = ("writing", "roleplay", "reasoning", "math", "extraction", "stem", "humanities")  # few prompts each: "other"
NODES = 63  # of a replayed draft
C1 = (0.0, 0.1, 1.814, 8.0, 32.0, 128.0)


def read_prompts(path: Path, each: int, categories: Sequence[str]) -> list[tuple[str, str]]:
    """(category, prompt): the first `each` of every category."""
    left = dict.fromkeys(categories, each)
    prompts = []
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        category = "other" if entry["category"] in CHATTY else entry["category"]
        if left.get(category, 0) > 0:
            left[category] -= 1
            prompts.append((category, entry["turns"][0] if "turns" in entry else entry["prompt"]))
    return prompts


# ── timed ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def answer(model: LanguageModel, prompt: Sequence[int], tokens: int) -> tuple[list[int], Counts, float, float]:
    """(text, counts, seconds by the wall, seconds of the processor), all after the first token."""
    session, counts = model.session(1, len(prompt) + tokens + 1), Counts()
    text: list[int] = []
    wall = busy = 0.0
    for event in generate(
        session, [prompt], SamplingConfig(), model.strategy, tokens, model.tokenizer.eos_tokens, counts=counts
    ):
        if not text:
            wall, busy = time.perf_counter(), time.process_time()
        text += event.tokens
    return text, counts, time.perf_counter() - wall, time.process_time() - busy


def timed(model: LanguageModel, prompts: Sequence[tuple[str, str]], tokens: int) -> tuple[Results, list[Answer]]:
    """Every way over every prompt in turns -> the figures, and plain decoding's answers."""
    weights = model.recipe.weights
    ways = {spec: model.with_recipe(Recipe(weights=weights, decoding=spec)) for spec in WAYS}
    for way in ways.values():  # compiled and warm before the clock starts
        answer(way, model.encode("Say one two three one two three."), 16)
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0] * 7)
    answers = []
    for number, (category, prompt) in enumerate(prompts):
        encoded, texts = model.encode(prompt), {}
        for turn in range(len(WAYS)):
            spec = WAYS[(turn + number) % len(WAYS)]
            texts[spec], counts, wall, busy = answer(ways[spec], encoded, tokens)
            done = wall, busy, counts.emitted, counts.target_passes, counts.drafted, counts.accepted
            for group in (category, "all"):
                sums[spec, group] = [a + b for a, b in zip(sums[spec, group], (*done, 0), strict=True)]
        for spec in WAYS:
            for group in (category, "all"):
                sums[spec, group][6] += texts[spec] == texts["plain"]
        answers.append(Answer(category, encoded, texts["plain"]))
    results: Results = {}
    for (spec, group), (wall, busy, emitted, passes, drafted, accepted, equal) in sums.items():
        plain = sums["plain", group]
        results.setdefault(spec, {})[group] = {
            "tokens_a_second": round(emitted / wall, 1),
            "speed_by_wall": round(plain[0] / plain[2] * emitted / wall, 3),
            "speed_by_processor": round(plain[1] / plain[2] * emitted / busy, 3),
            "tau": round(emitted / passes, 3),
            "drafted_a_round": round(drafted / passes, 2),
            "accepted_share": round(accepted / drafted, 3) if drafted else None,
            "equal_texts": int(equal),
            "tokens": int(emitted),
        }
    for found in results.values():
        for clock in ("wall", "processor"):
            rates = [found[group][f"speed_by_{clock}"] for group in TARGET if group in found]
            found[f"target_speed_by_{clock}"] = round(sum(rates) / len(rates), 3) if rates else None
    return results, answers


# ── replayed ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class PromptAlone:
    """ADED whose table learns a prompt and then no more."""

    def __init__(self, strategy: Aded):
        self.strategy = strategy

    def drafter(self, sampling: SamplingConfig, row: int) -> TrigramDrafter:
        drafter = self.strategy.drafter(sampling, row)
        assert isinstance(drafter, TrigramDrafter)
        start = drafter.start

        def learn_once(prompt: Sequence[int]) -> None:
            drafter.config = self.strategy.config
            start(prompt)
            drafter.config = replace(drafter.config, update=False)

        drafter.start = learn_once  # type: ignore[method-assign]
        return drafter


def replayed(model: LanguageModel, answers: Sequence[Answer], corpus: Path | None) -> Results:
    """tau of drafters without a gate, `NODES` nodes at most; the paper's update rule is `prompt=false`."""

    def aded(**changes: Any) -> Aded:
        return Aded(AdedConfig(**{"tokens": NODES, "gate": False, "sequences": 1000} | changes), model)

    drafters: dict[str, Any] = {
        "prompt-lookup": PromptLookup(PromptLookupConfig()),
        "rest": Rest(RestConfig(tokens=NODES)),
        "aded": aded(),
        "aded, 24 sequences": aded(sequences=24),
        "aded, the window alone": aded(prompt=False),
        "aded, frozen after the prompt": PromptAlone(aded()),
        "aded, kept from answer to answer": aded(keep=True),
    }
    results: Results = {name: replay(strategy, answers, NODES).report(64) for name, strategy in drafters.items()}
    results["aded"]["by_category"] = {
        group: round(replay(aded(), [each for each in answers if each.category == group], NODES).tau, 3)
        for group in sorted({each.category for each in answers})
    }
    again = aded(keep=True)
    results["the same prompts twice"] = [round(replay(again, answers, NODES).tau, 3) for _ in range(2)]
    some = answers[:: max(1, len(answers) // 12)]  # the step-by-step search takes milliseconds a round
    start = None
    if corpus is not None:
        text = corpus.read_text(encoding="utf-8")
        results["corpus"] = tables(model, some, text, aded)
        start = build_table(model.tokenizer, text.split("\n\n"))

    def tau(nodes: int, **changes: Any) -> float:
        strategy = aded(**changes)
        strategy.table = start or strategy.table
        return round(replay(strategy, some, nodes).tau, 3)

    searches: tuple[SearchName, ...] = ("visits", "product", "breadth-first", "chain")
    results["searches"] = {
        f"{nodes} nodes": {name: tau(nodes, search=name) for name in searches} for nodes in (4, 8, NODES)
    }
    results["c1, 8 nodes"] = {
        reward: {f"{c1:g}": tau(8, search="monte-carlo", reward=reward, c1=c1) for c1 in C1}
        for reward in ("intended", "reference")
    }
    return results


def tables(model: LanguageModel, answers: Sequence[Answer], text: str, aded: Any) -> Results:
    """tau by the size of the text that a table is built from, learning and frozen."""
    results = {}
    for part in (64, 16, 4, 1):
        documents = text[: len(text) // part].split("\n\n")
        table = build_table(model.tokenizer, documents)
        row: Results = {"characters": len(text) // part, "bytes": table.nbytes}
        for name, changes in {"learning": {"prompt": False}, "frozen": {"update": False}}.items():
            strategy = aded(**changes)
            strategy.table = table
            row[name] = round(replay(strategy, answers, NODES).tau, 3)
        results[f"1/{part}"] = row
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--tokens", type=int, default=192, help="new tokens, at most (default: %(default)s)")
    parser.add_argument("--each", type=int, default=3, help="prompts of a category (default: %(default)s)")
    parser.add_argument("--categories", nargs="+", default=list(CATEGORIES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--corpus", type=Path, metavar="FILE", help="a text for tables")
    parser.add_argument("--out", type=Path, default=RESULTS / "decoding_aded.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load(options.model, weights=options.weights, device="cpu")
    prompts = read_prompts(options.prompts, options.each, options.categories)
    found, answers = timed(model, prompts, options.tokens)
    report = read(options.out.stem, options.out.parent) or {}
    name = options.model if options.weights == "auto" else f"{options.model} {options.weights}"
    entry = {"machine": machine(torch.device("cpu")), "prompts": len(prompts), "tokens": options.tokens, "timed": found}
    write(options.out, report | {name: entry})  # a run that is stopped keeps what it has
    write(options.out, report | {name: entry | {"replayed": replayed(model, answers, options.corpus)}})
    for spec, each in found.items():
        speeds = " ".join(f"{group} {each[group]['speed_by_wall']}" for group in options.categories if group in each)
        print(f"{spec:36} {speeds} | {each['target_speed_by_wall']} ({each['target_speed_by_processor']})")


if __name__ == "__main__":
    main()
