"""Drafters on the target's hidden states: how often chimera, medusa and eagle are right, and what it brings.

    python -m benchmarks.decoding_heads --adapters heads --device cuda
    python -m benchmarks.decoding_heads --adapters heads --device cpu --threads 1

`--adapters` names a folder. A variant whose file is there is measured; the others are trained first, all on the same
answers of the target, for the same steps, and kept there: so one machine may train and another measure.

- `fitted`: at offsets +2 .. +5 the share of right guesses on answers that were not trained on, tokens a round of a
  chain (`chain_tau`), seconds a step, bytes. Chimera also without its trigrams, its layer, its distillation, and with
  the masks of the paper and of its released code; eagle also trained on its own guesses (`unroll`).
- `same tree`: prompts answered greedily with trees of one budget and no gate: tokens a pass, the time of drafting a
  round over that of a plain pass, and how many texts are plain decoding's.
- `timed`: with the gate, in turns with plain decoding and prompt lookup; rates over plain's, by the wall.

Writes `results/decoding_heads.json`, one entry a model and device.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.records import RESULTS, read, write
from fewer.decoding.generate import Counts, generate
from fewer.decoding.sampling import SamplingConfig
from fewer.evaluation.machine import machine
from fewer.evaluation.prompts import built_in_prompts, read_prompts, read_text
from fewer.language_model import LanguageModel, load
from fewer.recipe import Recipe
from fewer.registry import find, parse_settings
from fewer.training import TrainingText, fit_to_file, load_adapter

Results = dict[str, Any]
VARIANTS: dict[str, tuple[str, dict[str, str]]] = {
    "medusa": ("medusa", {}),
    "chimera": ("chimera", {}),
    "eagle": ("eagle", {}),
    "chimera, without trigrams": ("chimera", {"trigram": "false"}),
    "chimera, without the layer": ("chimera", {"layer": "false"}),
    "chimera, without distillation": ("chimera", {"distil": "0"}),
    "chimera, the paper's mask": ("chimera", {"mask": "paper"}),
    "chimera, the code's mask": ("chimera", {"mask": "code"}),
    "eagle, unrolled": ("eagle", {"unroll": "3"}),
}
DRAFTLESS = "chimera, without the layer"  # measured in training alone
TREES = ("tokens=4,width=1", "tokens=8,width=4,branches=2")


def file_of(folder: Path, model: str, variant: str) -> Path:
    return folder / f"{model}-{variant.replace(', ', '-').replace(' ', '-')}.safetensors".replace("'", "")


def fitted(options: argparse.Namespace, variants: Sequence[str]) -> Results:
    """Train what is missing -> what each variant's adapter says of itself."""
    missing = [name for name in variants if not file_of(options.adapters, options.model, name).exists()]
    trained: LanguageModel | None = None
    for name in missing:
        if trained is None:
            trained = load(options.model, weights="dense", device=options.device, gradients=True)
        method, settings = VARIANTS[name]
        text = TrainingText.built_in() if options.data is None else TrainingText(read_text(options.data), "prompts")
        entry = find("decoding", method)
        assert entry.fit_config is not None
        given = dict(item.split("=", 1) for item in options.set)
        config = parse_settings(f"fitting '{method}'", "", entry.fit_config, given | settings)
        path = file_of(options.adapters, options.model, name)
        found = fit_to_file(path, entry, trained, text, config, on_part=lambda *part: print(*part, flush=True))
        print(name, {key: round(value, 3) for key, value in found.provenance.metrics.items()}, flush=True)
    results = {}
    for name in variants:
        path = file_of(options.adapters, options.model, name)
        origin = load_adapter(path).provenance
        kept = {key: origin.config[key] for key in ("steps", "batch", "length", "answers", "vocabulary", "labels")}
        metrics = {key: round(value, 4) for key, value in origin.metrics.items()}
        results[name] = {**metrics, "bytes": path.stat().st_size, "fit": kept}
    return results


def answer(model: LanguageModel, prompt: Sequence[int], tokens: int) -> tuple[list[int], Counts, float]:
    """(text, counts, seconds after the first token)."""
    session, counts, text, began = model.session(1, len(prompt) + tokens + 16), Counts(), list[int](), 0.0
    for event in generate(
        session, [prompt], SamplingConfig(), model.strategy, tokens, model.tokenizer.eos_tokens, counts=counts
    ):
        began = began or time.perf_counter()
        text += event.tokens
    return text, counts, time.perf_counter() - began


def compared(model: LanguageModel, ways: dict[str, str], prompts: Sequence[list[int]], tokens: int) -> Results:
    """Every way over every prompt in turns; `plain` is the first."""
    models = {
        name: model.with_recipe(Recipe(weights=model.recipe.weights, decoding=spec)) for name, spec in ways.items()
    }
    for each in models.values():  # compiled and warm before the clock starts
        answer(each, prompts[0], 16)
    sums: dict[str, dict[str, float]] = {name: {} for name in ways}
    for prompt in prompts:
        expected: list[int] = []
        for name, each in models.items():
            text, counts, seconds = answer(each, prompt, tokens)
            expected = expected or text
            found = {
                "seconds": seconds,
                "emitted": counts.emitted,
                "passes": counts.target_passes,
                "drafted": counts.drafted,
                "accepted": counts.accepted,
                "draft_seconds": counts.draft_seconds,
                "equal_texts": text == expected,
            }
            for key, value in found.items():
                sums[name][key] = sums[name].get(key, 0) + value
    plain = sums["plain"]["seconds"] / sums["plain"]["emitted"]
    return {
        name: {
            "speed": round(plain * each["emitted"] / each["seconds"], 3),
            "tau": round(each["emitted"] / each["passes"], 3),
            "drafted_a_round": round(each["drafted"] / each["passes"], 2),
            "accepted_share": round(each["accepted"] / each["drafted"], 3) if each["drafted"] else None,
            "drafting_over_a_plain_pass": round(each["draft_seconds"] / each["passes"] / plain, 3),
            "equal_texts": int(each["equal_texts"]),
            "tokens": int(each["emitted"]),
        }
        for name, each in sums.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--weights", default="auto", help="of the target that decodes (default: %(default)s)")
    parser.add_argument("--device")
    parser.add_argument("--data", type=Path, metavar="FILE", help="prompts to train on (default: the model's own)")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="how all variants are trained")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="to answer (default: ours)")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer, at most (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "decoding_heads.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    entry: Results = {"fitted": fitted(options, options.variants)}
    model = load(options.model, weights=options.weights, device=options.device)
    device = model.transformer.device
    entry = {"machine": machine(device), "weights": options.weights, **entry}
    key = f"{options.model} {device.type}"

    def save() -> None:
        write(options.out, (read(options.out.stem, options.out.parent) or {}) | {key: entry})

    save()
    words = built_in_prompts() if options.prompts is None else read_prompts(options.prompts)
    prompts = [model.encode(each) for each in words]
    drafting = [name for name in options.variants if name != DRAFTLESS]
    adapters = {name: file_of(options.adapters, options.model, name) for name in drafting}
    for settings in TREES:
        ways = {name: f"{VARIANTS[name][0]}:gate=false,{settings},adapter={adapters[name]}" for name in drafting}
        entry[f"same tree, {settings}"] = compared(model, {"plain": "plain", **ways}, prompts, options.tokens)
        save()
    gated = {name: f"{name}:adapter={adapters[name]}" for name in drafting if name in ("chimera", "medusa", "eagle")}
    ways = {"plain": "plain", "prompt-lookup": "prompt-lookup:tokens=4,min_ngram=2", **gated}
    entry["timed"] = compared(model, ways, prompts, options.tokens)
    save()
    for name, found in entry["timed"].items():
        print(f"{name:16} speed {found['speed']}  tau {found['tau']}  equal texts {found['equal_texts']}")


if __name__ == "__main__":
    main()
