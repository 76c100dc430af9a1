"""`fewer models`: the list, and what it says about names that it does not know. Downloads: tests/checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from fewer.checkpoint import store
from fewer.checkpoint.aliases import ALIASES
from tests.cli.conftest import Fewer


def install_by_hand(name: str) -> Path:
    """Files of the right sizes where an installation lies."""
    for file in ALIASES[name].files:
        path = store.folder_of(ALIASES[name]) / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as output:
            output.truncate(file.size)  # a hole: no disk is used
    return store.folder_of(ALIASES[name])


def test_the_list_says_what_is_installed_and_under_which_licence(fewer: Fewer) -> None:
    install_by_hand("smollm2")
    entries = {entry["name"]: entry for entry in json.loads(fewer("models", "list", "--json").stdout)}
    assert list(entries) == list(ALIASES)
    assert entries["smollm2"]["installed"] and not entries["minilm"]["installed"]
    assert entries["smollm2"]["licence"] == "Apache-2.0"
    shown = fewer("models").stdout
    assert fewer("models", "--json").stdout == fewer("models", "list", "--json").stdout
    assert all(name in shown for name in ALIASES) and shown.count(" installed ") == 1


def test_remove_frees_an_installed_model(fewer: Fewer) -> None:
    folder = install_by_hand("smollm2")
    facts = json.loads(fewer("models", "remove", "smollm2", "--json").stdout)
    assert facts == {"name": "smollm2", "freed_bytes": ALIASES["smollm2"].size} and not folder.exists()
    again = fewer("models", "remove", "smollm2")
    assert again.exit_code == 1 and "'smollm2' is not installed" in again.stderr


def test_pulling_an_installed_model_prints_its_path_and_downloads_nothing(fewer: Fewer) -> None:
    folder = install_by_hand("smollm2")
    result = fewer("models", "pull", "smollm2")
    assert result.stdout.strip() == str(folder / ALIASES["smollm2"].file)
    assert "Apache-2.0" in result.stderr


def test_a_name_that_fewer_does_not_install_is_answered_with_those_it_does(fewer: Fewer) -> None:
    for verb in ("pull", "remove"):
        result = fewer("models", verb, "gpt-5")
        assert result.exit_code == 2 and "'gpt-5'" in result.stderr and "smollm2, gemma3-270m" in result.stderr
