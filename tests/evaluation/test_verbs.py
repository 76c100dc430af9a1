"""`fewer compare`, `bench` and `perplexity` as a user calls them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fewer.cli.app import app
from fewer.cli.compare import choose_recipes
from fewer.evaluation.perplexity import perplexity
from fewer.language_model import LanguageModel
from tests.evaluation.conftest import PROMPTS, TEXT


def call(*words: object, given: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], input=given)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def test_compare_prints_a_table_and_writes_both_files(folder: Path, prompts: Path, tmp_path: Path) -> None:
    page, figures = tmp_path / "report.html", tmp_path / "report.json"
    result = call(
        "compare", "--model", folder, "--prompts", prompts, "--max-tokens", 6, "--rounds", 1, "--prompt-tokens", 40,
        "--recipe", "weights=dense", "--recipe", "weights=int4 cache=sink-window:window=16 decoding=prompt-lookup",
        "--html", page, "--json-file", figures, "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "dense (baseline)" in result.stdout and "decode tok/s" in result.stdout
    assert "round 1 of 1" in result.stderr and "round 1" not in result.stdout
    assert page.read_text().startswith("<!doctype html>")
    assert [row["failure"] for row in json.loads(figures.read_text())["rows"]] == [None, None]


def test_compare_prints_json_alone_when_asked(folder: Path, prompts: Path) -> None:
    result = call(
        "compare", "--model", folder, "--prompts", prompts, "--max-tokens", 4, "--rounds", 1, "--prompt-tokens", 20,
        "--cache", "full", "--cache", "sink-window:window=16", "--device", "cpu", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert [row["slots"]["cache"] for row in rows] == ["full", "sink-window:window=16"]


def test_without_any_recipe_six_are_compared() -> None:
    names = [str(recipe) for recipe in choose_recipes([])]
    assert len(set(names)) == 6
    for word in ("dense", "int8", "int4", "sink-window", "prompt-lookup"):
        assert any(word in name for name in names)


def test_slot_options_vary_one_slot_at_a_time() -> None:
    def names(*texts: str, **axes: list[str]) -> list[str]:
        return [str(recipe) for recipe in choose_recipes(list(texts), **axes)]

    assert names(weights=["int8", "int4"], cache=["sink-window"]) == ["int8", "int4", "auto + sink-window"]
    assert names("weights=int4", cache=["full", "sink-window"]) == ["int4", "int4 + sink-window"]
    assert names("weights=int4 name=mine", decoding=["plain", "prompt-lookup"]) == ["int4", "int4 + prompt-lookup"]
    assert names(cache=["sink-window"]) == ["auto", "auto + sink-window"]  # one needs another beside it


def test_recipes_may_come_from_a_yaml_file(tmp_path: Path) -> None:
    path = tmp_path / "recipes.yaml"
    path.write_text("- weights: int8\n- weights: int4\n  name: small\n")
    assert [str(recipe) for recipe in choose_recipes([str(path), "weights=dense"])] == ["int8", "small", "dense"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--recipe", "weights=int5"], "unknown weights method 'int5'"),
        (["--html", "/"], "name a file"),
        (["--prompts", "/there/is/nothing"], "/there/is/nothing"),
        (["--rounds", "0"], "0"),
    ],
)
def test_compare_refuses_before_anything_is_loaded(folder: Path, words: list[str], expected: str) -> None:
    result = call("compare", "--model", folder, *words)
    assert result.exit_code == 2
    assert expected in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_ctrl_c_after_a_round_writes_the_report_and_exits_with_130(folder: Path, prompts: Path, tmp_path: Path) -> None:
    figures = tmp_path / "report.json"
    process = subprocess.Popen(
        [
            sys.executable, "-m", "fewer", "compare", "--model", folder, "--prompts", prompts, "--device", "cpu",
            "--weights", "dense", "--weights", "int4", "--rounds", "1000000", "--json-file", figures,
            "--max-tokens", "4", "--prompt-tokens", "20",
        ],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("round 3 "):
                process.send_signal(signal.SIGINT)
                break
        assert "Interrupted" in process.stderr.read()
        assert process.wait(timeout=60) == 130
    finally:
        process.kill()
    found = json.loads(figures.read_text())
    assert found["interrupted"] and found["rounds"] >= 2
    assert all(row["decode_tokens_per_second"] for row in found["rows"])


def test_perplexity_prints_the_figure_of_the_function(folder: Path, model: LanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    options = ["--model", folder, "--weights", "dense", "--dtype", "float32", "--device", "cpu"]
    expected = perplexity(model, TEXT, 32, 16, 80)
    result = call("perplexity", path, *options, "--window", 32, "--stride", 16, "--limit", 80, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)
    assert (found["tokens"], found["windows"]) == (expected.tokens, expected.windows)
    piped = call(
        "perplexity", "-", *options, "--window", 32, "--stride", 16, "--limit", 80, "--decode-path", given=TEXT
    )
    assert float(piped.stdout) == pytest.approx(expected.perplexity, rel=1e-2)


@pytest.mark.parametrize(("content", "expected"), [("", "holds no text"), ("   \n", "holds no text"), ("a", "1 token")])
def test_perplexity_of_nothing_is_refused(folder: Path, content: str, expected: str) -> None:
    result = call("perplexity", "-", "--model", folder, "--device", "cpu", given=content)
    assert result.exit_code == 2
    assert expected in result.stderr


def test_bench_prints_both_tables_or_json(folder: Path) -> None:
    options = [
        "bench",
        "--model",
        folder,
        "--prefill",
        16,
        "--depth",
        8,
        "--tokens",
        4,
        "--rounds",
        1,
        "--device",
        "cpu",
    ]
    shown = call(*options)
    assert shown.exit_code == 0, shown.output
    assert "prefill" in shown.stdout and "decoding" in shown.stdout
    found = json.loads(call(*options, "--json").stdout)
    assert found["prefill"][0]["tokens"] == 16 and found["decode"][0]["rate"]["median"] > 0
