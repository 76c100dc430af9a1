"""Answer several prompts in one batch: each weight is read once a step for all of them.

    python examples/batch.py [MODEL]

Rows may have unequal lengths. Each answer is the one that its prompt would get alone; in bfloat16 two tokens whose
logits nearly tie may change places, so this runs in float32.
"""

import sys
import time

import fewer

PROMPTS = [
    "Name a fruit.",
    "What is the capital of France?",
    "Write one sentence about the sea, in plain words, without any adjective.",
    "Count from one to five.",
]


def main(model: str = "smollm2") -> None:
    loaded = fewer.load(model, weights="dense", dtype="float32")
    start = time.perf_counter()
    single = [loaded.generate(prompt, max_tokens=24) for prompt in PROMPTS]
    between = time.perf_counter()
    batch = loaded.generate_batch(PROMPTS, max_tokens=24)
    end = time.perf_counter()
    for prompt, answer in zip(PROMPTS, batch, strict=True):
        print(f"{prompt}\n    {answer.text!r}")
    same = sum(alone.tokens == together.tokens for alone, together in zip(single, batch, strict=True))
    print(f"{same} of {len(PROMPTS)} answers equal the single ones; {between - start:.2f} s in turn, ", end="")
    print(f"{end - between:.2f} s together")


if __name__ == "__main__":
    main(*sys.argv[1:])
