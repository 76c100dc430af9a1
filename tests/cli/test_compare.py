"""`fewer compare`: how recipes are given on the command line."""

from __future__ import annotations

from typing import Any

import pytest
from typer.testing import CliRunner

from fewer.cli import compare
from fewer.cli.app import app
from fewer.errors import UsageError


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `choose_recipes` is called with; the verb goes no further."""
    calls: list[Any] = []

    def stop(*axes: Any) -> None:
        calls.append(axes)
        raise UsageError("stopped")

    monkeypatch.setattr(compare, "choose_recipes", stop)
    return calls


@pytest.mark.parametrize(
    "words",
    [
        ["--cache", "full", "paged", "sink-window:window=8"],
        ["--cache", "full", "--cache", "paged", "sink-window:window=8"],
        ["--cache=full", "paged", "--cache", "sink-window:window=8"],
        ["--rounds", "2", "--cache", "full", "paged", "sink-window:window=8", "--json"],
    ],
)
def test_values_may_follow_one_another(words: list[str], chosen: list[Any]) -> None:
    CliRunner().invoke(app, ["compare", *words])
    recipes, weights, cache, decoding, experts = chosen[0]
    assert cache == ["full", "paged", "sink-window:window=8"]
    assert not any((recipes, weights, decoding, experts))


def test_recipes_and_weights_take_several_values_too(chosen: list[Any]) -> None:
    CliRunner().invoke(app, ["compare", "-r", "weights=int4", "weights=int8", "-w", "int8", "int4:group=64"])
    recipes, weights, *_ = chosen[0]
    assert recipes == ["weights=int4", "weights=int8"] and weights == ["int8", "int4:group=64"]


@pytest.mark.parametrize("words", [["--rounds", "2", "full"], ["full"], ["--json", "full"]])
def test_a_word_that_belongs_to_no_list_is_refused(words: list[str], chosen: list[Any]) -> None:
    result = CliRunner().invoke(app, ["compare", *words])
    assert result.exit_code == 2 and not chosen
