"""Fitting drafters by the seam: an adapter that a recipe finds, is small, learns, and goes on after a break."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fewer.decoding.counts import Counts
from fewer.decoding.draft_training import VOCABULARY, Teacher, accuracies
from fewer.decoding.generate import generate
from fewer.decoding.sampling import SamplingConfig
from fewer.language_model import LanguageModel, load
from fewer.recipe import Recipe
from fewer.registry import find
from fewer.training import TrainingText, adapter_store, answers, fit, fit_to_file
from fewer.training.answers import AnswerBatch
from tests.tiny_model import write_model

METHODS = ("chimera", "medusa", "eagle")
TEXT = TrainingText(
    "\n".join(f"the cat sat on {word} log" for word in ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l"]),
    "prompts",
)
QUICK: dict[str, Any] = {"steps": 40, "batch": 6, "answers": 40, "length": 24, "learning_rate": 3e-3}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    folder = write_model(tmp_path_factory.mktemp("drafters") / "tiny", spread=1.0)
    return load(folder, weights="dense", dtype="float32", device="cpu", gradients=True)


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("FEWER_HOME", str(tmp_path))
    monkeypatch.setattr(adapter_store, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(answers, "ROWS", {"cpu": 40})
    return tmp_path


@pytest.mark.parametrize("name", METHODS)
def test_what_is_fitted_is_found_and_drafts(model: LanguageModel, name: str) -> None:
    method = find("decoding", name)
    assert method.fit_config is not None
    path = adapter_store.own_path(name, "tiny", model.checkpoint.fingerprint())
    adapter = fit_to_file(path, method, model, TEXT, method.fit_config(vocabulary=100, **QUICK))
    metrics = adapter.provenance.metrics
    assert {"right_at_2", "right_at_5", "chain_tau", "loss", "seconds_per_step", "answer_tokens"} <= set(metrics)
    assert 1 < metrics["chain_tau"] <= 5 and metrics["right_at_2"] > 0.2
    assert adapter.tensors[VOCABULARY].shape == (100,)
    assert {t.dtype for key, t in adapter.tensors.items() if key != VOCABULARY} == {torch.bfloat16}
    drafting = model.with_recipe(Recipe("dense", decoding=f"{name}:gate=false", dtype="float32"))
    prompt, counts = model.encode("the cat sat on m log"), Counts()
    plain, found = (
        [t for event in generate(each.session(), [prompt], SamplingConfig(), each.strategy, 40, counts=counts)
         for t in event.tokens]
        for each in (model, drafting)
    )  # fmt: skip
    assert plain == found and counts.accepted > 0


@pytest.mark.parametrize("name", METHODS)
def test_a_run_that_broke_goes_on_to_the_same_numbers(model: LanguageModel, home: Path, name: str) -> None:
    method = find("decoding", name)
    assert method.fit_config is not None
    config = method.fit_config(**{**QUICK, "steps": 6})
    whole = fit(method, model, TEXT, config)

    def interrupt(record: Any, total: int) -> None:
        if record.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(method, model, TEXT, config, home / "state", interrupt)
    again = fit(method, model, TEXT, config, home / "state")
    assert all(torch.equal(whole.tensors[key], again.tensors[key]) for key in whole.tensors)


def test_a_given_text_is_trained_on_as_it_is(model: LanguageModel, home: Path) -> None:
    method = find("decoding", "medusa")
    assert method.fit_config is not None
    text = TrainingText("the cat sat on the mat and the dog sat on the log. " * 40, "a text")
    adapter = fit(method, model, text, method.fit_config(source="text", labels="text", **QUICK))
    assert not (home / "answers").exists()
    assert adapter.provenance.metrics["right_at_2"] > 0.5


def test_lessons_score_the_answer_alone_and_pad_nothing_in(model: LanguageModel) -> None:
    tokens = torch.tensor([[5, 6, 7, 8, 9, 10], [5, 6, 7, 8, 0, 0]])
    batch = AnswerBatch(tokens, torch.tensor([6, 4]), torch.tensor([2, 3]))
    text, argmax = (Teacher(model, labels).lesson(batch) for labels in ("text", "argmax"))  # type: ignore[arg-type]
    assert text.following.tolist() == [[-1, 7, 8, 9, 10, -1], [-1, -1, 8, -1, -1, -1]]
    assert ((text.following >= 0) == (argmax.following >= 0)).all()
    session = model.session()
    for place in range(6):
        logits = session.decode([int(tokens[0, place])])
        if 1 <= place < 5:
            assert int(logits.argmax()) == int(argmax.following[0, place])
    assert text.right(0).tolist()[0] == [7, 8, 9, 10, -1] and text.right(3).tolist()[0] == [10, -1, -1, -1, -1]
    assert text.hidden.shape == (2, 6, model.config.hidden_size)


def test_accuracies_count_chains() -> None:
    right = torch.tensor([[True, True, False, True], [True, False, True, True]])
    found = accuracies(right)
    assert (found["right_at_2"], found["right_at_3"], found["chain_tau"]) == (0.75, 0.75, 1 + (2 + 1 + 0 + 2) / 4)
