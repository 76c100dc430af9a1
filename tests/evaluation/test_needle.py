"""Needles: what is scored is what generation does, whatever the cache can take back; figures, picture and verb."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fewer.cli.app import app
from fewer.cli.evaluate import parse_depths, parse_lengths
from fewer.decoding.sampling import SamplingConfig
from fewer.evaluation.heat_map import html_page
from fewer.evaluation.needle import NeedleSettings, Trial, begins_with, hide, needle
from fewer.evaluation.needle_report import NeedleReport, RecipeTrials, headline
from fewer.language_model import LanguageModel, load
from fewer.recipe import Recipe
from fewer.training.haystack import Haystack, filler
from tests.tiny_model import write_model

SETTINGS = NeedleSettings(lengths=(300, 420), depths=(0.0, 0.5, 1.0), words=3)


@pytest.fixture(scope="module")
def long_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("needle") / "tiny", context=512)


@pytest.fixture(scope="module")
def long_model(long_folder: Path) -> LanguageModel:
    return load(long_folder, weights="dense", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def haystack(long_model: LanguageModel) -> Haystack:
    return Haystack(filler(0, 200), long_model.tokenizer)


def test_the_greedy_answer_is_what_a_user_gets(long_model: LanguageModel, haystack: Haystack) -> None:
    for recipe in ("cache=full", "cache=sink-window:window=64", "decoding=prompt-lookup"):
        model = long_model.with_recipe(replace(Recipe.parse(recipe), weights="dense", dtype="float32"))
        for trial in needle(model, haystack, SETTINGS):
            hidden = hide(haystack, SETTINGS, trial.length, trial.depth, trial.sample)
            events = model.events([hidden.prompt], len(hidden.answer), SamplingConfig())
            tokens = [token for event in events for token in event.tokens]
            assert trial.generated == model.tokenizer.decode(tokens).strip(), recipe


def test_the_score_is_the_mean_surprise_of_the_answers_tokens(long_model: LanguageModel, haystack: Haystack) -> None:
    trial = next(needle(long_model, haystack, SETTINGS))
    hidden = hide(haystack, SETTINGS, trial.length, trial.depth, 0)
    session = long_model.session(1, 512)
    laws = [session.prefill([hidden.prompt])] + [session.decode([token]) for token in hidden.answer[:-1]]
    scores = [-float(law[0].log_softmax(-1)[token]) for law, token in zip(laws, hidden.answer, strict=True)]
    assert trial.nll == pytest.approx(sum(scores) / len(scores), rel=1e-5)


def test_recipes_get_the_same_texts_and_another_seed_gets_others(long_model: LanguageModel, haystack: Haystack) -> None:
    first, again = list(needle(long_model, haystack, SETTINGS)), list(needle(long_model, haystack, SETTINGS))
    assert [(t.answer, t.nll, t.generated) for t in first] == [(t.answer, t.nll, t.generated) for t in again]
    other = next(needle(long_model, haystack, replace(SETTINGS, seed=1)))
    assert (other.answer, other.nll) != (first[0].answer, first[0].nll)
    assert [t.length for t in first] == [300] * 3 + [420] * 3 and len({t.answer for t in first}) > 1


def test_a_cache_that_drops_the_text_holds_fewer_bytes(long_model: LanguageModel, haystack: Haystack) -> None:
    window = long_model.with_recipe(Recipe(weights="dense", dtype="float32", cache="sink-window:window=32"))
    settings = replace(SETTINGS, lengths=(512,))
    full, small = (next(needle(model, haystack, settings)).kv_bytes for model in (long_model, window))
    assert small < full


@pytest.mark.parametrize(
    ("said", "answer", "expected"),
    [
        (" Alpha bravo.\nMore", "alpha bravo", True),
        ("alpha, bravo", "alpha bravo", True),
        ("bravo alpha", "alpha bravo", False),
        ("alpha", "alpha bravo", False),
        ("the alpha bravo", "alpha bravo", False),
    ],
)
def test_an_answer_counts_when_its_words_come_first(said: str, answer: str, expected: bool) -> None:
    assert begins_with(said, answer) is expected


def test_lengths_and_depths_are_read_as_a_person_writes_them() -> None:
    assert parse_lengths("1k, 2K,4096,1024") == (1024, 2048, 4096)
    assert parse_depths("5") == (0.0, 0.25, 0.5, 0.75, 1.0) and parse_depths("1") == (0.5,)
    assert parse_depths("0,0.5,90%,1.0") == (0.0, 0.5, 0.9, 1.0) and parse_depths("0.3") == (0.3,)


def report(*rows: RecipeTrials) -> NeedleReport:
    settings = NeedleSettings(lengths=(1024, 2048), depths=(0.0, 1.0))
    return NeedleReport("<tiny>", "f" * 64, settings, "the built-in text", {"cores": 2}, list(rows), 3.0)


def row(recipe: str, *found: tuple[int, float, bool], failure: str | None = None) -> RecipeTrials:
    trials = [Trial(length, depth, 0, exact, 0.5, "a", "a", 1000, 0.1) for length, depth, exact in found]
    return RecipeTrials(Recipe.parse(recipe), trials, 10, failure)


def test_the_page_is_whole_by_itself_escaped_and_has_a_panel_a_recipe() -> None:
    made = report(
        row("cache=full", (1024, 0.0, True), (1024, 1.0, True), (2048, 0.0, True)),
        row("cache=sink-window name=<b>", (1024, 0.0, False)),
        row("weights=int8", failure="no <room>"),
    )
    page = html_page(made)
    assert page.count("<figure>") == 3 and page.count("<svg") == 2 and "prefers-color-scheme: dark" in page
    assert "<b>" not in page and "&lt;b&gt;" in page and "not measured: no &lt;room&gt;" in page
    assert not re.search(r"https?://|<script|<link|url\(", page)
    assert page.count('class="cell missing"') == 4
    assert "1,024 tokens, depth 0%: 0% of 1 found, 0.50 nats a token" in page
    assert headline(made) == "Of passkeys of 8 words in 1,024 to 2,048 tokens, found: auto 100%, <b> 0%."


def call(*words: object) -> Result:
    return CliRunner().invoke(app, ["evaluate", "needle", *map(str, words)])


def test_the_verb_compares_recipes_in_tables_json_and_a_picture(long_folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "map.html"
    words = (
        "--model", long_folder, "--device", "cpu", "--lengths", "300,400", "--depths", "0,1", "--words", 2,
        "-r", "cache=full", "-r", "cache=sink-window:window=16",
    )  # fmt: skip
    shown = call(*words, "--html", page)
    assert shown.exit_code == 0, shown.output
    assert "auto + sink-window:window=16" in shown.stdout and "100%" in shown.stdout and "found:" in shown.stdout
    assert "auto: 300 tokens" in shown.stderr and "wrote" in shown.stderr and "tokens" not in shown.stdout[:20]
    assert page.read_text().count("<svg") == 2
    found: dict[str, Any] = json.loads(call(*words, "--json").stdout)
    assert [entry["slots"] for entry in found["recipes"]] == [{}, {"cache": "sink-window:window=16"}]
    assert [len(entry["cells"]) for entry in found["recipes"]] == [4, 4] and not found["interrupted"]
    assert found["lengths"] == [300, 400] and found["recipes"][0]["trials"][0]["length"] == 300


def test_slot_options_change_every_recipe_and_defaults_fit_the_context(long_folder: Path) -> None:
    words = ("--model", long_folder, "--device", "cpu", "--depths", 1, "--words", 2, "--json")
    found = json.loads(call(*words, "--cache", "sink-window:window=16").stdout)
    assert found["lengths"] == [512] and found["recipes"][0]["slots"] == {"cache": "sink-window:window=16"}


def test_a_haystack_of_the_users_own_is_used(long_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text("the cat sat on the mat and the dog sat on the log. " * 40)
    words = ("--model", long_folder, "--device", "cpu", "--lengths", 500, "--depths", 1, "--kind", "needle", "--json")
    found = json.loads(call(*words, "--haystack", text).stdout)
    assert found["haystack"] == str(text) and found["kind"] == "needle"
    assert found["recipes"][0]["trials"][0]["nll"] != json.loads(call(*words).stdout)["recipes"][0]["trials"][0]["nll"]


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (["--lengths", "1k"], 2, "1024 tokens does not fit the model's context of 512"),
        (["--lengths", "100"], 2, "leaves no room for text"),
        (["--lengths", "0"], 2, "--lengths has '0'"),
        (["--lengths", "2m"], 2, "--lengths has '2m'"),
        (["--lengths", ","], 2, "--lengths is empty"),
        (["--depths", "0"], 2, "--depths is 0: use 1 to 101"),
        (["--depths", "-2"], 2, "--depths is -2"),
        (["--depths", "0.5,1.5"], 2, "--depths has '1.5'"),
        (["--depths", "nan,1"], 2, "--depths has 'nan'"),
        (["--samples", "0"], 2, "--samples"),
        (["--words", "0"], 2, "--words"),
        (["--kind", "pin"], 2, "unknown kind 'pin': choose one of passkey, needle"),
        (["--haystack", "/no/such/file"], 2, "cannot read /no/such/file"),
        (["--html", "/"], 2, "is a folder"),
        (["-r", "cache=nothing"], 2, "unknown cache method 'nothing'"),
    ],
)
def test_bad_requests_end_in_one_sentence(long_folder: Path, words: list[str], code: int, part: str) -> None:
    result = call("--model", long_folder, "--device", "cpu", *words)
    assert result.exit_code == code, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and part in errors[0] and result.stdout == ""


def test_one_recipe_that_fails_leaves_the_others(long_folder: Path) -> None:
    words = ("--model", long_folder, "--device", "cpu", "--lengths", 300, "--depths", 1)
    result = call(*words, "-r", "cache=full", "-r", "weights=int4:group=128")
    assert result.exit_code == 0, result.output
    assert "was not measured" in result.stdout and "auto 0%" in result.stdout


def test_ctrl_c_leaves_what_was_done(long_folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "map.html"
    process = subprocess.Popen(
        [
            sys.executable, "-m", "fewer", "evaluate", "needle", "--model", long_folder, "--device", "cpu", "--json",
            "--lengths", "300,310", "--samples", "3", "-r", "cache=full",
            *(word for window in range(1, 400) for word in ("-r", f"cache=sink-window:window={window}")),
            "--html", page,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if "window=2:" in line:
                process.send_signal(signal.SIGINT)
                break
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in errors
    found = json.loads(output)
    assert found["interrupted"] and len(found["recipes"][0]["cells"]) == 10 and not found["recipes"][-1]["trials"]
    assert "not reached" in page.read_text()
