"""Compare recipes on one model against the uncompressed one: quality, speed and memory, measured in turn.

    python examples/compare_recipes.py [MODEL] [TOKENS]

`fewer compare` does the same and writes an HTML page; from Python the figures are plain data.
"""

import sys

from fewer import Recipe
from fewer.evaluation.compare import compare
from fewer.evaluation.comparison import Settings

RECIPES = [
    Recipe(weights="dense"),
    Recipe(weights="int8"),
    Recipe(weights="int4"),
    Recipe(weights="int4", cache="sink-window:window=60", decoding="prompt-lookup"),
]
PROMPTS = ["Write one sentence about the sea.", "List three colours, then list them again."]


def main(model: str = "smollm2", tokens: str = "32") -> None:
    settings = Settings(max_tokens=int(tokens), rounds=2, prompt_tokens=96)
    result = compare(model, RECIPES, settings, PROMPTS)
    print(f"{'recipe':48} {'tokens/s':>9} {'weights MB':>11} {'KL':>8} {'unchanged':>10}")
    for row in result.rows:
        rate, quality = row.spread(lambda figures: figures.decode_rate), row.quality
        if rate is None or quality is None or quality.kl is None or quality.unchanged is None:
            print(f"{row.name:48} {row.failure or row.quality_note}")
            continue
        size = (row.weight_bytes or 0) / 1e6
        print(f"{row.name:48} {rate.median:9.1f} {size:11.2f} {quality.kl:8.4f} {quality.unchanged:10.1%}")


if __name__ == "__main__":
    main(*sys.argv[1:])
