"""Copying what is edited: answers that correct a text of the prompt, beside plain decoding of the same engine.

    python -m benchmarks.decoding_aggressive
    python -m benchmarks.decoding_aggressive --model qwen-coder-0.5b --texts 2 --out results/other.json

Prompts are texts with seeded slips of the pen to be corrected, code to be renamed in, questions whose answers repeat
nothing; or those of `--prompts`. The overlap of an answer is the share of its tokens that lie in runs of the prompt.

- `passes`: what a pass over several tokens costs, and the speed that it allows if every guess is right.
- `timed`: every prompt is answered greedily by each way of decoding in turns; the order rotates, texts are compared.
  Speeds are rates over plain's, by the wall and by the processor, over the answers of a group.
- `blocks`: those answers gone through again with a fixed number of guesses a round: tokens a pass, and the speed by
  the costs in `passes`.

Writes `results/decoding_aggressive.json`, one entry a model and its weights.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import torch

from benchmarks.records import RESULTS, read, write
from benchmarks.wide_passes import milliseconds
from fewer.decoding.aggressive import Aggressive, AggressiveConfig
from fewer.decoding.counts import Counts
from fewer.decoding.generate import generate
from fewer.decoding.sampling import SamplingConfig
from fewer.evaluation.machine import machine
from fewer.evaluation.prompts import built_in_prompts, read_prompts
from fewer.language_model import LanguageModel, load
from fewer.recipe import Recipe

Results = dict[str, Any]
WAYS = (
    "plain",
    "aggressive",
    "aggressive:resync=nearest",
    "aggressive:resync=index",
    "aggressive:block=whole,max_ngram=3",
    "prompt-lookup",
)
WIDTHS = (1, 2, 4, 8, 16, 24, 32)
BLOCKS = (1, 2, 4, 8, 12, 16, 24, 31, 63)
GROUPS = ((0.9, "overlap from 0.9"), (0.5, "overlap from 0.5"), (0.0, "overlap below 0.5"))
TEXTS = Path(__file__).with_name("texts_to_edit.txt")
CORRECT = "Copy the text and fix the typos:\n\n"
RENAME = "Rename the variable `result` to `amount` in this Python code. Answer with the code only.\n\n"
CODE = '''```python
def total(prices, tax):
    """Sum of the prices with tax."""
    result = 0
    for price in prices:
        result += price
    return result * (1 + tax)


def average(values):
    """Mean of the values."""
    count = 0
    result = 0
    for value in values:
        result += value
        count += 1
    return result / count
```'''


def misspelt(text: str, slips: int, seed: int) -> str:
    """Two letters of so many words changed places, or the last letter of a short one doubled."""
    dice, words = random.Random(seed), text.split(" ")
    for place in dice.sample(range(len(words)), slips):
        word = words[place]
        at = dice.randrange(1, max(2, len(word) - 2))
        words[place] = word[:at] + word[at + 1] + word[at] + word[at + 2 :] if len(word) > 3 else word + word[-1:]
    return " ".join(words)


def editing_prompts(texts: int) -> list[str]:
    """So many texts with 0, 3 and 8 slips each, one renaming, and two questions that invite no copying."""
    paragraphs = read_prompts(TEXTS)[:texts]
    slips = [(paragraph, count) for paragraph in paragraphs for count in (0, 3, 8)]
    ours = built_in_prompts()
    corrections = [CORRECT + misspelt(text, count, seed) for seed, (text, count) in enumerate(slips)]
    return [*corrections, RENAME + CODE, ours[0], ours[5]]


def overlap(prompt: Sequence[int], answer: Sequence[int]) -> float:
    """Share of the answer in runs of at least four tokens that the prompt has in the same order."""
    blocks = SequenceMatcher(None, prompt, answer, autojunk=False).get_matching_blocks()
    return sum(block.size for block in blocks if block.size >= 4) / len(answer)


# ── passes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def passes(model: LanguageModel, rounds: int = 7) -> Results:
    """Milliseconds by tokens of a pass, the fastest of some; and width · c(1) / c(width)."""
    session = model.session(1, 512)
    session.prefill([list(range(1000, 1256))])
    times = {width: min(milliseconds(session, width) for _ in range(rounds)) for width in WIDTHS}
    return {
        "milliseconds": {str(width): round(found, 2) for width, found in times.items()},
        "ceiling": {str(width): round(width * times[1] / found, 2) for width, found in times.items()},
    }


# ── timed ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def answer(model: LanguageModel, prompt: Sequence[int], tokens: int) -> tuple[list[int], Counts, float, float]:
    """(text, counts, seconds by the wall, seconds of the processor), all after the first token."""
    session, counts = model.session(1, len(prompt) + tokens + 1), Counts()
    stops, wall, busy = model.tokenizer.eos_tokens, 0.0, 0.0
    text: list[int] = []
    for event in generate(session, [prompt], SamplingConfig(), model.strategy, tokens, stops, counts=counts):
        if not text:
            wall, busy = time.perf_counter(), time.process_time()
        text += event.tokens
    return text, counts, time.perf_counter() - wall, time.process_time() - busy


def timed(model: LanguageModel, prompts: Sequence[list[int]], tokens: int) -> tuple[Results, list[list[int]]]:
    """Every way over every prompt in turns -> the figures by overlap, and plain decoding's answers."""
    ways = {spec: model.with_recipe(Recipe(weights=model.recipe.weights, decoding=spec)) for spec in WAYS}
    for way in ways.values():  # compiled and warm before the clock starts
        answer(way, model.encode("Say one two three one two three."), 16)
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0] * 8)
    answers: list[list[int]] = []
    found: Results = {"overlaps": []}
    for number, prompt in enumerate(prompts):
        runs = {}
        for turn in range(len(WAYS)):
            spec = WAYS[(turn + number) % len(WAYS)]
            runs[spec] = answer(ways[spec], prompt, tokens)
        plain = runs["plain"][0]
        answers.append(plain)
        found["overlaps"].append(round(overlap(prompt, plain), 3))
        group = next(name for least, name in GROUPS if found["overlaps"][-1] >= least)
        for spec, (text, counts, wall, busy) in runs.items():
            done = [wall, busy, counts.emitted, counts.target_passes, counts.drafted, counts.accepted]
            done += [counts.draft_seconds, text == plain]
            for name in (group, "all"):
                sums[spec, name] = [a + b for a, b in zip(sums[spec, name], done, strict=True)]
    for (spec, name), (wall, busy, emitted, rounds, drafted, accepted, drafting, equal) in sums.items():
        base = sums["plain", name]
        found.setdefault(name, {})[spec] = {
            "tokens_a_second": round(emitted / wall, 1),
            "speed_by_wall": round(base[0] / base[2] * emitted / wall, 3),
            "speed_by_processor": round(base[1] / base[2] * emitted / busy, 3),
            "tau": round(emitted / rounds, 3),
            "accepted_share": round(accepted / drafted, 3) if drafted else None,
            "draft_share_of_time": round(drafting / wall, 4),
            "equal_texts": int(equal),
            "tokens": int(emitted),
        }
    return found, answers


# ── blocks ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def replay(model: LanguageModel, spec: Results, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> Counts:
    """Rounds of a drafter over answers that are known, and how many guesses each had."""
    counts, strategy = Counts(), Aggressive(AggressiveConfig(**spec), model)
    for prompt, text in zip(prompts, answers, strict=True):
        drafter, done = strategy.drafter(SamplingConfig(), 0), 1
        assert drafter is not None
        drafter.start(prompt)
        while done < len(text):
            draft = drafter.propose([*prompt, *text[:done]], len(text) - done - 1)
            path = [0]
            while len(path) < len(draft.tokens) and draft.tokens[len(path)] == text[done + len(path) - 1]:
                path.append(len(path))
            counts.add(draft, path, len(path))
            done += len(path)
    return counts


def blocks(model: LanguageModel, prompts: Sequence[list[int]], answers: Sequence[list[int]], cost: Results) -> Results:
    """Tokens a pass and speed by the guesses of a round, where a pass costs a straight line in its tokens."""
    one, widest = cost["milliseconds"]["1"], cost["milliseconds"]["32"]
    share = (widest - one) / 31 / one
    found: Results = {"each_further_token": round(share, 3)}
    for tokens in BLOCKS:
        counts = replay(model, {"tokens": tokens, "block": "whole"}, prompts, answers)
        spent = counts.target_passes + share * counts.drafted
        found[str(tokens)] = {"tau": round(counts.tau, 3), "speed": round(counts.emitted / spent, 3)}
    counts = replay(model, {"pass_cost": share}, prompts, answers)
    spent = counts.target_passes + share * counts.drafted
    found["adaptive"] = {"tau": round(counts.tau, 3), "speed": round(counts.emitted / spent, 3)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--weights", nargs="+", default=["auto", "auto:activations=int8"])
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="prompts between lines of ---")
    parser.add_argument("--texts", type=int, default=4, help="texts to be corrected (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=224, help="new tokens, at most (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "decoding_aggressive.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report = read(options.out.stem, options.out.parent) or {}
    texts = read_prompts(options.prompts) if options.prompts else editing_prompts(options.texts)
    for weights in options.weights:
        model = load(options.model, weights=weights, device="cpu")
        prompts = [model.encode(text) for text in texts]
        cost = passes(model)
        figures, answers = timed(model, prompts, options.tokens)
        near = [pair for pair in zip(prompts, answers, figures["overlaps"], strict=True) if pair[2] >= GROUPS[0][0]]
        entry = {"machine": machine(torch.device("cpu")), "prompts": len(prompts), "passes": cost, "timed": figures}
        if near:
            entry["blocks"] = blocks(model, [each[0] for each in near], [each[1] for each in near], cost)
        report[f"{options.model} {weights}"] = entry
        write(options.out, report)
        for group in (name for _, name in GROUPS if name in figures):
            for spec, row in figures[group].items():
                print(f"{weights:22} {group:18} {spec:50} {row['speed_by_wall']:5.2f} {row['tau']:6.2f}", flush=True)


if __name__ == "__main__":
    main()
