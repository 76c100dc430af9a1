"""`fewer perplexity`: how well a model predicts a text."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fewer.cli import options as o
from fewer.cli.loading import choose_recipe, load_model, prepare
from fewer.cli.output import note, print_json, size
from fewer.errors import UsageError


def perplexity(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A UTF-8 text; - reads it from stdin.")],
    model: o.Model = o.MODEL_DEFAULT,
    window: Annotated[int, typer.Option(metavar="TOKENS", help="Tokens that are fed at once.")] = 512,
    stride: Annotated[
        int | None, typer.Option(metavar="TOKENS", help="Tokens between two windows' starts. (default: the window)")
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="TOKENS", help="Only the text's first tokens.")] = None,
    decode_path: Annotated[
        bool, typer.Option("--decode-path", help="Feed one token at a time, as generation does (slow).")
    ] = False,
    weights: o.Weights = None,
    cache: o.Cache = None,
    experts: o.Experts = None,
    recipe: o.RecipeFile = None,
    dtype: o.DType = None,
    device: o.Device = None,
    context: o.Context = None,
    threads: o.Threads = None,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Print the perplexity of MODEL on FILE; a window's first token is not scored unless a BOS stands before it."""
    prepare(threads)
    from fewer.cli.progress import Bars
    from fewer.evaluation.perplexity import perplexity
    from fewer.evaluation.prompts import read_text

    chosen = choose_recipe(weights=weights, cache=cache, experts=experts, dtype=dtype, file=recipe)
    text = sys.stdin.read() if file == "-" else read_text(Path(file))
    if not text.strip():
        raise UsageError(f"{'stdin' if file == '-' else file} holds no text: give some")
    loaded = load_model(model, chosen, device, context)
    with Bars() as bars:
        result = perplexity(
            loaded, text, window, stride, limit, decode_path, lambda done, total: bars.step("scoring", done, total)
        )
    if json:
        print_json(
            {
                "perplexity": result.perplexity,
                "tokens": result.tokens,
                "nll": result.nll,
                "windows": result.windows,
                "window": window,
                "stride": window if stride is None else stride,
                "decode_path": decode_path,
                "kv_bytes": result.kv_bytes,
                "weight_bytes": loaded.weight_bytes,
                "recipe": str(loaded.recipe),
                "model": model,
                "device": str(loaded.transformer.device),
            }
        )
        return
    print(f"{result.perplexity:.4f}")
    note(
        f"{result.tokens:,} tokens scored in {result.windows} window(s) of {window}, "
        f"{'one at a time' if decode_path else 'by prefill'} · {loaded.recipe} · weights {size(loaded.weight_bytes)}, "
        f"keys and values {size(result.kv_bytes)}"
    )
