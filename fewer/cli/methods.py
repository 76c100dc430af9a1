"""`fewer methods`: the catalogue, from the registrations."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from fewer.cli import options as o
from fewer.cli.catalogue import SLOTS, catalogue
from fewer.cli.output import print_json, print_table, table
from fewer.errors import UsageError


def methods(
    slot: Annotated[
        str | None,
        typer.Argument(autocompletion=lambda: list(SLOTS), metavar="[SLOT]", help=f"One of {', '.join(SLOTS)}."),
    ] = None,
    settings: Annotated[bool, typer.Option("--settings", "-s", help="Also list each method's settings.")] = False,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """List the methods, or those of one SLOT, with their papers and settings."""
    if slot is not None and slot not in SLOTS:
        raise UsageError(f"unknown slot '{slot}': allowed are {', '.join(SLOTS)}")
    entries = catalogue(slot)
    if json:
        print_json([dataclasses.asdict(entry) for entry in entries])
        return
    rows = [
        (
            entry.slot,
            entry.name,
            "exact" if entry.lossless else "",
            f"arXiv {entry.paper}" if entry.paper else "",
            entry.summary,
        )
        for entry in entries
    ]
    print_table(table(("slot", "method", "output", "paper", "what it does"), rows))
    if settings:
        fields = [
            (
                entry.name,
                field.name,
                field.kind,
                field.default if field.default is not None else "required",
                field.meaning,
            )
            for entry in entries
            for field in entry.settings
        ]
        print_table(table(("method", "setting", "kind", "default", "meaning"), fields))
