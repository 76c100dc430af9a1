"""`fewer compress`: write a model with compressed weights as a folder that loads back bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewer.cli import options as o
from fewer.cli.loading import choose_recipe, prepare
from fewer.cli.output import note, print_json, size


def compress(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The folder to write; must be new.")],
    model: o.Model = o.MODEL_DEFAULT,
    weights: o.Weights = None,
    recipe: o.RecipeFile = None,
    dtype: o.DType = None,
    device: o.Device = None,
    threads: o.Threads = None,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Write MODEL with the weights of a recipe to a new folder; --model DIR then loads it."""
    prepare(threads)
    from fewer.cli.progress import Bars
    from fewer.language_model import compress

    chosen = choose_recipe(weights=weights, dtype=dtype, file=recipe)
    with Bars() as bars:
        nbytes = compress(model, output, chosen, device, progress=bars, on_matrix=bars.on_matrix)
    if json:
        print_json({"path": str(output), "bytes": nbytes, "weights": str(chosen.choices["weights"])})
    else:
        print(output)
        note(f"{size(nbytes)} with weights {chosen.choices['weights']}: run it with --model {output}")
