"""Tables of `h200_caches.json` for the pages: the targets, and each cache's steps beside dense ones.

A figure that was not measured is said to be so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from benchmarks.figure_tables import NOT_MEASURED, factor, percent, table
from benchmarks.h200_caches_bytes import length_name
from benchmarks.h200_caches_targets import Caches, Report, Target, figure, number, ratio, targets

METHODS = ("duo-attention", "lserve", "tidal-decode", "hydragen", "a2sf")
STEPS = re.compile(
    r"(llama-2-7b )?(dense|duo-attention|lserve \d+-bit|tidal-decode \d+|tidal-decode|a2sf|quest|h2o|sink-window) \S+"
)
VERDICTS = {None: NOT_MEASURED, True: "yes", False: "no"}


def h200_caches(report: Report, method: str = "") -> str:
    """Targets and steps of all caches, or of one `method`."""
    wanted = [target for target in targets(report) if method in ("", target.method)]
    parts = [_environment(report), "", _targets(wanted)]
    steps = list(_steps(report, method))
    if steps:
        parts += ["", _step_table(steps)]
    prefixes = list(_prefixes(report)) if method in ("", "hydragen") else []
    if prefixes:
        titles = ("cache", "rows", "prefix", "step ms", "tokens/s", "attention ms", "KV GB", "× prefix + rows × own")
        parts += ["", table(titles, prefixes)]
    return "\n".join(parts)


def _environment(report: Report) -> str:
    about, rates = report.get("environment", {}), report.get("bandwidth", {})
    gpu = about.get("gpu", about.get("device", "unknown GPU"))
    read = max((rates.get(f"{kind}_bytes_per_second", 0) for kind in ("read", "copy")), default=0)
    commit = f", commit {about['commit']}" if "commit" in about else ""
    limit = f" It reads {read / 1e12:.2f} TB/s." if read else ""
    return (
        f"{gpu}, torch {about.get('torch', '?')}, Triton {about.get('triton', '?')}{commit}.{limit} Llama-3-8B shapes "
        "with random weights, bfloat16, batch 1 unless rows are named; dense attention in the same run."
    )


def _targets(wanted: list[Target]) -> str:
    rows = [
        (
            f"`{target.method}`",
            target.what,
            target.wanted,
            NOT_MEASURED if target.found is None else factor(target.found),
            VERDICTS[target.met],
        )
        for target in wanted
    ]
    return table(("method", "measure", "target", "measured", "met"), rows)


def _step_table(rows: list[tuple[str, ...]]) -> str:
    titles = (
        "cache", "context", "prefill s", "step ms", "× dense", "floor ms", "of floor", "attention ms", "KV GB", "ran",
    )  # fmt: skip
    return table(titles, rows)


def _steps(report: Report, method: str) -> Iterator[tuple[str, ...]]:
    """A row a section that measured steps; `floor` is what reading weights and keys once would take."""
    found = Caches(report)
    for section in report:
        matched = STEPS.fullmatch(section)
        context = figure(report, section, "context")
        if matched is None or context is None:
            continue
        kind = matched[2]
        if method and kind != "dense" and not kind.startswith(method):
            continue
        dense = f"{matched[1] or ''}dense {length_name(context)}"
        if method and kind == "dense" and not _has_other(report, method, section, context):
            continue
        step, floor = number(report, section, "decode", "seconds"), number(report, section, "floor_seconds")
        yield (
            f"{matched[1] or ''}{kind}",
            f"{context:,}",
            _text(number(report, section, "prefill", "seconds"), 1.0, 1),
            _text(step, 1e3, 2),
            "–" if kind == "dense" else _text(found.step(section, dense), 1.0, 2),
            _text(floor, 1e3, 2),
            _share(ratio(floor, step)),
            _text(number(report, section, "attention", "seconds"), 1e3, 2),
            _text(number(report, section, "cache_bytes"), 1e-9, 2),
            _ran(report, section),
        )


def _has_other(report: Report, method: str, section: str, context: int) -> bool:
    """Whether the method was measured at the context of this dense section, with the same model."""
    prefix = section.partition("dense")[0]
    return any(
        name.startswith(prefix + method) and figure(report, name, "context") == context
        for name in report
        if STEPS.fullmatch(name)
    )


def _ran(report: Report, section: str) -> str:
    """How the steps ran: in a graph, ahead of the host or not, or by the general path, which would be slower."""
    ran = figure(report, section, "decode", "ran") or {}
    return ", ".join(f"{count} {way}" for way, count in ran.items() if count) or "–"


def _prefixes(report: Report) -> Iterator[tuple[str, ...]]:
    for section in report:
        matched = re.fullmatch(r"(hydragen|paged|full) (\d+) rows (\S+)", section)
        if matched is None:
            continue
        failed = figure(report, section, "failed")
        held, once = (number(report, section, name) for name in ("cache_bytes", "once_bytes"))
        yield (
            f"`{matched[1]}`",
            f"{int(matched[2]):,}",
            matched[3],
            str(failed) if failed else _text(number(report, section, "seconds"), 1e3, 1),
            _text(number(report, section, "tokens_per_second"), 1.0, 0),
            _text(number(report, section, "attention_seconds"), 1e3, 2),
            _text(held, 1e-9, 2),
            _text(ratio(held, once), 1.0, 2),
        )


def _text(value: float | None, scale: float, digits: int) -> str:
    return "–" if value is None else f"{value * scale:,.{digits}f}"


def _share(value: float | None) -> str:
    return "–" if value is None else percent(value)
