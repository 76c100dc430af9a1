"""`fewer doctor`: the machine, the versions, and which kernels will run."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fewer.cli import options as o
from fewer.cli.loading import prepare
from fewer.cli.output import print_json, print_table, table


def doctor(
    bandwidth: Annotated[
        bool, typer.Option("--bandwidth/--no-bandwidth", help="Measure the memory bandwidth (half a second).")
    ] = True,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Show the machine, the versions and the kernels in use; say what is amiss."""
    prepare()
    from fewer.cli.machine import examine

    facts = examine(bandwidth)
    if json:
        print_json(facts)
        return
    for title in ("machine", "versions", "kernels", "storage"):
        rows = [
            (name if name.isupper() else name.replace("_", " "), _shown(name, value))
            for name, value in facts[title].items()
        ]
        print_table(table((title, ""), rows))
    for advice in facts["advice"]:
        print(f"• {advice}")


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "not there"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if name.endswith("_gb") or name.endswith("_gb_per_second"):
        return f"{value:,.1f}"
    return str(value)
