"""A pass over several tokens on the CPU: what a draft costs to verify, with float32 and with 8-bit activations.

    python -m benchmarks.wide_passes                    # smollm2

Recipes take turns, width by width, and the fastest of each counts. Writes `results/wide_passes.json`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import fewer
from benchmarks.records import RESULTS, write
from fewer.engine.session import Session
from fewer.evaluation.divergence import Divergence, divergence, reference
from fewer.evaluation.machine import machine
from fewer.evaluation.prompts import built_in_prompts
from fewer.slots import DraftTree

RECIPES = ("auto", "auto:activations=int8")
WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


def milliseconds(session: Session, width: int) -> float:
    """One pass over a chain of `width` tokens behind what the session holds, which it then holds again."""
    tree = DraftTree(list(range(1000, 1000 + width)), list(range(-1, width - 1)))
    start = time.perf_counter()
    session.verify([tree])
    taken = time.perf_counter() - start
    session.commit([[]])
    return 1e3 * taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--depth", type=int, default=256, help="tokens of text before the pass (default: 256)")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS / "wide_passes.json")
    options = parser.parse_args()
    models = {recipe: fewer.load(options.model, weights=recipe) for recipe in RECIPES}
    report: dict[str, Any] = {"machine": machine(), "model": options.model, "depth": options.depth, "passes": {}}
    sessions = {recipe: model.session(1, options.depth + 40) for recipe, model in models.items()}
    for session in sessions.values():
        session.prefill([list(range(100, 100 + options.depth))])
    for width in WIDTHS:
        taken: dict[str, list[float]] = {recipe: [] for recipe in RECIPES}
        for _ in range(options.repeats):
            for recipe, session in sessions.items():
                taken[recipe].append(milliseconds(session, width))
        report["passes"][str(width)] = {recipe: min(times) for recipe, times in taken.items()}
        print(width, report["passes"][str(width)], flush=True)
        write(options.out, report)
    dense = fewer.load(options.model, weights="dense")
    prompts = [dense.encode(prompt) for prompt in built_in_prompts()]
    texts = [reference(dense, prompt, 48, dense.tokenizer.eos_tokens) for prompt in prompts if len(prompt) < 1500]
    for recipe, model in models.items():
        total = sum((divergence(model, text) for text in texts), Divergence())
        report.setdefault("quality", {})[recipe] = {
            "kl": total.kl,
            "unchanged": total.agreement,
            "perplexity": total.perplexity,
            "tokens": total.tokens,
        }
    print(report["quality"])
    write(options.out, report)


if __name__ == "__main__":
    main()
