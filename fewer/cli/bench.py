"""`fewer bench`: the speed of one recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from fewer.cli import options as o
from fewer.cli.loading import choose_recipe, load_model, prepare
from fewer.cli.output import note, print_json, print_table, size, table

if TYPE_CHECKING:
    from fewer.evaluation.bench import Benchmark
    from fewer.evaluation.speed import Spread


def bench(
    model: o.Model = o.MODEL_DEFAULT,
    prefill: Annotated[
        list[int] | None,
        typer.Option(metavar="TOKENS", help="Length of a prompt to read; repeat it. (default: 128 and 1024)"),
    ] = None,
    depth: Annotated[
        list[int] | None,
        typer.Option(
            metavar="TOKENS", help="Text before the tokens that are written; repeat it. (default: 128 and 1024)"
        ),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", "-n", metavar="N", help="Tokens to write after each depth.")] = 64,
    rounds: Annotated[int, typer.Option(metavar="N", help="Times that everything is measured.")] = 5,
    weights: o.Weights = None,
    cache: o.Cache = None,
    decoding: o.Decoding = None,
    experts: o.Experts = None,
    recipe: o.RecipeFile = None,
    dtype: o.DType = None,
    device: o.Device = None,
    context: o.Context = None,
    threads: o.Threads = None,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Time prefill and decoding of one recipe, against the memory bandwidth read in the same run."""
    prepare(threads)
    from fewer.cli.progress import Bars
    from fewer.evaluation.bench import bench

    chosen = choose_recipe(weights, cache, decoding, experts, dtype, recipe)
    loaded = load_model(model, chosen, device, context)
    lengths = prefill or [length for length in (128, 1024) if length <= loaded.context_length]
    depths = depth or [length for length in (128, 1024) if length <= loaded.context_length - tokens]
    with Bars() as bars:
        result = bench(loaded, lengths, depths, tokens, rounds, lambda done, total: bars.step("measuring", done, total))
    if json:
        print_json({"model": model, **result.to_json()})
    else:
        show(result)


def show(result: Benchmark) -> None:
    read = [
        (f"{figure.tokens:,}", _rate(figure.rate), f"{1000 * figure.seconds.median:.1f}", size(figure.kv_bytes))
        for figure in result.prefill
    ]
    titles = ("prompt tokens", "tokens/s", "ms", "keys and values")
    print_table(table(titles, read, right=titles, title="prefill"))
    written = [
        (
            f"{figure.depth:,}",
            _rate(figure.rate),
            f"{100 * figure.bandwidth_fraction.median:.1f}%",
            f"{figure.tokens_per_pass.median:.2f}",
        )
        for figure in result.decode
    ]
    titles = ("depth", "tokens/s", "of bandwidth", "tokens a pass")
    print_table(table(titles, written, right=titles, title="decoding"))
    note(
        f"{result.recipe} · weights {size(result.weight_bytes)} · {result.bandwidth / 1e9:.1f} GB/s read from memory · "
        f"{result.machine['processor']}, {result.machine['threads']} thread(s)"
    )


def _rate(spread: Spread) -> str:
    return f"{spread.median:,.1f}  ({spread.low:,.1f}–{spread.high:,.1f})"
