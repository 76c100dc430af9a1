"""Compress a model to a folder, load the folder, and see that it is the same model bit for bit.

    python examples/compress_and_reload.py [MODEL] [WEIGHTS]

WEIGHTS is a spec of the weights slot, such as int8 or int4:group=64 (the default is int4).
"""

import sys
import tempfile
from pathlib import Path

import torch

import fewer


def main(model: str = "smollm2", weights: str = "int4") -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "compressed"
        nbytes = fewer.compress(model, folder, fewer.Recipe(weights=weights))
        print(f"{model} with {weights} takes {nbytes / 1e6:.2f} MB on disk")

        made, loaded = fewer.load(model, weights=weights), fewer.load(folder)
        print(f"loaded in {made.load_seconds:.2f} s by rounding, in {loaded.load_seconds:.2f} s from the folder")
        tokens = made.encode("Name three primary colours.")
        logits = [each.session().prefill([tokens]) for each in (made, loaded)]
        if not torch.equal(*logits):
            raise SystemExit("the logits differ")
        print("the same tensors give the same logits, bit for bit")


if __name__ == "__main__":
    main(*sys.argv[1:])
