"""Greedy text of real models, ours against transformers' on the same GGUF file, both in float32 on the CPU.

    python -m benchmarks.exactness

Each prompt gets a fixed number of new tokens, end-of-text tokens included, through `fewer`'s generation loop with its
cache, and through transformers' `generate` with its own, which decodes the file by itself. Both get the same token
numbers; whether transformers' tokenizer agrees on them is checked apart. Writes `results/exactness.json`.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import fewer
from benchmarks.records import RESULTS, write
from fewer.checkpoint.names import resolve
from fewer.checkpoint.tokenizer import Tokenizer
from fewer.decoding.generate import generate
from fewer.decoding.sampling import SamplingConfig
from fewer.evaluation.machine import machine
from fewer.evaluation.prompts import built_in_prompts
from fewer.language_model import LanguageModel

MODELS = ("smollm2", "gemma3-270m", "qwen-coder-0.5b")
SHORT_PROMPTS = (
    "Explain in two sentences why the sky is blue.",
    "List the first eight prime numbers.",
    "Write a haiku about a train in the snow.",
    "def fibonacci(n: int) -> int:\n    ",
    "Was ist die Hauptstadt von Österreich, und an welchem Fluss liegt sie?",
    "SELECT name, price FROM products WHERE",
    "What is 17 × 23? Show how you got there.",
    "Write a polite e-mail that declines an invitation to a wedding.",
    "1. Preheat the oven to 200 °C.\n2. Chop two onions.\n3.",
    "Résume en une phrase l'histoire du Petit Prince.",
    '{"name": "Ada Lovelace", "born": 1815, "known_for": [',
    "Once upon a time, a fox and a crow",
    "Name three differences between TCP and UDP.",
    "What does the word “serendipity” mean? 🤔",
    "请用一句话介绍长城。",
)


def exactness_prompts() -> list[str]:
    """Twenty: fifteen short ones, four of the built-in prompts, and all of those as one text beyond 1,000 tokens."""
    ours = built_in_prompts()
    return [*SHORT_PROMPTS, ours[0], ours[1], ours[4], ours[5], "\n\n".join(ours)]


@dataclass(frozen=True)
class Answer:
    """What one engine wrote after a prompt."""

    tokens: list[int]
    first_logits: Tensor  # [V] float32, after the prompt
    gaps: list[float] = field(default_factory=list)  # best logit over the second best, a step each


@dataclass(frozen=True)
class Difference:
    """The first token of an answer that is not the reference's."""

    prompt: int
    position: int  # in the answer
    ours: int
    theirs: int
    top2_gap: float  # of the reference's logits there: how near a tie it was


@dataclass(frozen=True)
class Agreement:
    """How near two engines' answers are."""

    prompts: int
    equal_answers: int
    compared_tokens: int  # up to and with the first difference of each answer
    equal_tokens: int
    largest_logit_difference: float  # after the prompts, relative to the range of the reference's logits
    smallest_gap: float  # the nearest tie that the reference met
    differences: list[Difference]


def our_answers(model: LanguageModel, prompts: Sequence[Sequence[int]], tokens: int) -> list[Answer]:
    """Greedy, `tokens` each, ends of text ignored."""
    answers = []
    for prompt in prompts:
        session = model.session(1, len(prompt) + tokens + 1)
        events = generate(session, [prompt], SamplingConfig(), None, tokens)
        written = [token for event in events for token in event.tokens]
        answers.append(Answer(written, model.session(1, len(prompt)).prefill([prompt])[0]))
    return answers


def load_reference(path: Path) -> Any:
    """transformers' own reading of a GGUF file: a causal language model in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@torch.inference_mode()
def reference_answers(model: Any, prompts: Sequence[Sequence[int]], tokens: int) -> list[Answer]:
    """transformers' `generate`: greedy, with its cache, ends of text ignored."""
    model.generation_config.eos_token_id = None
    answers = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        result = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        best = [step[0].float().topk(2).values for step in result.logits]
        gaps = [float(two[0] - two[1]) for two in best]
        answers.append(Answer(result.sequences[0, len(prompt) :].tolist(), result.logits[0][0].float(), gaps))
    return answers


def agreement(ours: Sequence[Answer], theirs: Sequence[Answer]) -> Agreement:
    """Tokens are compared as far as both engines saw the same text: up to the first difference."""
    differences, compared = [], 0
    largest = 0.0
    for index, (mine, reference) in enumerate(zip(ours, theirs, strict=True)):
        pairs = list(zip(mine.tokens, reference.tokens, strict=True))
        wrong = next((place for place, (a, b) in enumerate(pairs) if a != b), None)
        compared += len(pairs) if wrong is None else wrong + 1
        if wrong is not None:
            differences.append(Difference(index, wrong, *pairs[wrong], reference.gaps[wrong]))
        scale = reference.first_logits.max() - reference.first_logits.min()
        largest = max(largest, float((mine.first_logits - reference.first_logits).abs().max() / scale))
    return Agreement(
        prompts=len(ours),
        equal_answers=len(ours) - len(differences),
        compared_tokens=compared,
        equal_tokens=compared - len(differences),
        largest_logit_difference=largest,
        smallest_gap=min(min(reference.gaps) for reference in theirs),
        differences=differences,
    )


def tokenizers_agree(ours: Tokenizer, path: Path, prompts: Sequence[str]) -> dict[str, Any]:
    """Token numbers of every prompt, as it is and through the chat template, held against transformers' tokenizer."""
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)

    def chat(text: str) -> tuple[list[int], list[int]]:
        messages = [{"role": "user", "content": text}]
        words = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return ours.chat(messages), list(theirs(words, add_special_tokens=False).input_ids)

    forms: dict[str, Callable[[str], tuple[list[int], list[int]]]] = {
        "raw": lambda text: (ours.encode(text), list(theirs(text).input_ids))
    }
    forms |= {"chat": chat} if ours.has_chat_template else {}
    found: dict[str, Any] = {"class": type(theirs).__name__, "prompts": len(prompts), "differences": []}
    for form, encode in forms.items():
        pairs = [encode(text) for text in prompts]
        found[f"{form}_equal"] = sum(a == b for a, b in pairs)
        found["differences"] += [
            {"form": form, "prompt": index, "ours": a, "theirs": b} for index, (a, b) in enumerate(pairs) if a != b
        ]
    return found


def measure(name: str, prompts: Sequence[str], tokens: int) -> dict[str, Any]:
    """One model. Ours is freed before the reference is loaded: two copies in float32 would not fit a small machine."""
    start, path = time.perf_counter(), resolve(name)
    model = fewer.load(name, weights="dense", dtype="float32", device="cpu")
    encoded = [model.encode(prompt, raw=not model.tokenizer.has_chat_template) for prompt in prompts]
    ours, tokenizer = our_answers(model, encoded, tokens), model.tokenizer
    del model
    gc.collect()
    tokenizers = tokenizers_agree(tokenizer, path, prompts)
    reference = load_reference(path)
    theirs = reference_answers(reference, encoded, tokens)
    return {
        "file": path.name,
        "reference": f"{type(reference).__name__}.from_pretrained(gguf_file=…), eager attention",
        "form": "chat" if tokenizer.has_chat_template else "raw",
        "prompt_tokens": [len(prompt) for prompt in encoded],
        "tokens": tokens,
        **asdict(agreement(ours, theirs)),
        "tokenizer": tokenizers,
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME")
    parser.add_argument("--tokens", type=int, default=48, help="new tokens after each prompt (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=20, help="how many of the twenty (default: all)")
    parser.add_argument("--out", type=Path, default=RESULTS / "exactness.json")
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    prompts = exactness_prompts()[: options.prompts]
    facts = machine(torch.device("cpu")) | {"transformers": transformers.__version__}
    report: dict[str, Any] = {"machine": facts, "dtype": "float32", "prompts": prompts, "models": {}}
    for name in options.models:
        report["models"][name] = found = measure(name, prompts, options.tokens)
        write(options.out, report)  # after each model: a run that is stopped keeps what it has
        print(
            f"{name}: {found['equal_answers']} of {found['prompts']} answers equal, {found['equal_tokens']} of "
            f"{found['compared_tokens']} tokens, logits within {found['largest_logit_difference']:.1e} of their range, "
            f"nearest tie {found['smallest_gap']:.2g}, {found['seconds']} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
