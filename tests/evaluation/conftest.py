"""One tiny model on disk for every test of the evaluation, and its text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fewer.language_model import LanguageModel, load
from tests.tiny_model import write_model

TEXT = "the cat sat on the mat and the dog sat on the log. Every idea is one file, and every file is one idea. " * 3
PROMPTS = ["the cat sat on the mat and the cat sat on the", "def add(left, right):", "every file"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("evaluation") / "tiny")


@pytest.fixture(scope="session")
def folder_with_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, whose tokenizer puts a BOS before every text."""
    folder = write_model(tmp_path_factory.mktemp("evaluation-bos") / "tiny")
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|endoftext|>", "add_bos_token": True}))
    return folder


@pytest.fixture(scope="session")
def model(folder: Path) -> LanguageModel:
    return load(folder, weights="dense", dtype="float32", device="cpu")
