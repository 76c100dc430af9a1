"""Fewer steps: guess several tokens, check them in one pass, and emit exactly what plain decoding would.

    python examples/speculative.py [MODEL] [DRAFT]

Prompt lookup needs no second model. Give a DRAFT (a smaller model of the same vocabulary) to try that as well.
"""

import sys

import fewer

PROMPT = "Repeat this list twice, word for word: apple, banana, cherry, date, elderberry, fig, grape."


def main(model: str = "smollm2", draft: str = "") -> None:
    plain = fewer.load(model, dtype="float32", weights="dense")
    wanted = plain.generate(PROMPT, max_tokens=60)
    print(f"{'plain':40} {1:5.2f} tokens a pass, {wanted.decode_tokens_per_second:6.1f} a second")
    specs = ["prompt-lookup", "prompt-lookup:tokens=5,min_ngram=2"]
    if draft:
        specs.append(f"draft-model:model={draft}")
    for spec in specs:
        speculative = plain.with_recipe(fewer.Recipe(weights="dense", dtype="float32", decoding=spec))
        answer = speculative.generate(PROMPT, max_tokens=60)
        per_pass, rate = answer.tokens_per_pass, answer.decode_tokens_per_second
        print(f"{spec:40} {per_pass:5.2f} tokens a pass, {rate:6.1f} a second")
        if answer.tokens != wanted.tokens:
            raise SystemExit(f"{spec} changed the answer, which it must not")
    print("every method emitted the same tokens")


if __name__ == "__main__":
    main(*sys.argv[1:])
