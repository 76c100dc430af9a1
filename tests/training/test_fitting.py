"""Fitting: an adapter that says where it came from, a run that goes on, and a recipe that finds what was fitted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fewer import registry
from fewer.errors import CheckpointError, UsageError
from fewer.language_model import LanguageModel, load
from fewer.registry import Choice
from fewer.training import StepRecord, TrainingText, adapter_store, fit, fit_to_file, load_adapter
from fewer.training.adapters import Adapter, Provenance, save_adapter, versions
from fewer.training.fitting import fitted_method, state_path
from tests.tiny_model import write_model
from tests.training.toy_method import NAME, ToyConfig, ToyFitConfig, register

TEXT = TrainingText("the cat sat on the mat and the dog sat on the log. " * 20, "a text")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("fitting") / "tiny")


@pytest.fixture(scope="module")
def model(folder: Path) -> LanguageModel:
    return load(folder, weights="dense", dtype="float32", device="cpu", gradients=True)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> registry.Method:
    monkeypatch.setenv("FEWER_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(adapter_store, "SHIPPED", tmp_path / "shipped")
    return register(monkeypatch)


class Break:
    """Ctrl-C after a number of updates."""

    def __init__(self, after: int):
        self.after = after

    def __call__(self, record: StepRecord, total: int) -> None:
        if record.step == self.after:
            raise KeyboardInterrupt


def test_an_adapter_says_where_it_came_from_and_learnt_something(toy: registry.Method, model: LanguageModel) -> None:
    adapter = fit(toy, model, TEXT, ToyFitConfig(steps=8, seed=3))
    origin = adapter.provenance
    assert (origin.method, origin.seed, origin.config["steps"]) == (NAME, 3, 8)
    assert origin.model == model.checkpoint.fingerprint() and origin.data == TEXT.fingerprint
    assert origin.versions == versions() and set(origin.versions) == {"fewer", "torch", "python"}
    assert origin.metrics["loss_after"] < origin.metrics["loss_before"]
    assert fit(toy, model, TEXT).provenance.config["steps"] == ToyFitConfig().steps


def test_a_run_that_broke_goes_on_to_the_same_numbers(
    toy: registry.Method, model: LanguageModel, tmp_path: Path
) -> None:
    path, whole = tmp_path / "a" / "gain.safetensors", fit(toy, model, TEXT)
    with pytest.raises(KeyboardInterrupt):
        fit_to_file(path, toy, model, TEXT, on_step=Break(3))
    assert state_path(path).exists() and not path.exists()
    steps: list[int] = []
    fit_to_file(path, toy, model, TEXT, on_step=lambda record, total: steps.append(record.step))
    assert steps == [4, 5, 6]
    found = load_adapter(path, NAME)
    assert torch.equal(found.tensors["gain"], whole.tensors["gain"]) and found.provenance == whole.provenance
    assert [each.name for each in path.parent.iterdir()] == ["gain.safetensors"]


def test_an_unfinished_run_of_other_settings_is_refused_and_the_old_adapter_stays(
    toy: registry.Method, model: LanguageModel, tmp_path: Path
) -> None:
    path = tmp_path / "gain.safetensors"
    fit_to_file(path, toy, model, TEXT)
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        fit_to_file(path, toy, model, TEXT, ToyFitConfig(steps=9), Break(2))
    with pytest.raises(CheckpointError, match="steps=9, this one has 6"):
        fit_to_file(path, toy, model, TEXT)
    assert path.read_bytes() == before


def test_a_recipe_finds_what_was_fitted_here_then_what_is_shipped(
    toy: registry.Method, model: LanguageModel, folder: Path, tmp_path: Path
) -> None:
    fingerprint = model.checkpoint.fingerprint()
    with pytest.raises(CheckpointError, match=f"cache={NAME} has not been fitted to this model.*fewer train {NAME}"):
        load(folder, cache=NAME)
    shipped = tmp_path / "shipped" / NAME / "smollm2.safetensors"
    fit_to_file(shipped, toy, model, TEXT, ToyFitConfig(seed=1))
    assert seed_in_use(folder) == 1
    fit_to_file(adapter_store.own_path(NAME, str(folder), fingerprint), toy, model, TEXT, ToyFitConfig(seed=2))
    assert seed_in_use(folder) == 2
    assert seed_in_use(folder, f"{NAME}:adapter={shipped}") == 1


def seed_in_use(folder: Path, spec: str = NAME) -> int:
    adapter: Adapter = load(folder, cache=spec).choices["cache"].method.target.keywords["adapter"]
    return adapter.provenance.seed


def test_an_adapter_of_another_model_is_not_taken(
    toy: registry.Method, model: LanguageModel, folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "shipped" / NAME / "other.safetensors"
    save_adapter(path, Adapter({"gain": torch.ones(64)}, Provenance(NAME, {}, "c" * 64, "d" * 64, 0)))
    with pytest.raises(CheckpointError, match="has not been fitted to this model .*, only to other: run"):
        load(folder, cache=NAME)
    with pytest.raises(CheckpointError, match="was fitted to another model"):
        load(folder, cache=f"{NAME}:adapter={path}")
    with pytest.raises(CheckpointError, match="none.safetensors"):
        load(folder, cache=f"{NAME}:adapter={tmp_path / 'none.safetensors'}")


def test_the_adapter_changes_what_the_model_says_and_one_that_learnt_nothing_does_not(
    toy: registry.Method, model: LanguageModel, folder: Path, tmp_path: Path
) -> None:
    def logits(spec: str) -> torch.Tensor:
        return load(folder, weights="dense", dtype="float32", cache=spec).session().prefill([[5, 6, 7, 8, 9]])

    fingerprint = model.checkpoint.fingerprint()
    for name, gain in (("one", 1.0), ("quarter", 0.25)):
        origin = Provenance(NAME, {}, fingerprint, "d" * 64, 0)
        save_adapter(tmp_path / f"{name}.safetensors", Adapter({"gain": torch.full((64,), gain)}, origin))
    full = logits("full")
    assert torch.equal(logits(f"{NAME}:adapter={tmp_path / 'one.safetensors'}"), full)
    assert not torch.allclose(logits(f"{NAME}:adapter={tmp_path / 'quarter.safetensors'}"), full, atol=1e-3)


def test_the_alias_names_the_file_and_a_path_its_fingerprint(toy: registry.Method, tmp_path: Path) -> None:
    home = tmp_path / "home" / "adapters" / NAME
    assert adapter_store.own_path(NAME, "smollm2", "a" * 64) == home / "smollm2.safetensors"
    assert adapter_store.own_path(NAME, "/a/b", "a" * 64) == home / f"{'a' * 16}.safetensors"


def test_what_learns_nothing_is_told_apart_from_what_is_unknown(toy: registry.Method) -> None:
    assert fitted_method(NAME) is toy
    with pytest.raises(UsageError, match=f"'sink-window' learns nothing.*{NAME}"):
        fitted_method("sink-window")
    with pytest.raises(UsageError, match="unknown method 'nope'"):
        fitted_method("nope")
    assert adapter_store.with_adapters({"cache": Choice(registry.find("cache", "full"))}, None)["cache"].config is None  # type: ignore[arg-type]


def test_the_built_in_text_serves_where_none_is_given() -> None:
    text = TrainingText.built_in()
    assert len(text.text) > 100_000 and text.fingerprint == TrainingText.built_in().fingerprint
    with pytest.raises(UsageError, match="empty.txt holds no text"):
        TrainingText("\n", "empty.txt")


def test_a_loaded_model_lets_gradients_through_only_when_asked(folder: Path) -> None:
    hidden = torch.ones(1, 64, requires_grad=True)
    trainable = load(folder, weights="dense", dtype="float32", gradients=True).transformer
    trainable.logits(hidden).sum().backward()
    assert hidden.grad is not None and hidden.grad.abs().sum() > 0
    frozen = load(folder, weights="dense", dtype="float32").transformer
    with pytest.raises(RuntimeError, match="[Ii]nference tensors"):
        frozen.logits(hidden).sum().backward()


def test_the_settings_of_a_toy_choice_are_checked_like_any_other(toy: registry.Method) -> None:
    assert registry.parse_spec("cache", f"{NAME}:adapter=a.safetensors").config == ToyConfig("a.safetensors")
