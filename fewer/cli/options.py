"""The options that verbs share, so that each is spelled, explained and completed in one way."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from fewer.checkpoint.aliases import ALIASES, DEFAULT_MODEL
from fewer.errors import UsageError

RECIPE, RUN, SAMPLING = "Recipe", "Machine", "Sampling"


def complete_model(incomplete: str) -> Iterable[tuple[str, str]]:
    """Aliases, then files and folders that begin so."""
    yield from ((name, alias.title) for name, alias in ALIASES.items() if name.startswith(incomplete))
    folder, _, start = incomplete.rpartition("/")
    for path in sorted(Path(folder or ("/" if incomplete.startswith("/") else ".")).expanduser().glob(f"{start}*")):
        if path.is_dir() or path.suffix == ".gguf":
            yield (f"{folder}/{path.name}" if "/" in incomplete else path.name) + ("/" if path.is_dir() else ""), ""


def _complete_method(slot: str, incomplete: str) -> Iterable[tuple[str, str]]:
    from fewer.cli.catalogue import catalogue

    return [(entry.name, entry.summary) for entry in catalogue(slot) if entry.name.startswith(incomplete)]


def complete_weights(incomplete: str) -> Iterable[tuple[str, str]]:
    return _complete_method("weights", incomplete)


def complete_cache(incomplete: str) -> Iterable[tuple[str, str]]:
    return _complete_method("cache", incomplete)


def complete_experts(incomplete: str) -> Iterable[tuple[str, str]]:
    return _complete_method("experts", incomplete)


def complete_decoding(incomplete: str) -> Iterable[tuple[str, str]]:
    return _complete_method("decoding", incomplete)


def _not_blank(text: str) -> str:
    if not text.strip():
        raise UsageError("the prompt is empty: give some text, or - to read it from stdin")
    return text


def _positive(parameter: typer.CallbackParam, count: int | None) -> int | None:
    if count is not None and count < 1:
        raise UsageError(f"{parameter.opts[0]} is {count}: use a whole number from 1 on")
    return count


Prompt = Annotated[str, typer.Argument(callback=_not_blank, help="The text; - reads it from stdin.")]
Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", metavar="MODEL", autocompletion=complete_model, help="Alias, .gguf file, folder or hub id."
    ),
]
ModelArgument = Annotated[
    str, typer.Argument(autocompletion=complete_model, metavar="[MODEL]", help="Alias, .gguf file, folder or hub id.")
]
Weights = Annotated[
    str | None,
    typer.Option(
        "--weights",
        "-w",
        metavar="SPEC",
        autocompletion=complete_weights,
        rich_help_panel=RECIPE,
        help="Method for the weights, as in int4:group=64. (default: auto)",
    ),
]
Cache = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC",
        autocompletion=complete_cache,
        rich_help_panel=RECIPE,
        help="Method for keys and values, as in sink-window:window=508. (default: full)",
    ),
]
Decoding = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC",
        autocompletion=complete_decoding,
        rich_help_panel=RECIPE,
        help="Method of decoding, as in prompt-lookup. (default: plain)",
    ),
]
Experts = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC",
        autocompletion=complete_experts,
        rich_help_panel=RECIPE,
        help="Method for mixtures of experts. (default: resident)",
    ),
]
RecipeFile = Annotated[
    Path | None,
    typer.Option(
        "--recipe",
        metavar="FILE.yaml",
        rich_help_panel=RECIPE,
        help="A recipe from a YAML file; the options above override its slots.",
    ),
]
DType = Annotated[
    str | None,
    typer.Option(rich_help_panel=RUN, metavar="DTYPE", help="float32, bfloat16 or float16. (default: bfloat16)"),
]
Device = Annotated[
    str | None,
    typer.Option(rich_help_panel=RUN, metavar="DEVICE", help="cpu, cuda or cuda:N. (default: a GPU if there is one)"),
]
Context = Annotated[
    int | None,
    typer.Option(
        callback=_positive, rich_help_panel=RUN, metavar="TOKENS", help="Tokens of context. (default: the model's)"
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(callback=_positive, rich_help_panel=RUN, metavar="N", help="CPU threads. (default: all cores)"),
]
MaxTokens = Annotated[
    int, typer.Option("--max-tokens", "-n", callback=_positive, metavar="N", help="At most this many new tokens.")
]
Temperature = Annotated[float, typer.Option(rich_help_panel=SAMPLING, help="0 is greedy; 1 is the model's own law.")]
TopK = Annotated[int, typer.Option(rich_help_panel=SAMPLING, help="Keep the K most probable tokens; 0 keeps all.")]
TopP = Annotated[float, typer.Option(rich_help_panel=SAMPLING, help="Keep the fewest tokens that sum to this.")]
MinP = Annotated[
    float, typer.Option(rich_help_panel=SAMPLING, help="Keep tokens at least this fraction of the most probable.")
]
RepetitionPenalty = Annotated[float, typer.Option(rich_help_panel=SAMPLING, help="Above 1 discourages repeats.")]
Seed = Annotated[int | None, typer.Option(rich_help_panel=SAMPLING, help="Makes sampling reproducible.")]
Stop = Annotated[
    list[str] | None, typer.Option("--stop", metavar="TEXT", help="End where this text appears; may be repeated.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of a fault.")]

MODEL_DEFAULT = DEFAULT_MODEL
