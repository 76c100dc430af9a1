"""The registered methods, read from their source: a listing and shell completion must not wait for torch.

A method file carries everything that is shown: `@method(...)` with literal arguments, the first line of its docstring,
and the config dataclass with defaults and a comment a field. `fewer.registry` is what runs them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fewer

SLOTS = ("weights", "cache", "experts", "decoding")


@dataclass(frozen=True)
class Setting:
    """A field of a method's config, as its source spells it."""

    name: str
    kind: str
    default: str | None  # None: must be given
    meaning: str  # the comment beside it


@dataclass(frozen=True)
class Entry:
    name: str
    slot: str
    paper: str | None
    lossless: bool
    summary: str
    settings: tuple[Setting, ...]
    fitted: bool = False  # it has something to learn: `fewer train` fits it


def catalogue(slot: str | None = None) -> list[Entry]:
    """Every method, or those of one slot, by slot and then in the order in which the slot's package imports them."""
    return [entry for each in SLOTS if slot in (None, each) for entry in _in_package(each)]


def _in_package(slot: str) -> Iterator[Entry]:
    folder = Path(fewer.__file__).parent / slot
    prefix = f"fewer.{slot}."
    for node in ast.parse((folder / "__init__.py").read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(prefix):
            path = folder.joinpath(*node.module.removeprefix(prefix).split("."))
            yield from _in_file(path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py")


def _in_file(path: Path) -> Iterator[Entry]:
    source = path.read_text()
    module = ast.parse(source)
    summary = (ast.get_docstring(module) or "").partition("\n")[0].rstrip(".")
    classes = {node.name: node for node in module.body if isinstance(node, ast.ClassDef)}
    for node in module.body:
        for call in getattr(node, "decorator_list", ()):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "method":
                given: dict[str, ast.expr] = {keyword.arg or "": keyword.value for keyword in call.keywords}
                values: dict[str, Any] = {k: v.value for k, v in given.items() if isinstance(v, ast.Constant)}
                config = given.get("config")
                fields = classes.get(config.id) if isinstance(config, ast.Name) else None
                yield Entry(
                    name=str(ast.literal_eval(call.args[0])),
                    slot=values["slot"],
                    paper=values.get("paper"),
                    lossless=values["lossless"],
                    summary=summary,
                    settings=tuple(_settings(fields, source.splitlines())) if fields else (),
                    fitted="fit" in given,
                )


def _settings(config: ast.ClassDef, lines: list[str]) -> Iterator[Setting]:
    for node in config.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            end = node.end_lineno or node.lineno
            rest = lines[end - 1].encode()[node.end_col_offset :].decode()  # offsets count bytes
            default = None if node.value is None else ast.unparse(node.value)
            yield Setting(node.target.id, ast.unparse(node.annotation), default, rest.partition("#")[2].strip())
