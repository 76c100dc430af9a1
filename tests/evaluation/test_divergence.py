"""Divergence from the uncompressed model: nothing for itself, something for fewer bits or fewer keys."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fewer.evaluation.divergence import Divergence, divergence, reference
from fewer.language_model import LanguageModel, load
from tests.evaluation.conftest import TEXT
from tests.tiny_model import write_model


def test_a_model_does_not_differ_from_itself(model: LanguageModel) -> None:
    text = reference(model, model.tokenizer.encode(TEXT)[:20], 16)
    same = divergence(model, text)
    assert same.kl < 1e-6  # threads may round differently from run to run
    assert (same.agreement, same.tokens) == (1.0, 16)


def test_the_reference_is_the_models_greedy_text(model: LanguageModel) -> None:
    prompt = model.tokenizer.encode(TEXT)[:20]
    text = reference(model, prompt, 12)
    written = [token for event in model.events([prompt], 12) for token in event.tokens]
    assert text.tokens[: len(written)] == written
    assert text.log_probabilities.exp().sum(-1) == pytest.approx(torch.ones(12), abs=1e-5)


def test_fewer_bits_diverge_and_int8_less_than_int4(folder: Path, model: LanguageModel) -> None:
    text = reference(model, model.tokenizer.encode(TEXT)[:20], 16)
    int8 = divergence(load(folder, weights="int8", dtype="float32", device="cpu"), text)
    int4 = divergence(load(folder, weights="int4", dtype="float32", device="cpu"), text)
    assert 0 < int8.kl < int4.kl


def test_kl_equals_torchs_own_over_the_same_laws(model: LanguageModel, tmp_path: Path) -> None:
    other = load(write_model(tmp_path / "other", seed=1), weights="dense", dtype="float32", device="cpu")
    text = reference(model, model.tokenizer.encode(TEXT)[:20], 6)
    rows = [[*text.prompt, *text.tokens[:count]] for count in range(6)]
    laws = torch.stack([other.session(1, len(row)).prefill([row])[0].double().log_softmax(-1) for row in rows])
    expected = torch.nn.functional.kl_div(laws, text.log_probabilities.double(), log_target=True, reduction="sum") / 6
    assert divergence(other, text).kl == pytest.approx(float(expected), rel=1e-4)


def test_forgotten_keys_diverge(folder: Path, model: LanguageModel) -> None:
    text = reference(model, model.tokenizer.encode(TEXT)[:40], 8)
    forgetful = load(folder, weights="dense", cache="sink-window:sinks=1,window=4", dtype="float32", device="cpu")
    assert divergence(forgetful, text).kl > 0.01


def test_its_perplexity_is_that_of_prompt_and_text(model: LanguageModel) -> None:
    text = reference(model, model.tokenizer.encode(TEXT)[:22], 8)
    row, nll = [*text.prompt, *text.tokens], 0.0
    for place in range(1, len(row)):
        nll -= float(model.session(1, place).prefill([row[:place]])[0].double().log_softmax(-1)[row[place]])
    found = divergence(model, text)
    assert found.scored == 29
    assert found.nll == pytest.approx(nll, rel=1e-5)


def test_results_of_several_prompts_add_up() -> None:
    total = Divergence(1.0, 3, 4, 6.0, 10) + Divergence(2.0, 1, 2, 4.0, 10)
    assert (total.kl, total.agreement) == (0.5, 4 / 6)
    assert total.perplexity == pytest.approx(2.718281828**0.5)
