"""Depth against length as a picture: one panel a recipe, on a page that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from fewer.evaluation.charts import WIDTH, svg_text
from fewer.evaluation.columns import megabytes
from fewer.evaluation.needle import Cell
from fewer.evaluation.needle_report import NeedleReport, RecipeTrials, headline, nats, notes, percent
from fewer.evaluation.report import fill_page, write_atomically

LEFT, TOP, RIGHT, BELOW = 66, 12, 16, 50  # around the cells
ROW = 44  # height of a cell
NARROWEST = 36  # width of a cell that has room for its figures
FAINTEST = 0.04  # opacity of a cell in which nothing was found
DARK = 0.55  # from this opacity on, letters take the page's colour


def write_html(report: NeedleReport, path: Path) -> None:
    """The page, whole or not at all. Raises FewerError."""
    write_atomically(path, html_page(report))


def html_page(report: NeedleReport) -> str:
    """Every text in it is escaped: names of models and recipes are a stranger's words."""
    facts = {"model": report.model, "fingerprint": report.fingerprint[:16], **report.machine}
    facts["took"] = f"{report.seconds:.0f} s"
    return fill_page(
        "heat_map.html",
        {
            "title": escape(f"{report.model}: needles in a haystack"),
            "model": escape(report.model),
            "headline": escape(headline(report)),
            "panels": "".join(_figure(report, row) for row in report.rows),
            "notes": "".join(f"<li>{escape(note)}</li>" for note in notes(report)),
            "facts": "".join(
                f"<div><dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(str(value))}</dd></div>"
                for name, value in facts.items()
            ),
        },
    )


def _figure(report: NeedleReport, row: RecipeTrials) -> str:
    overall = row.cell()
    if row.failure is not None:
        below = f'<p class="failure">not measured: {escape(row.failure)}</p>'
    elif overall is None:
        below = '<p class="none">not reached</p>'
    else:
        found = f"{percent(overall.exact)} found, {nats(overall.nll)} nats a token"
        said = f"{found}, keys and values {megabytes(overall.kv_bytes)} MB"
        picture = panel(row, sorted(report.settings.lengths), sorted(report.settings.depths))
        below = f"<figcaption>{escape(said)}</figcaption>{picture}"
    return f"<figure><h2>{escape(row.name)}</h2>{below}</figure>"


def panel(row: RecipeTrials, lengths: Sequence[int], depths: Sequence[float]) -> str:
    """An SVG with a cell for each length (across) and depth (down): the stronger its colour, the more was found."""
    wide = (WIDTH - LEFT - RIGHT) / len(lengths)
    every = math.ceil(NARROWEST / wide)  # columns whose length is written below
    bottom = TOP + ROW * len(depths)
    title = escape(f"Share found by depth and length: {row.name}")
    parts = [f'<svg viewBox="0 0 {WIDTH} {bottom + BELOW}" role="img" aria-label="{title}">']
    for down, depth in enumerate(depths):
        y = TOP + ROW * down
        parts.append(svg_text(LEFT - 8, y + ROW / 2 + 4, f"{100 * depth:.3g}%", "tick", "end"))
        for across, length in enumerate(lengths):
            parts.append(_cell(LEFT + wide * across, y, wide, row.cell(length, depth), length, depth))
    for across, length in enumerate(lengths):
        if across % every == 0:
            parts.append(svg_text(LEFT + wide * (across + 0.5), bottom + 18, f"{length:,}", "tick", "middle"))
    middle = (TOP + bottom) / 2
    parts.append(svg_text(LEFT + wide * len(lengths) / 2, bottom + 40, "tokens", "title", "middle"))
    parts.append(svg_text(16, middle, "depth", "title", "middle", f' transform="rotate(-90 16 {middle:.0f})"'))
    return "".join(parts) + "</svg>"


def _cell(x: float, y: float, wide: float, cell: Cell | None, length: int, depth: float) -> str:
    box = f'x="{x + 1:.1f}" y="{y + 1:.1f}" width="{wide - 2:.1f}" height="{ROW - 2}" rx="3"'
    if cell is None:
        return f'<rect class="cell missing" {box}/>'
    opacity = FAINTEST + (1 - FAINTEST) * cell.exact
    dark = " on-dark" if opacity > DARK else ""
    tooltip = (
        f"{length:,} tokens, depth {100 * depth:.3g}%: {percent(cell.exact)} of {cell.trials} found, "
        f"{nats(cell.nll)} nats a token"
    )
    figures = [
        svg_text(x + wide / 2, y + 19, percent(cell.exact), f"share{dark}", "middle"),
        svg_text(x + wide / 2, y + 34, nats(cell.nll), f"small{dark}", "middle"),
    ]
    shown = "".join(figures) if wide >= NARROWEST else ""
    return f'<g><title>{escape(tooltip)}</title><rect class="cell" {box} fill-opacity="{opacity:.3f}"/>{shown}</g>'
