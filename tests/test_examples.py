"""The examples run as their first lines say, on a tiny model, and show what they claim."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_model import write_model

ROOT = Path(__file__).parents[1]
EXAMPLES = {path.stem: path for path in sorted((ROOT / "examples").glob("*.py"))}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("models") / "tiny"))


def run(name: str, *words: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(EXAMPLES[name]), *words]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_generate_streams_and_repeats_with_a_seed(tiny: str) -> None:
    shown = run("generate", tiny, "the cat")
    assert re.search(r"\d+ tokens, \d+ a second", shown) and "the same answer: True" in shown


def test_compare_recipes_prints_figures_for_every_recipe(tiny: str) -> None:
    lines = run("compare_recipes", tiny, "8").splitlines()
    figures = [line for line in lines if re.search(r"\d+\.\d +\d+\.\d\d +\d\.\d{4} +\d+\.\d%$", line)]
    assert len(lines) == 5 and len(figures) == 4


@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_a_compressed_folder_is_the_same_model(tiny: str, weights: str) -> None:
    assert "bit for bit" in run("compress_and_reload", tiny, weights)


def test_a_batch_gives_the_answers_of_single_runs(tiny: str) -> None:
    assert "4 of 4 answers equal the single ones" in run("batch", tiny)


def test_speculation_emits_the_same_tokens_in_fewer_passes(tiny: str) -> None:
    shown = run("speculative", tiny, tiny)
    assert "every method emitted the same tokens" in shown
    per_pass = float(re.search(r"draft-model\S+ +([\d.]+) tokens a pass", shown)[1])  # type: ignore[index]
    assert per_pass > 3  # the draft is the target, at another dtype


def test_an_added_method_is_exact_where_it_keeps_everything(tiny: str) -> None:
    kl = dict(re.findall(r"^(\S+) +KL ([\d.]+)", run("add_a_method", tiny), re.MULTILINE))
    assert float(kl["full"]) < 1e-3 and kl["layer-window:every=1"] == kl["full"]
    assert float(kl["layer-window:window=8"]) > float(kl["full"]) + 1e-3


def test_fitting_the_final_norm_gives_back_part_of_what_int4_lost(tiny: str) -> None:
    before, after = map(float, re.findall(r"([\d.]+) (?:before|after)", run("fit_final_norm", tiny, "40")))
    assert 0 < after < before


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_is_short_says_what_it_shows_and_defaults_to_smollm2(name: str) -> None:
    text = EXAMPLES[name].read_text()
    assert len(text.splitlines()) <= 60 and text.startswith('"""') and f"python examples/{name}.py [MODEL]" in text
    assert 'model: str = "smollm2"' in text
