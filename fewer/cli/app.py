"""`fewer VERB …`: the list of verbs."""

from __future__ import annotations

from typing import Annotated

import typer

import fewer
from fewer.cli import (
    bench,
    chat,
    compare,
    compress,
    doctor,
    evaluate,
    generate,
    inspect,
    methods,
    models,
    perplexity,
    train,
)
from fewer.cli.verb import Verb, VerbOfLists, Verbs

app = typer.Typer(
    name="fewer",
    cls=Verbs,
    help="Run, compare and compress open language models with fewer bits, tokens, experts and steps.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # a defect of ours keeps its plain traceback
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fewer {fewer.__version__}")
        raise typer.Exit


@app.callback()
def fewer_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


for _verb in (
    generate.generate,
    chat.chat,
    compare.compare,
    bench.bench,
    perplexity.perplexity,
    compress.compress,
    train.train,
    methods.methods,
    inspect.inspect,
    doctor.doctor,
):
    app.command(cls=VerbOfLists if _verb is compare.compare else Verb)(_verb)
app.add_typer(evaluate.app, name="evaluate")
app.add_typer(models.app, name="models")


def main() -> None:
    """The entry point. Exits with 0, 1 (failed), 2 (bad usage) or 130 (Ctrl-C)."""
    app(prog_name="fewer")
