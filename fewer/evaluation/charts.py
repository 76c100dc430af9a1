"""Plots as inline SVG: quality against speed, and memory. Colours come from the page's style, so both schemes work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 600
CHARACTER = 6.8  # width of a character of a label, at 12 px


@dataclass(frozen=True)
class Point:
    """One dot: `error` is drawn as a bar from low to high along x."""

    label: str
    x: float
    low: float
    high: float
    y: float
    tooltip: str
    baseline: bool = False


@dataclass(frozen=True)
class Bar:
    label: str
    parts: tuple[float, ...]
    text: str
    tooltip: str


@dataclass(frozen=True)
class Box:
    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, width) * max(0.0, height)


def scatter(points: Sequence[Point], x_title: str, y_title: str, height: int = 400) -> str:
    """x from zero, y from zero on a scale that is linear below 0.001 and logarithmic above."""
    left, right, top, bottom = 66, WIDTH - 24, 34, height - 52
    x_ticks = linear_ticks(max(point.high for point in points))
    y_ticks = log_ticks(max(point.y for point in points))
    most = max(x_ticks[-1], max(point.high for point in points) * 1.04)
    highest = _lift(y_ticks[-1]) * 1.02

    def at_x(value: float) -> float:
        return left + (right - left) * value / most

    def at_y(value: float) -> float:
        return bottom - (bottom - top) * _lift(value) / highest

    parts = [_open(height, f"{y_title} against {x_title}")]
    for tick in x_ticks:
        parts.append(f'<line class="grid" x1="{at_x(tick):.1f}" x2="{at_x(tick):.1f}" y1="{top}" y2="{bottom}"/>')
        parts.append(svg_text(at_x(tick), bottom + 18, f"{tick:g}", "tick", "middle"))
    for tick in y_ticks:
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{at_y(tick):.1f}" y2="{at_y(tick):.1f}"/>')
        parts.append(svg_text(left - 8, at_y(tick) + 4, f"{tick:g}", "tick", "end"))
    parts.append(f'<path class="axis" d="M{left} {top}V{bottom}H{right}"/>')
    parts.append(svg_text((left + right) / 2, height - 10, x_title, "title", "middle"))
    middle = (top + bottom) / 2
    parts.append(svg_text(16, middle, y_title, "title", "middle", f' transform="rotate(-90 16 {middle:.0f})"'))
    parts.append(svg_text(right, top - 14, "better: to the right and down ↘", "tick", "end"))
    dots = [(at_x(point.x), at_y(point.y)) for point in points]
    taken = [Box(x - 7, y - 7, x + 7, y + 7) for x, y in dots]
    taken += [Box(at_x(point.low), y - 3, at_x(point.high), y + 3) for point, (_, y) in zip(points, dots, strict=True)]
    frame = Box(left + 2, top - 8, right, bottom - 2)
    for point, (x, y) in zip(points, dots, strict=True):
        parts.append('<g class="point">')
        parts.append(f"<title>{escape(point.tooltip)}</title>")
        if point.high > point.low:
            low, high = at_x(point.low), at_x(point.high)
            parts.append(f'<path class="error" d="M{low:.1f} {y:.1f}H{high:.1f}"/>')
        kind = "dot baseline" if point.baseline else "dot"
        parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="5.5"/></g>')
    for point, (x, y) in zip(points, dots, strict=True):
        label = shorten(point.label, 60)
        box = place_label(x, y, len(label) * CHARACTER, taken, frame)
        taken.append(box)
        if not _touches(box, x, y):
            end = min(max(x, box.left), box.right), min(max(y, box.top), box.bottom)
            parts.append(f'<path class="leader" d="M{x:.1f} {y:.1f}L{end[0]:.1f} {end[1]:.1f}"/>')
        parts.append(svg_text((box.left + box.right) / 2, box.bottom - 4, label, "label", "middle"))
    return "".join(parts) + "</svg>"


def stacked_bars(bars: Sequence[Bar], names: Sequence[str], x_title: str) -> str:
    """Horizontal bars, one a row, their label above each."""
    row, top = 46, 40
    height = top + row * len(bars) + 44
    left, right, bottom = 16, WIDTH - 24, top + row * len(bars)
    largest = max(sum(bar.parts) for bar in bars)
    room = max(len(bar.text) for bar in bars) * CHARACTER + 12  # for the text behind the longest bar
    ticks = linear_ticks(largest)

    def width(value: float) -> float:
        return (right - left - room) * value / max(largest, 1e-9)

    parts = [_open(height, x_title)]
    for index, name in enumerate(names):
        x = left + sum(len(each) * CHARACTER + 34 for each in names[:index])
        parts.append(f'<rect class="part{index}" x="{x:.1f}" y="8" width="12" height="12" rx="2"/>')
        parts.append(svg_text(x + 18, 18, name, "tick", "start"))
    for tick in ticks:
        x = left + width(tick)
        if x <= right:
            parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
            parts.append(svg_text(x, bottom + 16, f"{tick:g}", "tick", "middle"))
    parts.append(svg_text((left + right - room) / 2, height - 8, x_title, "title", "middle"))
    for index, bar in enumerate(bars):
        y, x = top + row * index, float(left)
        parts.append(f"<g><title>{escape(bar.tooltip)}</title>")
        parts.append(svg_text(left, y + 15, shorten(bar.label, 90), "label", "start"))
        for part, value in enumerate(bar.parts):
            parts.append(
                f'<rect class="part{part}" x="{x:.1f}" y="{y + 21}" width="{max(width(value), 0.5):.1f}" height="16"/>'
            )
            x += width(value)
        parts.append(svg_text(x + 8, y + 33, bar.text, "tick", "start") + "</g>")
    return "".join(parts) + "</svg>"


def place_label(x: float, y: float, width: float, taken: Sequence[Box], frame: Box) -> Box:
    """Where a label for the dot at (x, y) collides least: beside the dot first, then farther away."""
    best, least = None, math.inf
    for distance in (0, 14, 28, 44, 62, 82, 104, 128):
        for across, down in ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (1, 1), (-1, -1), (-1, 1)):
            gap = 10 + (distance if down == 0 else 0)
            left = x + gap if across > 0 else x - gap - width if across < 0 else x - width / 2
            centre = y + down * (18 + distance)
            left = min(max(left, frame.left), frame.right - width)
            box = Box(left, centre - 9, left + width, centre + 9)
            outside = max(0.0, frame.top - box.top) + max(0.0, box.bottom - frame.bottom)
            cost = sum(box.overlap(other) for other in taken) + 100 * outside + distance * 0.01
            if cost < least:
                best, least = box, cost
        if least < 1:
            break
    assert best is not None
    return best


def linear_ticks(largest: float, count: int = 5) -> list[float]:
    """Round steps from zero to the first one at or above `largest`."""
    if largest <= 0:
        return [0.0, 1.0]
    step = 10 ** math.floor(math.log10(largest / count))
    step = next(step * factor for factor in (1, 2, 2.5, 5, 10) if step * factor * count >= largest)
    return [round(step * index, 10) for index in range(math.ceil(largest / step - 1e-9) + 1)]


def log_ticks(largest: float) -> list[float]:
    """0, 0.001, 0.01 … up to the first power of ten at or above `largest`."""
    ticks, tick = [0.0, 0.001], 0.001
    while tick < largest and tick < 1e6:
        tick *= 10
        ticks.append(round(tick, 10))
    return ticks


def shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _lift(value: float) -> float:
    return math.log10(1 + value / 0.001)


def _touches(box: Box, x: float, y: float) -> bool:
    near = Box(x - 14, y - 14, x + 14, y + 14)
    return box.overlap(near) > 0


def _open(height: int, title: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'


def svg_text(x: float, y: float, text: str, kind: str, anchor: str, more: str = "") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(text)}</text>'
