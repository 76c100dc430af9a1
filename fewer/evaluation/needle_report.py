"""What a run of needles found: the figures of every recipe, as plain data, and in the sentences beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fewer.evaluation.needle import Cell, NeedleSettings, Trial
from fewer.recipe import Recipe


@dataclass
class RecipeTrials:
    """What was tried with one recipe so far, or why nothing was."""

    recipe: Recipe
    trials: list[Trial] = field(default_factory=list)
    weight_bytes: int = 0
    failure: str | None = None

    @property
    def name(self) -> str:
        return str(self.recipe)

    def cell(self, length: int | None = None, depth: float | None = None) -> Cell | None:
        """The trials of a length, a depth, both, or all of them; None where there is none."""
        return Cell.of([
            trial
            for trial in self.trials
            if (length is None or trial.length == length) and (depth is None or trial.depth == depth)
        ])  # fmt: skip


@dataclass
class NeedleReport:
    model: str
    fingerprint: str
    settings: NeedleSettings
    haystack: str  # the file, or what stands for it
    machine: dict[str, object]
    rows: list[RecipeTrials] = field(default_factory=list)
    seconds: float = 0.0
    interrupted: bool = False

    def to_json(self) -> dict[str, Any]:
        settings = self.settings
        return {
            "model": self.model,
            "fingerprint": self.fingerprint,
            **asdict(settings),
            "haystack": self.haystack,
            "machine": self.machine,
            "seconds": self.seconds,
            "interrupted": self.interrupted,
            "recipes": [
                {
                    "recipe": row.name,
                    "slots": row.recipe.to_mapping(),
                    "failure": row.failure,
                    "weight_bytes": row.weight_bytes,
                    "overall": _cell_json(row.cell()),
                    "cells": [
                        {"length": length, "depth": depth, **cell}
                        for length in settings.lengths
                        for depth in settings.depths
                        if (cell := _cell_json(row.cell(length, depth))) is not None
                    ],
                    "trials": [asdict(trial) | {"nll": _finite(trial.nll)} for trial in row.trials],
                }
                for row in self.rows
            ],
        }


def headline(report: NeedleReport) -> str:
    """What was found, in one sentence."""
    what = f"passkeys of {report.settings.words} words" if report.settings.kind == "passkey" else "hidden facts"
    tried = [(row.name, cell) for row in report.rows if (cell := row.cell()) is not None]
    if not tried:
        return f"No {what} were looked for."
    found = ", ".join(f"{name} {percent(cell.exact)}" for name, cell in tried)
    return f"Of {what} in {spans(report.settings.lengths)} tokens, found: {found}."


def notes(report: NeedleReport) -> list[str]:
    settings = report.settings
    found = [
        "Exact: the words of the greedy answer begin with the hidden ones. Nats: mean negative log-likelihood of a "
        "token of the hidden answer, fed one at a time through the decode path.",
        "A length counts prompt, question and answer. Depth is the share of the text that stands before the needle.",
        f"{count(settings.samples, 'text')} for each length and depth, the same for every recipe; seed "
        f"{settings.seed}; haystack: {report.haystack}.",
    ]
    if report.interrupted:
        found.append("Interrupted: cells without a figure were not reached.")
    return found


def percent(share: float) -> str:
    return f"{100 * share:.0f}%"


def nats(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "∞"


def spans(lengths: Sequence[int]) -> str:
    low, high = min(lengths), max(lengths)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _cell_json(cell: Cell | None) -> dict[str, Any] | None:
    return None if cell is None else asdict(cell) | {"nll": _finite(cell.nll)}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
