"""Needles under several recipes of one model, each set of weights loaded once in a row."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

from fewer.errors import FewerError, UsageError
from fewer.evaluation.comparison import unique
from fewer.evaluation.machine import machine
from fewer.evaluation.needle import NeedleSettings, needle, with_lengths
from fewer.evaluation.needle_report import NeedleReport, RecipeTrials
from fewer.language_model import LanguageModel, load
from fewer.recipe import Recipe
from fewer.training.haystack import Haystack, filler

BUILT_IN = "the built-in text"

OnProgress = Callable[[str, int, int], None]  # what is being done, how much of it, of how much


def find_needles(
    model: str,
    recipes: Sequence[Recipe],
    settings: NeedleSettings,
    text: str | None = None,
    text_name: str = BUILT_IN,
    device: str | None = None,
    context: int | None = None,
    on_progress: OnProgress | None = None,
    progress: Any = None,
) -> NeedleReport:
    """Hide and look for every needle under each recipe. `text` is the haystack; None: the built-in one.

    Of several recipes, one that fails says why and the others go on. KeyboardInterrupt after the first trial ends the
    run, and the report says so; before, it is raised.
    """
    if not recipes:
        raise UsageError("no recipe was given: name at least one")
    start = time.perf_counter()
    rows = [RecipeTrials(recipe) for recipe in unique(recipes)]
    run = _Run(model, device, context, on_progress or (lambda label, done, total: None), progress)
    report = NeedleReport(model, "", settings, text_name, {}, rows)
    try:
        for row in rows:
            try:
                run.fill(report, row, text)
            except FewerError as fault:
                if len(rows) == 1:
                    raise
                row.failure = " ".join(str(fault).split())
    except KeyboardInterrupt:
        if not any(row.trials for row in rows):
            raise
        report.interrupted = True
    if all(row.failure is not None for row in rows):
        raise FewerError(f"no recipe could be measured: {rows[0].failure}")
    report.seconds = time.perf_counter() - start
    return report


class _Run:
    """The model that is loaded now, and the haystack in its tokens."""

    def __init__(self, name: str, device: str | None, context: int | None, on_progress: OnProgress, progress: Any):
        self.name, self.device, self.context = name, device, context
        self.on_progress, self.progress = on_progress, progress
        self.model: LanguageModel | None = None
        self.haystack: Haystack | None = None

    def fill(self, report: NeedleReport, row: RecipeTrials, text: str | None) -> None:
        """Load what the row needs and make its trials one by one: an interruption leaves those that are done."""
        model = self._load(row.recipe)
        report.fingerprint, report.machine = model.checkpoint.fingerprint(), machine(model.transformer.device)
        report.settings = with_lengths(report.settings, model.context_length)
        if self.haystack is None:
            self.haystack = Haystack(filler() if text is None else text, model.tokenizer)
        row.weight_bytes = model.weight_bytes

        def on_trial(length: int, done: int, total: int) -> None:
            self.on_progress(f"{row.name}: {length:,} tokens", done, total)

        for trial in needle(model, self.haystack, report.settings, on_trial):
            row.trials.append(trial)

    def _load(self, recipe: Recipe) -> LanguageModel:
        held = self.model
        if held is not None and _loads_alike(held.recipe, recipe):
            self.model = held.with_recipe(recipe)
        else:
            held = self.model = None
            gc.collect()  # one set of weights at a time
            self.model = load(
                self.name,
                recipe=recipe,
                device=self.device,
                context=self.context,
                progress=self.progress,
                on_matrix=lambda done, total: self.on_progress(f"{recipe}: loading", done, total),
            )
        return self.model


def _loads_alike(one: Recipe, other: Recipe) -> bool:
    return (one.weights, one.experts, one.dtype) == (other.weights, other.experts, other.dtype)
