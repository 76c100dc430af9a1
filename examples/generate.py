"""Load a model in one line, stream an answer, and read what it took.

    python examples/generate.py [MODEL] [PROMPT]

MODEL is an alias, a .gguf file, a folder or a hub id (default: smollm2, fetched on first use).
"""

import sys

import fewer


def main(model: str = "smollm2", prompt: str = "Explain in two sentences why the sky is blue.") -> None:
    loaded = fewer.load(model)
    result = fewer.Generation()
    for piece in loaded.stream(prompt, max_tokens=80, result=result):
        print(piece, end="", flush=True)
    print()
    print(f"\n{len(result.tokens)} tokens, {result.decode_tokens_per_second:.0f} a second")

    sampled = fewer.SamplingConfig(temperature=0.8, top_p=0.95, seed=1)
    again = [loaded.generate(prompt, max_tokens=20, sampling=sampled).tokens for _ in range(2)]
    print(f"the same seed gives the same answer: {again[0] == again[1]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
