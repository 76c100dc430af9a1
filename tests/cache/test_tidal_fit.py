"""Fitting TidalDecode: the layer that is found, what the adapter says of it, and that recipes of the model use it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fewer.cache import TidalDecodeCache
from fewer.cache.tidal_calibration import TidalFitConfig, recall
from fewer.errors import CheckpointError, UsageError
from fewer.language_model import LanguageModel, load
from fewer.training import StepRecord, TrainingText, adapter_store, fit, save_adapter
from fewer.training.fitting import fitted_method
from tests.tiny_model import write_model

TEXT = TrainingText("the cat sat on the mat and the dog sat on the log. " * 20, "a text")
FIT = TidalFitConfig(contexts=2, held_out=1, length=480, tokens=4, budget=32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    folder = write_model(tmp_path_factory.mktemp("tidal") / "tiny", context=512, layers=6)
    return load(folder, weights="dense", dtype="float32", device="cpu")


def test_the_layer_with_the_best_recall_is_kept_and_used(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FEWER_HOME", str(tmp_path))
    steps: list[tuple[int, int]] = []

    def on_step(record: StepRecord, total: int) -> None:
        steps.append((record.step, total))
        assert 0 <= record.loss <= 1

    method = fitted_method("tidal-decode")
    adapter = fit(method, model, TEXT, FIT, on_step=on_step)
    assert steps == [(1, 3), (2, 3), (3, 3)]
    overlap, found = adapter.tensors["overlap"], adapter.tensors["recall"]
    assert torch.allclose(overlap, overlap.t()) and torch.allclose(overlap.diagonal(), torch.ones(6))
    assert torch.allclose(recall(overlap, 2), found)
    (best,) = adapter.tensors["reselect"].tolist()
    assert best in (3, 4) and found[best] == found.max()
    assert set(adapter.provenance.metrics) == {"recall", "recall_without"}
    assert torch.equal(overlap, fit(method, model, TEXT, FIT).tensors["overlap"])  # nothing is left to chance

    with pytest.raises(CheckpointError, match="cache=tidal-decode has not been fitted to this model"):
        model.with_recipe(replace(model.recipe, cache="tidal-decode:budget=32"))
    assert model.with_recipe(replace(model.recipe, cache="tidal-decode:reselect=4")).new_cache(1, 8).lengths == [
        0
    ]  # needs no fit
    path = adapter_store.own_path("tidal-decode", "tiny", model.checkpoint.fingerprint())
    path.parent.mkdir(parents=True, exist_ok=True)
    save_adapter(path, adapter)
    cache = model.with_recipe(replace(model.recipe, cache="tidal-decode:budget=32")).new_cache(1, 8)
    assert isinstance(cache, TidalDecodeCache) and cache.selecting == [2, best]


def test_a_model_with_too_few_layers_is_refused(tmp_path: Path) -> None:
    shallow = load(write_model(tmp_path / "tiny", layers=4), weights="dense", dtype="float32", device="cpu")
    with pytest.raises(UsageError, match="has 4 layers with full attention, too few to select twice"):
        fit(fitted_method("tidal-decode"), shallow, TEXT, FIT)
