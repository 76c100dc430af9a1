"""`fewer methods`, `inspect`, `doctor`, `--version`, completion: what can be asked without running a model."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest

import fewer as package
from fewer.cli.catalogue import catalogue
from fewer.registry import methods
from tests.cli.conftest import ROOT, Fewer, start


def test_the_catalogue_read_from_source_equals_the_registry() -> None:
    registered = {(entry.slot, entry.name): entry for entry in methods()}
    listed = {(entry.slot, entry.name): entry for entry in catalogue()}
    assert set(listed) == set(registered)
    for key, entry in registered.items():
        shown = listed[key]
        assert (shown.paper, shown.lossless, shown.summary) == (entry.paper, entry.lossless, entry.summary), key
        fields = () if entry.config is None else dataclasses.fields(entry.config)
        assert [setting.name for setting in shown.settings] == [field.name for field in fields], key
        assert all(setting.meaning for setting in shown.settings), f"{key}: a setting has no comment"


def test_methods_lists_a_slot_with_its_settings(fewer: Fewer) -> None:
    entries = json.loads(fewer("methods", "cache", "--json").stdout)
    assert {entry["slot"] for entry in entries} == {"cache"}
    window = next(entry for entry in entries if entry["name"] == "sink-window")["settings"][1]
    assert window["name"] == "window" and window["default"] == "1020" and "recent" in window["meaning"]
    shown = fewer("methods", "--settings").stdout
    assert "prompt-lookup" in shown and "arXiv 2309.17453" in shown and "most recent tokens" in shown
    wrong = fewer("methods", "colour")
    assert wrong.exit_code == 2 and "allowed are weights, cache, experts, decoding" in wrong.stderr


def test_methods_does_not_wait_for_torch() -> None:
    run = "from fewer.cli.app import app; app(['methods'], standalone_mode=False)"
    code = f"import sys; {run}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)


def test_every_method_has_a_page_that_names_its_settings() -> None:
    for entry in catalogue():
        page = ROOT / "docs" / "methods" / f"{entry.name}.md"
        assert page.is_file(), f"docs/methods/{entry.name}.md is missing"
        text = page.read_text()
        assert all(f"`{setting.name}`" in text for setting in entry.settings), entry.name


def test_inspect_counts_weights_bits_and_bytes_of_a_token(fewer: Fewer, tiny: str) -> None:
    facts = json.loads(fewer("inspect", tiny, "--json").stdout)
    config = facts["config"]
    assert facts["kv_bytes_per_token"] == 2 * config["layers"] * config["kv_heads"] * config["head_dim"] * 2
    matrices = [tensor for tensor in facts["tensors"] if len(tensor["shape"]) == 2]
    assert {tensor["bits_per_weight"] for tensor in matrices} == {16.0}
    assert facts["weights"] == sum(entry["weights"] for entry in facts["kinds"].values())
    shown = fewer("inspect", tiny, "--tensors").stdout
    assert "layers.1.feed_forward.down.weight" in shown and re.search(rf"vocabulary +{config['vocab_size']}\b", shown)


def test_doctor_reports_machine_versions_and_kernels(fewer: Fewer) -> None:
    facts = json.loads(fewer("doctor", "--no-bandwidth", "--json").stdout)
    assert facts["versions"]["fewer"] == package.__version__
    assert set(facts) >= {"machine", "versions", "kernels", "storage", "advice"}
    assert "versions" in fewer("doctor", "--no-bandwidth").stdout


def test_version_and_python_dash_m() -> None:
    process = start("--version")
    assert process.communicate(timeout=60) == (f"fewer {package.__version__}\n", "")
    assert process.returncode == 0


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_completion_script_is_produced(shell: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "fewer"],
        env={**os.environ, "_FEWER_COMPLETE": f"source_{shell}", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "_FEWER_COMPLETE" in result.stdout and "fewer" in result.stdout


def test_completion_offers_methods_with_their_summary() -> None:
    words = {"COMP_WORDS": "fewer generate --cache sink", "COMP_CWORD": "3", "_FEWER_COMPLETE": "complete_bash"}
    result = subprocess.run(
        [sys.executable, "-m", "fewer"],
        env={**os.environ, **words, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.stdout.split() == ["sink-window"]


def test_every_verb_has_json_and_debug(fewer: Fewer) -> None:
    listed = fewer("--help").stdout
    for verb in (
        "generate",
        "chat",
        "compare",
        "bench",
        "perplexity",
        "compress",
        "train",
        "methods",
        "inspect",
        "doctor",
        "models",
    ):
        assert verb in listed
        options = fewer(verb, "--help").stdout
        assert "--json" in options, verb
        assert "--debug" in options or verb == "models", verb
    assert "--json" in fewer("evaluate", "needle", "--help").stdout
    for verb in ("list", "pull", "remove"):
        assert "--json" in fewer("models", verb, "--help").stdout, verb
