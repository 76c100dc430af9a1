"""`fewer compare`: several recipes on one model, one table, a page and a JSON file."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fewer.cli import options as o
from fewer.cli.loading import parse_recipes, prepare
from fewer.cli.output import note, print_table, table
from fewer.cli.progress import Bars
from fewer.cli.verb import INTERRUPTED
from fewer.errors import FewerError

if TYPE_CHECKING:
    from fewer.evaluation.columns import Column
    from fewer.evaluation.comparison import Comparison, Row
    from fewer.recipe import Recipe

DEFAULT_RECIPES = (
    "weights=dense",
    "weights=int8",
    "weights=int4",
    "weights=int4 cache=sink-window:window=252",
    "weights=int4 decoding=prompt-lookup",
    "weights=int4 cache=sink-window:window=252 decoding=prompt-lookup",
)
MEASURING, OUTPUT = "Measuring", "Output"
WIDE = 180  # columns of a terminal that hold every figure with its spread


def compare(
    model: o.Model = o.MODEL_DEFAULT,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            "--recipe",
            "-r",
            metavar="RECIPE",
            rich_help_panel=o.RECIPE,
            help="As in 'weights=int4 cache=sink-window', or a YAML file; several may follow. (default: six)",
        ),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            "--weights",
            "-w",
            metavar="SPEC",
            autocompletion=o.complete_weights,
            rich_help_panel=o.RECIPE,
            help="Another recipe: the default one (or each --recipe) with these weights; several may follow.",
        ),
    ] = None,
    cache: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SPEC", autocompletion=o.complete_cache, rich_help_panel=o.RECIPE, help="The same for the cache."
        ),
    ] = None,
    decoding: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SPEC", autocompletion=o.complete_decoding, rich_help_panel=o.RECIPE, help="The same for decoding."
        ),
    ] = None,
    experts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SPEC", autocompletion=o.complete_experts, rich_help_panel=o.RECIPE, help="The same for experts."
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=MEASURING,
            help="Prompts: one a line, or longer ones between lines of '---'. (default: eight of ours)",
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=MEASURING,
            help="Text for perplexity. (default: the prompts and what the uncompressed model writes)",
        ),
    ] = None,
    text_tokens: Annotated[
        int, typer.Option(min=2, metavar="N", rich_help_panel=MEASURING, help="Tokens of --text, at most.")
    ] = 1024,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", min=2, metavar="N", rich_help_panel=MEASURING, help="Of each answer.")
    ] = 32,
    rounds: Annotated[
        int, typer.Option(min=1, metavar="N", rich_help_panel=MEASURING, help="Times that everything is measured.")
    ] = 3,
    batch: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            rich_help_panel=MEASURING,
            help="Prompts answered at once; what they begin with alike is computed once by caches that can.",
        ),
    ] = 1,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", rich_help_panel=MEASURING, help="Length of the prefill that is timed.")
    ] = 768,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", rich_help_panel=OUTPUT, help="Write a page with table and plots.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option(metavar="FILE", rich_help_panel=OUTPUT, help="Write the figures as JSON.")
    ] = None,
    dtype: o.DType = None,
    device: o.Device = None,
    context: o.Context = None,
    threads: o.Threads = None,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Run several recipes on one model, in turn, and print what each gains and what it costs."""
    prepare(threads)
    from fewer.evaluation.compare import compare
    from fewer.evaluation.comparison import Settings
    from fewer.evaluation.prompts import read_prompts, read_text
    from fewer.evaluation.report import check_writable, to_json, write_html, write_json

    recipes = choose_recipes(recipe or [], weights, cache, decoding, experts)
    given = None if prompts is None else read_prompts(prompts)
    words = None if text is None else read_text(text)
    for path in (html, json_file):
        if path is not None:
            check_writable(path)
    settings = Settings(
        max_tokens=max_tokens,
        rounds=rounds,
        batch=batch,
        prompt_tokens=prompt_tokens,
        text_tokens=text_tokens,
        dtype=dtype,
        device=device,
        context=context,
    )
    with Bars() as bars:
        name = "" if text is None else str(text)
        result = compare(model, recipes, settings, given, words, name, Stages(bars), progress=bars)
    if json_file is not None:
        write_json(result, json_file)
    if html is not None:
        write_html(result, html)
    if json:
        print(to_json(result), end="")
    else:
        show(result)
    for path in (html, json_file):
        if path is not None:
            note(f"wrote {path}")
    if result.interrupted:
        raise typer.Exit(INTERRUPTED)
    if not any(row.measured for row in result.rows):
        raise FewerError(f"no recipe could be measured: {result.rows[0].failure}")


def choose_recipes(
    texts: list[str],
    weights: list[str] | None = None,
    cache: list[str] | None = None,
    decoding: list[str] | None = None,
    experts: list[str] | None = None,
) -> list[Recipe]:
    """The recipes given, or six; with values for slots, the default (or each given) recipe with one slot changed."""
    from fewer.evaluation.comparison import unique
    from fewer.recipe import Recipe

    axes = {"weights": weights, "cache": cache, "decoding": decoding, "experts": experts}
    changes = [{slot: spec} for slot, specs in axes.items() for spec in specs or ()]
    if not changes:
        return parse_recipes(texts or list(DEFAULT_RECIPES))
    bases = parse_recipes(texts) or [Recipe()]
    unnamed = [{key: value for key, value in base.to_mapping().items() if key != "name"} for base in bases]
    varied = [Recipe.from_mapping(base | change) for base in unnamed for change in changes]
    # One changed recipe needs something to be held against.
    return unique(bases + varied if len(varied) == 1 else varied)


class Stages:
    """Progress of a comparison: a bar on a terminal, elsewhere a line when something new begins."""

    def __init__(self, bars: Bars):
        self.bars, self.label = bars, ""

    def __call__(self, label: str, done: int, total: int) -> None:
        if label != self.label and not sys.stderr.isatty():
            note(label)
        self.label = label
        self.bars.step(label, done, total)


def show(result: Comparison) -> None:
    """The table (two on a narrow terminal), then what a reader must know beside it."""
    from fewer.evaluation.columns import COLUMNS, headline, notes

    wide = not sys.stdout.isatty() or shutil.get_terminal_size().columns >= WIDE
    for columns in (COLUMNS,) if wide else (COLUMNS[:7], COLUMNS[7:]):
        titles = [column.title for column in columns]
        rows = [(_name(result, row), *(_cell(result, row, column, wide) for column in columns)) for row in result.rows]
        print_table(table(("recipe", *titles), rows, right=titles))
    for row in result.rows:
        if row.failure is not None:
            print(f"{row.name} was not measured: {row.failure}")
    print(headline(result))
    for line in notes(result):
        note(line)


def _name(result: Comparison, row: Row) -> str:
    return row.name + (" (baseline)" if row is result.baseline else "")


def _cell(result: Comparison, row: Row, column: Column, wide: bool) -> str:
    median = column.median(result, row)
    if median is None or row.failure is not None:
        return "–"
    spread = column.spread(result, row)
    return column.text(median) + (f"\n{spread}" if spread and wide else "")
