"""Fitting a method to a model: what its `fit` is given, and one call that runs it, resumes it and saves the adapter."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from fewer.checkpoint.checkpoint import Checkpoint
from fewer.checkpoint.tokenizer import Tokenizer
from fewer.engine.runner import Runner
from fewer.engine.session import Session
from fewer.errors import UsageError
from fewer.model.config import ModelConfig
from fewer.model.transformer import Transformer
from fewer.registry import Method, methods
from fewer.slots import KVCache
from fewer.training.adapters import Adapter, Provenance, save_adapter
from fewer.training.data import Batches
from fewer.training.haystack import filler
from fewer.training.trainer import Loss, StepRecord, Trainer, TrainerConfig

OnStep = Callable[[StepRecord, int], None]  # the update that was made, and how many there will be
OnPart = Callable[[str, int, int], None]  # other work: what it is, how much is done, how much there is
BUILT_IN = "the built-in text"


class FittedModel(Protocol):
    """What `fit` reads of a loaded model: `fewer.LanguageModel` has it all. Its weights are frozen."""

    checkpoint: Checkpoint
    transformer: Transformer
    runner: Runner
    context_length: int

    @property
    def config(self) -> ModelConfig: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    def new_cache(self, batch: int, capacity: int) -> KVCache: ...

    def session(self, batch: int = 1, capacity: int | None = None) -> Session: ...


@dataclass(frozen=True)
class TrainingText:
    """The words that a method is fitted on."""

    text: str
    name: str  # of the file, or what stands for it

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise UsageError(f"{self.name} holds no text to fit on: give some")

    @classmethod
    def built_in(cls) -> TrainingText:
        return cls(filler(), BUILT_IN)

    @property
    def is_built_in(self) -> bool:
        """Nobody has named a text."""
        return self.name == BUILT_IN

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class TrainingRun:
    """One call of a method's `fit`: trains with everything around it, and signs what comes out."""

    method: Method
    model: FittedModel
    data: TrainingText
    config: Any
    state: Path | None = None  # file of an interrupted run, which goes on; None: nothing is kept
    save_every: int = 50  # updates
    on_step: OnStep | None = None
    on_part: OnPart | None = None

    def train(
        self, parameters: nn.Module | Mapping[str, nn.Parameter], loss: Loss, batches: Batches, config: TrainerConfig
    ) -> list[StepRecord]:
        """Make the updates that are left; the history of all. Raises what `Trainer` does."""

        def progress(record: StepRecord) -> None:
            if self.on_step is not None:
                self.on_step(record, config.steps)

        trainer = Trainer(parameters, loss, batches, config, self.state, self.save_every, progress)
        trainer.resume()
        return trainer.run()

    def adapter(self, tensors: Mapping[str, Tensor], metrics: Mapping[str, float]) -> Adapter:
        """What was learnt, with where it came from."""
        provenance = Provenance(
            method=self.method.name,
            config={} if self.config is None else dataclasses.asdict(self.config),
            model=self.model.checkpoint.fingerprint(),
            data=self.data.fingerprint,
            seed=getattr(self.config, "seed", 0),
            metrics=dict(metrics),
        )
        return Adapter(dict(tensors), provenance)


def fitted_method(name: str) -> Method:
    """The method of that name, in whatever slot. Raises UsageError where it is unknown or learns nothing."""
    known = [entry for entry in methods() if entry.fit is not None]
    found = next((entry for entry in known if entry.name == name), None)
    if found is not None:
        return found
    allowed = f"choose one of {', '.join(entry.name for entry in known)}" if known else "no method here needs it yet"
    if any(entry.name == name for entry in methods()):
        raise UsageError(f"the method '{name}' learns nothing, so there is nothing to fit: {allowed}")
    raise UsageError(f"unknown method '{name}' to fit: {allowed}")


def fit(
    method: Method,
    model: FittedModel,
    data: TrainingText,
    config: Any = None,
    state: Path | None = None,
    on_step: OnStep | None = None,
    on_part: OnPart | None = None,
) -> Adapter:
    """Fit `method` to `model`; `config` is its `fit_config`, by default with the paper's values."""
    if method.fit is None:
        raise UsageError(f"the method '{method.name}' learns nothing, so there is nothing to fit")
    if config is None and method.fit_config is not None:
        config = method.fit_config()
    run = TrainingRun(method, model, data, config, state, on_step=on_step, on_part=on_part)
    adapter: Adapter = method.fit(model, data, config, run)
    return adapter


def fit_to_file(
    path: Path,
    method: Method,
    model: FittedModel,
    data: TrainingText,
    config: Any = None,
    on_step: OnStep | None = None,
    on_part: OnPart | None = None,
) -> Adapter:
    """`fit`, saved to `path` at once or not at all. Until then the run is kept beside it, and the same call goes on
    where it stopped."""
    state = state_path(path)
    adapter = fit(method, model, data, config, state, on_step, on_part)
    save_adapter(path, adapter)
    state.unlink(missing_ok=True)
    return adapter


def state_path(path: Path) -> Path:
    """The file that an unfinished run is kept in."""
    return path.with_name(f"{path.name}.unfinished")
