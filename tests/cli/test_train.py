"""`fewer train`: from the command line to a recipe that uses what was learnt, with a break in between."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from subprocess import PIPE, Popen

import pytest

from fewer.training import adapter_store
from tests.cli.conftest import ROOT, Fewer
from tests.tiny_model import write_model
from tests.training.toy_method import NAME, register


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(adapter_store, "SHIPPED", tmp_path / "shipped")
    register(monkeypatch)


def test_what_was_trained_is_found_by_the_next_recipe(fewer: Fewer, tiny: str, tmp_path: Path) -> None:
    generate = ("generate", "the cat", "-m", tiny, "-n", "4", "--cache", NAME)
    refused = fewer(*generate)
    assert refused.exit_code == 1 and refused.stderr.count("\n") == 1
    assert f"cache={NAME} has not been fitted to this model" in refused.stderr
    trained = fewer("train", NAME, "-m", tiny, "--steps", "3", "--set", "learning_rate=0.1", "--json")
    assert trained.exit_code == 0, trained.output
    facts = json.loads(trained.stdout)
    assert Path(facts["path"]).parent == tmp_path / "fewer-home" / "adapters" / NAME
    assert facts["config"] == {"steps": 3, "learning_rate": 0.1, "seed": 0} and facts["method"] == NAME
    assert len(facts["model"]) == len(facts["data"]) == 64 and set(facts["metrics"]) == {"loss_before", "loss_after"}
    assert facts["bytes"] == Path(facts["path"]).stat().st_size and facts["versions"]["torch"]
    assert "step 3 of 3, loss" in trained.stderr
    assert fewer(*generate).exit_code == 0


def test_an_adapter_of_another_model_is_refused_in_one_sentence(fewer: Fewer, tiny: str, tmp_path: Path) -> None:
    path, other = tmp_path / "gain.safetensors", write_model(tmp_path / "other", context=128)
    shown = fewer("train", NAME, "-m", tiny, "--steps", "2", "-o", str(path))
    assert shown.exit_code == 0 and shown.stdout.strip() == str(path)
    words = ("generate", "the cat", "-n", "2", "--cache", f"{NAME}:adapter={path}", "-m")
    assert fewer(*words, tiny).exit_code == 0
    refused = fewer(*words, str(other))
    assert refused.exit_code == 1 and refused.stdout == "" and refused.stderr.count("\n") == 1
    assert "was fitted to another model" in refused.stderr


def test_data_of_the_users_own_and_the_seed_make_another_adapter(fewer: Fewer, tiny: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the dog sat on the log and the cat sat on the mat. " * 20)

    def facts(*words: str) -> dict[str, str]:
        result = fewer("train", NAME, "-m", tiny, "--steps", "1", "-o", str(tmp_path / "a"), "--json", *words)
        found: dict[str, str] = json.loads(result.stdout)
        return found

    plain, own, seeded = facts(), facts("--data", str(text)), facts("--seed", "5")
    assert plain["data"] != own["data"] and plain["data"] == seeded["data"]
    assert (plain["seed"], seeded["seed"]) == (0, 5)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["nope"], "unknown method 'nope'"),
        (["sink-window"], "'sink-window' learns nothing"),
        ([NAME, "--steps", "0"], "steps=0 is not allowed"),
        ([NAME, "--set", "steps"], "--set has 'steps'"),
        ([NAME, "--set", "steps=2", "--steps", "3"], "'steps' is set twice"),
        ([NAME, "--set", "stepz=2"], "unknown key 'stepz'"),
        ([NAME, "--set", "steps=two"], "not a whole number"),
        ([NAME, "--data", "/no/such/file"], "cannot read /no/such/file"),
        ([NAME, "-o", "/"], "is a folder"),
        ([NAME, "--weights", "int5"], "unknown weights method 'int5'"),
    ],
)
def test_bad_requests_end_in_one_sentence(fewer: Fewer, tiny: str, words: list[str], part: str) -> None:
    result = fewer("train", "-m", tiny, *words)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and part in result.stderr, result.stderr


SCRIPT = """
import sys
import pytest
from tests.training.toy_method import register
register(pytest.MonkeyPatch())
from fewer.cli.app import main
sys.argv = ["fewer", *sys.argv[1:]]
main()
"""


def test_ctrl_c_keeps_what_was_done_and_the_same_command_goes_on(tiny: str, tmp_path: Path) -> None:
    path = tmp_path / "gain.safetensors"

    def start(steps: int) -> Popen[str]:
        words = [sys.executable, "-c", SCRIPT, "train", NAME, "-m", tiny, "--steps", str(steps), "-o", str(path)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        return Popen(words, stdout=PIPE, stderr=PIPE, text=True, env=environment, cwd=ROOT)

    process = start(300)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("step 30 "):
                process.send_signal(signal.SIGINT)
                break
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and output == "" and "Traceback" not in errors
    assert f"what was done is in {path}.unfinished" in errors and not path.exists()
    again = start(300)
    output, errors = again.communicate(timeout=100)
    assert again.returncode == 0, errors
    assert output.strip() == str(path) and "going on after step" in errors and "step 300 of 300" in errors
    assert not Path(f"{path}.unfinished").exists()
