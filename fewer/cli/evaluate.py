"""`fewer evaluate`: tasks that a recipe may fail while its perplexity looks fine. `needle`: finding one sentence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fewer.cli import options as o
from fewer.cli.compare import Stages
from fewer.cli.loading import parse_recipes, prepare
from fewer.cli.output import note, print_json, print_table, table
from fewer.cli.progress import Bars
from fewer.cli.verb import INTERRUPTED, Verb
from fewer.errors import UsageError

if TYPE_CHECKING:
    from fewer.evaluation.needle_report import NeedleReport, RecipeTrials
    from fewer.recipe import Recipe

TASK, OUTPUT = "Task", "Output"
MOST_DEPTHS = 101  # one a percent

app = typer.Typer(help="Tasks that show what a recipe forgets.", no_args_is_help=True)


@app.callback()
def evaluate() -> None:
    """Tasks that show what a recipe forgets."""


@app.command(cls=Verb)
def needle(
    model: o.Model = o.MODEL_DEFAULT,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            "--recipe",
            "-r",
            metavar="RECIPE",
            rich_help_panel=o.RECIPE,
            help="As in 'weights=int4 cache=sink-window', or a YAML file; repeat it to compare. (default: the model's)",
        ),
    ] = None,
    weights: o.Weights = None,
    cache: o.Cache = None,
    decoding: o.Decoding = None,
    experts: o.Experts = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            rich_help_panel=TASK,
            help="Tokens of prompt and answer, as in 1k,2k,4096; 1k is 1,024. (default: 1k,2k,4k, as far as they fit)",
        ),
    ] = None,
    depths: Annotated[
        str,
        typer.Option(
            metavar="COUNT|LIST",
            rich_help_panel=TASK,
            help="How many places, evenly spaced from front to end, or a list of them, as in 0,0.5,90%.",
        ),
    ] = "5",
    samples: Annotated[
        int, typer.Option(min=1, metavar="N", rich_help_panel=TASK, help="Texts of each length and depth.")
    ] = 1,
    kind: Annotated[
        str, typer.Option(metavar="KIND", rich_help_panel=TASK, help="passkey (random words) or needle (a plain fact).")
    ] = "passkey",
    words: Annotated[int, typer.Option(min=1, metavar="N", rich_help_panel=TASK, help="Words of a passkey.")] = 8,
    haystack: Annotated[
        Path | None,
        typer.Option(metavar="FILE", rich_help_panel=TASK, help="The text to hide in. (default: one of ours)"),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, metavar="N", rich_help_panel=TASK, help="Another seed hides other things elsewhere.")
    ] = 0,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", rich_help_panel=OUTPUT, help="Write the heat maps as a page.")
    ] = None,
    dtype: o.DType = None,
    device: o.Device = None,
    context: o.Context = None,
    threads: o.Threads = None,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Hide a sentence at each depth of texts of each length, and ask for it."""
    prepare(threads)
    from fewer.evaluation.heat_map import write_html
    from fewer.evaluation.needle import NeedleSettings
    from fewer.evaluation.needle_run import BUILT_IN, find_needles
    from fewer.evaluation.prompts import read_text
    from fewer.evaluation.report import check_writable

    recipes = _choose(recipe or [], weights=weights, cache=cache, decoding=decoding, experts=experts, dtype=dtype)
    settings = NeedleSettings(
        lengths=() if lengths is None else parse_lengths(lengths),
        depths=parse_depths(depths),
        samples=samples,
        kind=kind,  # type: ignore[arg-type]  # checked there
        words=words,
        seed=seed,
    )
    text = None if haystack is None else read_text(haystack)
    if html is not None:
        check_writable(html)
    with Bars() as bars:
        name = BUILT_IN if haystack is None else str(haystack)
        result = find_needles(model, recipes, settings, text, name, device, context, Stages(bars), bars)
    if html is not None:
        write_html(result, html)
    if json:
        print_json(result.to_json())
    else:
        show(result)
    if html is not None:
        note(f"wrote {html}")
    if result.interrupted:
        raise typer.Exit(INTERRUPTED)


def _choose(texts: list[str], **slots: str | None) -> list[Recipe]:
    """The recipes given, or the default one; values for slots replace those of every recipe."""
    from fewer.recipe import Recipe

    given = {slot: spec for slot, spec in slots.items() if spec is not None}
    return [replace(recipe, **given) for recipe in parse_recipes(texts) or [Recipe()]]  # type: ignore[arg-type]


def parse_lengths(text: str) -> tuple[int, ...]:
    """`1k,2k,4096` -> tokens, without repetitions. Raises UsageError."""
    found: list[int] = []
    for item in _items("--lengths", text):
        number = item.lower().removesuffix("k")
        factor = 1024 if number != item.lower() else 1
        if not number.isascii() or not number.isdigit() or int(number) == 0:
            raise UsageError(f"--lengths has '{item}': use whole numbers of tokens from 1 on, as in 1k,2k,4096")
        found.append(int(number) * factor)
    return tuple(dict.fromkeys(found))


def parse_depths(text: str) -> tuple[float, ...]:
    """A count (`5` -> 0, 0.25, … 1; `1` -> 0.5) or a list of shares (`0,0.5,90%`). Raises UsageError."""
    items = _items("--depths", text)
    if len(items) == 1 and items[0].isascii() and items[0].lstrip("-").isdigit():
        count = int(items[0])
        if not 1 <= count <= MOST_DEPTHS:
            raise UsageError(f"--depths is {count}: use 1 to {MOST_DEPTHS} places, or a list such as 0,0.5,90%")
        return (0.5,) if count == 1 else tuple(place / (count - 1) for place in range(count))
    return tuple(dict.fromkeys(_share(item) for item in items))


def _share(item: str) -> float:
    try:
        depth = float(item.removesuffix("%")) / (100 if item.endswith("%") else 1)
    except ValueError:
        depth = -1.0
    if not 0 <= depth <= 1:
        raise UsageError(f"--depths has '{item}': use shares from 0 to 1 or 0% to 100%, as in 0,0.5,90%, or a count")
    return depth


def _items(option: str, text: str) -> list[str]:
    items = [item.strip() for item in text.split(",") if item.strip()]
    if not items:
        raise UsageError(f"{option} is empty: give at least one value")
    return items


def show(result: NeedleReport) -> None:
    """A table for each recipe, depths down and lengths across, then all recipes in one sentence."""
    from fewer.evaluation.needle_report import headline, nats, notes, percent

    lengths, depths = sorted(result.settings.lengths), sorted(result.settings.depths)
    titles = [f"{length:,}" for length in lengths]

    def figure(row: RecipeTrials, length: int, depth: float | None = None) -> str:
        cell = row.cell(length, depth)
        return "–" if cell is None else f"{percent(cell.exact)}  {nats(cell.nll)}"

    for row in result.rows:
        if row.failure is not None:
            print(f"{row.name} was not measured: {row.failure}")
            continue
        lines = [(f"{100 * depth:.3g}%", *(figure(row, length, depth) for length in lengths)) for depth in depths]
        if len(depths) > 1:
            lines.append(("all", *(figure(row, length) for length in lengths)))
        print(row.name)
        print_table(table(("depth", *titles), lines, right=("depth", *titles)))
    print(headline(result))
    for line in notes(result):
        note(line)
