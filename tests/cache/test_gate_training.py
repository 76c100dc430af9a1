"""Gates by distillation: they start as the model itself, fall where that costs nothing, and say where they are from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fewer import registry
from fewer.cache.gate_profile import profiled_gates
from fewer.cache.gate_training import GateFitConfig, Streams
from fewer.cache.head_gates import GATES, gates_of
from fewer.errors import UsageError
from fewer.language_model import LanguageModel, load
from fewer.training import Adapter, Haystack, PasskeyBatch, PasskeyBatches, PasskeyConfig, StepRecord, TrainingText
from fewer.training.fitting import fit, fit_to_file
from tests.tiny_model import write_model

TEXT = TrainingText("the cat sat on the mat and the dog sat on the log. " * 40, "a text")
SMALL = {"sinks": 2, "window": 8, "passkeys": 1, "words": 2, "shortest": 256, "longest": 320, "lengths": 2}
SETTINGS = GateFitConfig(steps=4, **SMALL)  # type: ignore[arg-type]
METHOD = registry.find("cache", "duo-attention")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    folder = write_model(tmp_path_factory.mktemp("gates") / "tiny", context=400, layers=3)
    return load(folder, weights="dense", dtype="float32", device="cpu", gradients=True)


@pytest.fixture(scope="module")
def batch(model: LanguageModel) -> PasskeyBatch:
    contexts = PasskeyConfig(1, 2, 256, 320, 2)
    return PasskeyBatches(Haystack(TEXT.text, model.tokenizer), contexts, 0).batch(0)


@pytest.fixture(scope="module")
def fitted(model: LanguageModel) -> Callable[[float, int], Adapter]:
    known: dict[tuple[float, int], Adapter] = {}

    def of(penalty: float, steps: int) -> Adapter:
        if (penalty, steps) not in known:
            config = GateFitConfig(steps=steps, penalty=penalty, learning_rate=0.05, **SMALL)  # type: ignore[arg-type]
            known[penalty, steps] = fit(METHOD, model, TEXT, config)
        return known[penalty, steps]

    return of


@pytest.mark.parametrize("full", ["teacher", "student"])
def test_at_gates_of_1_the_student_is_the_teacher(model: LanguageModel, batch: PasskeyBatch, full: str) -> None:
    streams = Streams(model, GateFitConfig(full=full, **SMALL))  # type: ignore[arg-type]
    ones = torch.ones(3, 2, requires_grad=True)
    distance = streams.distance(batch, ones)
    assert float(distance.detach()) < 1e-8
    distance.backward()
    assert ones.grad is not None and ones.grad.isfinite().all()
    assert float(streams.distance(batch, torch.zeros(3, 2))) > 1e-3


@pytest.mark.parametrize("full", ["teacher", "student"])
def test_the_gradient_of_a_gate_is_that_of_finite_differences(
    model: LanguageModel, batch: PasskeyBatch, full: str
) -> None:
    streams = Streams(model, GateFitConfig(full=full, **SMALL))  # type: ignore[arg-type]
    gates = torch.tensor([[0.7, 0.2], [0.4, 0.9], [0.5, 0.6]], requires_grad=True)
    streams.distance(batch, gates).backward()
    assert gates.grad is not None
    for place in ((0, 0), (1, 1), (2, 0)):
        nudged = []
        for nudge in (0.01, -0.01):
            moved = gates.detach().clone()
            moved[place] += nudge
            nudged.append(float(streams.distance(batch, moved)))
        assert float(gates.grad[place]) == pytest.approx((nudged[0] - nudged[1]) / 0.02, rel=0.05, abs=1e-4)


def test_only_gates_are_trained_and_the_loss_starts_at_the_penalty(model: LanguageModel) -> None:
    weights = [matrix.dequantize().clone() for _, matrix in model.transformer.matrices()]
    records: list[StepRecord] = []
    adapter = fit(METHOD, model, TEXT, SETTINGS, on_step=lambda record, total: records.append(record))
    assert records[0].loss == pytest.approx(0.05, abs=1e-5) and records[0].terms["distillation"] < 1e-6
    assert records[1].terms["penalty"] < 0.05 and records[1].terms["distillation"] > 0
    for (_, matrix), before in zip(model.transformer.matrices(), weights, strict=True):
        assert torch.equal(matrix.dequantize(), before)
    gates = gates_of(adapter, model.config)
    assert torch.equal(gates, adapter.tensors[GATES]) and gates.shape == (3, 2)
    origin = adapter.provenance
    assert (origin.method, origin.config["sinks"], origin.config["window"]) == ("duo-attention", 2, 8)
    assert set(origin.metrics) == {"distillation", "all_streaming", "mean_gate", "share_above_half"}


def test_a_heavier_penalty_lowers_the_gates_and_distillation_stays_below_streaming_in_all_heads(
    fitted: Callable[[float, int], Adapter],
) -> None:
    found = [fitted(penalty, 30).provenance.metrics for penalty in (0.02, 2.0, 20.0)]
    means = [metrics["mean_gate"] for metrics in found]
    assert means[0] > means[1] > means[2]
    assert found[0]["distillation"] < 0.5 * found[0]["all_streaming"]
    assert found[0]["distillation"] < found[2]["distillation"]


def test_a_run_that_broke_goes_on_to_the_same_gates(model: LanguageModel, tmp_path: Path) -> None:
    whole, path = fit(METHOD, model, TEXT, SETTINGS), tmp_path / "gates.safetensors"

    def stop(record: StepRecord, total: int) -> None:
        if record.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_to_file(path, METHOD, model, TEXT, SETTINGS, stop)
    again = fit_to_file(path, METHOD, model, TEXT, SETTINGS)
    assert torch.equal(again.tensors[GATES], whole.tensors[GATES])


def test_a_profile_needs_no_training_and_its_gates_are_shares(model: LanguageModel) -> None:
    gates = profiled_gates(model, TEXT.text)
    assert gates.shape == (3, 2) and (gates > 0).all() and (gates < 1).all() and gates.std() > 0
    adapter = fit(METHOD, model, TEXT, GateFitConfig(recipe="profile"))
    assert torch.equal(adapter.tensors[GATES], gates)
    with pytest.raises(UsageError, match="too few for a profile"):
        profiled_gates(model, "the cat")


def test_settings_out_of_range_are_refused() -> None:
    for settings, message in (
        ({"steps": 0}, "steps=0"),
        ({"penalty": -1.0}, "penalty=-1.0"),
        ({"window": 0}, "window=0"),
    ):
        with pytest.raises(UsageError, match=message):
            GateFitConfig(**settings)
