"""A comparison as JSON, and as one HTML page that needs nothing else: no script, font or picture from elsewhere."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from fewer.errors import FewerError, UsageError
from fewer.evaluation.charts import Bar, Point, scatter, stacked_bars
from fewer.evaluation.columns import COLUMNS, Column, headline, is_best, megabytes, notes, percent, rate, small
from fewer.evaluation.comparison import Comparison, Row


def write_json(comparison: Comparison, path: Path) -> None:
    """Strict JSON, whole or not at all. Raises FewerError."""
    write_atomically(path, to_json(comparison))


def to_json(comparison: Comparison) -> str:
    return json.dumps(comparison.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_html(comparison: Comparison, path: Path) -> None:
    """The page, whole or not at all. Raises FewerError."""
    write_atomically(path, html_page(comparison))


def write_atomically(path: Path, text: str) -> None:
    """Write beside `path` and rename, so that a reader never sees half a file. Raises FewerError."""
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # as an ordinary file, not as a temporary one
        os.replace(temporary, path)
        temporary = None
    except OSError as fault:
        raise FewerError(f"cannot write {path}: {fault.strerror or fault}") from None
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Before minutes of measuring: raises UsageError where `path` cannot become a file."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder: name a file to write")
    existing = next((folder for folder in path.absolute().parents if folder.exists()), Path("/"))
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UsageError(f"cannot write {path}: {existing} is no folder that can be written to")


def html_page(comparison: Comparison) -> str:
    """Every text in it is escaped: names of models and recipes are a stranger's words."""
    values = {
        "title": escape(f"{comparison.model}: recipes compared"),
        "model": escape(comparison.model),
        "headline": escape(headline(comparison)),
        "head": "".join(_head(index, column) for index, column in enumerate(COLUMNS, start=1)),
        "body": "".join(_row(comparison, row) for row in comparison.rows),
        "quality_plot": _quality_plot(comparison),
        "memory_plot": _memory_plot(comparison),
        "notes": "".join(f"<li>{escape(note)}</li>" for note in notes(comparison)),
        "facts": _facts(comparison),
    }
    return fill_page("report.html", values)


def fill_page(name: str, values: Mapping[str, str]) -> str:
    """A page of this package, with the style that all of them share in it. Values are HTML already."""
    pages = resources.files("fewer.evaluation")
    template, style = (pages.joinpath(file).read_text(encoding="utf-8") for file in (name, "page.css"))
    return Template(template).substitute(values, style=style)


def _head(index: int, column: Column) -> str:
    title = escape(column.title)
    return (
        f'<th scope="col" class="figure" title="{escape(column.meaning)}">'
        f'<button type="button" data-column="{index}">{title}</button></th>'
    )


def _row(comparison: Comparison, row: Row) -> str:
    tag = ' <span class="tag">baseline</span>' if row is comparison.baseline else ""
    name = f'<th scope="row" data-value="{escape(row.name)}">{escape(row.name)}{tag}</th>'
    if row.failure is not None:
        reason = f'<td class="failure" colspan="{len(COLUMNS)}">not measured: {escape(row.failure)}</td>'
        return f'<tr class="failed">{name}{reason}</tr>'
    return f"<tr>{name}{''.join(_cell(comparison, row, column) for column in COLUMNS)}</tr>"


def _cell(comparison: Comparison, row: Row, column: Column) -> str:
    value = column.median(comparison, row)
    if value is None:
        return '<td class="figure none">–</td>'
    best = " best" if is_best(column, comparison, row) else ""
    spread = column.spread(comparison, row)
    below = f"<small>{escape(spread)}</small>" if spread else ""
    return f'<td class="figure{best}" data-value="{value!r}">{escape(column.text(value))}{below}</td>'


def _quality_plot(comparison: Comparison) -> str:
    points = []
    for row in comparison.rows:
        speed, quality = row.spread(lambda each: each.decode_rate), row.quality
        if not row.measured or speed is None or quality is None or quality.kl is None:
            continue
        unchanged = "" if quality.unchanged is None else f", {percent(quality.unchanged)} of greedy tokens unchanged"
        tooltip = (
            f"{row.name}: {rate(speed.median)} tokens/s ({rate(speed.low)}–{rate(speed.high)}), "
            f"KL {small(quality.kl)}{unchanged}"
        )
        points.append(
            Point(row.name, speed.median, speed.low, speed.high, quality.kl, tooltip, row is comparison.baseline)
        )
    if not points:
        return '<p class="none">No recipe has both figures.</p>'
    return scatter(points, "decoding, tokens/s", "KL divergence, nats a token")


def _memory_plot(comparison: Comparison) -> str:
    bars = []
    for row in comparison.rows:
        if row.failure is None and row.weight_bytes is not None and row.kv_bytes is not None:
            text = f"{megabytes(row.weight_bytes)} + {megabytes(row.kv_bytes)} MB"
            tooltip = (
                f"{row.name}: weights {megabytes(row.weight_bytes)} MB, keys and values {megabytes(row.kv_bytes)} MB"
            )
            bars.append(Bar(row.name, (row.weight_bytes / 1e6, row.kv_bytes / 1e6), text, tooltip))
    if not bars:
        return '<p class="none">No recipe was measured.</p>'
    tokens = comparison.prompt_tokens
    return stacked_bars(bars, ("weights", f"keys and values of {tokens:,} tokens"), "memory, MB")


def _facts(comparison: Comparison) -> str:
    facts: Mapping[str, object] = {
        "model": comparison.model,
        "fingerprint": comparison.fingerprint[:16],
        **comparison.architecture,
        **comparison.machine,
        "dtype": comparison.settings.dtype or "bfloat16",
        "measured": comparison.started,
        "took": f"{comparison.seconds:.0f} s",
    }
    return "".join(
        f"<div><dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(str(value))}</dd></div>"
        for name, value in facts.items()
    )
