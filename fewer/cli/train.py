"""`fewer train`: fit a method that learns something to a model."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewer.cli import options as o
from fewer.cli.loading import choose_recipe, load_model, prepare
from fewer.cli.output import note, print_json, size
from fewer.cli.progress import Bars
from fewer.errors import UsageError

if TYPE_CHECKING:
    from fewer.registry import Method
    from fewer.training import StepRecord

LINES = 10  # of progress, over a whole run


def complete_fitted(incomplete: str) -> Iterable[tuple[str, str]]:
    from fewer.cli.catalogue import catalogue

    return [(each.name, each.summary) for each in catalogue() if each.fitted and each.name.startswith(incomplete)]


def train(
    method: Annotated[
        str, typer.Argument(metavar="METHOD", autocompletion=complete_fitted, help="A method that learns something.")
    ],
    model: o.Model = o.MODEL_DEFAULT,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="The adapter. (default: where recipes look for it)"),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="How it is fitted; repeat it.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A UTF-8 text to fit on. (default: one of ours)")
    ] = None,
    steps: Annotated[int | None, typer.Option(metavar="N", help="The same as --set steps=N.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="The same as --set seed=N.")] = None,
    weights: o.Weights = "dense",
    dtype: o.DType = None,
    device: o.Device = None,
    context: o.Context = None,
    threads: o.Threads = None,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Fit METHOD to MODEL and keep what it learnt; an interrupted run goes on when it is called again."""
    prepare(threads)
    from fewer.evaluation.prompts import read_text
    from fewer.evaluation.report import check_writable
    from fewer.training.adapter_store import own_path
    from fewer.training.fitting import TrainingText, fit_to_file, fitted_method, state_path

    chosen = fitted_method(method)
    config = fit_settings(chosen, settings or [], {"steps": steps, "seed": seed})
    text = TrainingText.built_in() if data is None else TrainingText(read_text(data), str(data))
    if output is not None:
        check_writable(output)
    recipe = choose_recipe(weights=weights, dtype=dtype)
    loaded = load_model(model, recipe, device, context, gradients=True)
    path = output or own_path(chosen.name, model, loaded.checkpoint.fingerprint())
    with Bars() as bars:
        try:
            shown = Steps(bars)
            adapter = fit_to_file(path, chosen, loaded, text, config, shown, shown.part)
        except KeyboardInterrupt:
            if state_path(path).exists():
                note(f"what was done is in {state_path(path)}: the same command goes on from there")
            raise
    described = dataclasses.asdict(adapter.provenance)
    if json:
        print_json({"path": str(path), "bytes": path.stat().st_size, **described})
        return
    print(path)
    figures = ", ".join(f"{name} {value:.4g}" for name, value in adapter.provenance.metrics.items())
    note(f"{size(path.stat().st_size)} for {method} on {model}" + (f": {figures}" if figures else ""))


def fit_settings(method: Method, items: list[str], options: dict[str, int | None]) -> Any:
    """The method's `fit_config` from `key=value` items and from options, which are given once. Raises UsageError."""
    from fewer.registry import parse_settings

    given: dict[str, str] = {key: str(value) for key, value in options.items() if value is not None}
    for item in items:
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not key:
            raise UsageError(f"--set has '{item}': write key=value, as in --set steps=200")
        if key in given:
            raise UsageError(f"'{key}' is set twice: give it once")
        given[key] = value
    if method.fit_config is None:
        if given:
            raise UsageError(f"fitting '{method.name}' takes no settings, but {', '.join(given)} was given")
        return None
    return parse_settings(f"fitting '{method.name}'", "", method.fit_config, given)


class Steps:
    """Progress of a run: a bar on a terminal, and a line for each tenth of it."""

    def __init__(self, bars: Bars):
        self.bars, self.begun = bars, False
        self.since, self.steps = time.perf_counter(), 0  # of the last line
        self.shown = 0  # tenths of other work

    def __call__(self, record: StepRecord, total: int) -> None:
        if not self.begun:
            self.begun, self.since, self.steps = True, time.perf_counter(), record.step
            if record.step > 1:
                note(f"going on after step {record.step - 1}")
        self.bars.step("fitting", record.step, total)
        if record.step * LINES // total > (record.step - 1) * LINES // total:
            seconds = (time.perf_counter() - self.since) / max(1, record.step - self.steps)
            self.since, self.steps = time.perf_counter(), record.step
            note(f"step {record.step} of {total}, loss {record.loss:.4g}, {seconds:.3g} s a step")

    def part(self, label: str, done: int, total: int) -> None:
        """Work before the first step."""
        self.bars.step(label, done, total)
        if done == total or done * LINES // total > self.shown:
            self.shown = done * LINES // total
            note(f"{label}: {done} of {total}")
