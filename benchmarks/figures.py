"""Writes the generated blocks of README.md and docs/: `python -m benchmarks.figures`, or `make docs`.

A block stands between `<!-- figures:NAME -->` and `<!-- end -->`. Methods and models come from the source, figures from
the JSON files in `benchmarks/results`; a file that is not there is named in the block.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks import figure_tables, h200_caches_tables
from benchmarks.records import RESULTS, read

ROOT = Path(__file__).parents[1]
PAGES = {Path("README.md"): "docs/methods/", Path("docs/methods/README.md"): ""}  # page -> where methods' pages lie
PAGES |= {Path("docs/performance.md"): "methods/"}
PAGES |= {Path(f"docs/methods/{method}.md"): "" for method in h200_caches_tables.METHODS}
MEASURED = {  # block -> how it is drawn, and the command that measures it
    "peers": (figure_tables.peers, "python -m benchmarks.peers"),
    "exactness": (figure_tables.exactness, "python -m benchmarks.exactness"),
    "compare": (figure_tables.compare, "fewer compare --json-file benchmarks/results/compare.json"),
    "h200": (figure_tables.h200, "python -m benchmarks.h200 --out benchmarks/results"),
}
CACHES = "h200_caches"  # and h200_caches-METHOD: the part of it for one method's page
BLOCK = re.compile(r"(<!-- figures:([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def block(name: str, methods: str, results: Path = RESULTS) -> str:
    """The text of one block. Raises KeyError for a name that no table has."""
    if name == "methods":
        return figure_tables.methods(methods)
    if name == "models":
        return figure_tables.models()
    draw: Callable[[figure_tables.Report], str]
    if name == CACHES or name.removeprefix(f"{CACHES}-") in h200_caches_tables.METHODS:
        draw = partial(h200_caches_tables.h200_caches, method=name[len(CACHES) + 1 :])
        name, command = CACHES, "python -m benchmarks.h200_caches --out benchmarks/results"
    else:
        draw, command = MEASURED[name]
    report = read(name, results)
    if report is None:
        return f"Not measured yet: `{command}` writes `benchmarks/results/{name}.json`, and `make docs` this table."
    return draw(report)


def regenerate(text: str, methods: str, results: Path = RESULTS) -> str:
    """A page with its blocks written anew; everything else stays."""
    return BLOCK.sub(lambda found: f"{found[1]}{block(found[2], methods, results)}\n{found[3]}", text)


def main() -> None:
    for page, methods in PAGES.items():
        before = (ROOT / page).read_text(encoding="utf-8")
        after = regenerate(before, methods)
        (ROOT / page).write_text(after, encoding="utf-8")
        print(f"{page}: {'unchanged' if before == after else 'written'}", file=sys.stderr)


if __name__ == "__main__":
    main()
