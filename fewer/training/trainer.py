"""The one training loop: freezing, parameter groups, schedule, clipping, accumulation, seeds, resume, progress.

AdamW (Decoupled Weight Decay Regularization, arXiv 1711.05101). Batch n and the random numbers of update n depend on
the seed and n alone, so a run that was interrupted continues bit for bit.
"""

from __future__ import annotations

import fnmatch
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewer.errors import CheckpointError, NumericalError, UsageError
from fewer.training.data import Batches
from fewer.training.schedule import SCHEDULES, Schedule, learning_rate_factor
from fewer.training.training_state import load_state, save_state

Loss = Callable[[Any], Tensor | Mapping[str, Tensor]]  # takes what `Batches.batch` returns


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters whose names match a shell pattern, such as `layers.*.bias`, with settings of their own."""

    pattern: str
    learning_rate: float
    weight_decay: float = 0.0


@dataclass(frozen=True)
class TrainerConfig:
    steps: int  # updates, each over `accumulate` batches
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Schedule = "cosine"
    warmup: int = 0  # updates of linear warm-up
    final: float = 0.0  # share of the learning rate at the end of the schedule
    clip: float | None = 1.0  # the gradient's norm is at most this
    accumulate: int = 1  # batches whose gradients are averaged in one update
    seed: int = 0
    frozen: tuple[str, ...] = ()  # patterns of names that are not trained
    groups: tuple[ParameterGroup, ...] = ()  # the first that matches rules

    def __post_init__(self) -> None:
        positive = {"steps": self.steps, "learning_rate": self.learning_rate, "accumulate": self.accumulate}
        for name, value in positive.items():
            if value <= 0:
                raise UsageError(f"trainer: {name}={value} is not allowed: use a number above 0")
        if not 0 <= self.warmup <= self.steps:
            raise UsageError(f"trainer: warmup={self.warmup} is out of range: use 0 to {self.steps} steps")
        if self.schedule not in SCHEDULES:
            raise UsageError(f"trainer: unknown schedule '{self.schedule}': choose one of {', '.join(SCHEDULES)}")
        if not 0 <= self.final <= 1:
            raise UsageError(f"trainer: final={self.final} is out of range: use 0 to 1")
        if self.clip is not None and self.clip <= 0:
            raise UsageError(f"trainer: clip={self.clip} is not allowed: use a number above 0, or None")


@dataclass(frozen=True)
class StepRecord:
    """One update as the history keeps it."""

    step: int  # updates made so far, this one included
    loss: float  # mean over the accumulated batches, before the update
    learning_rate: float  # of parameters in no group
    gradient_norm: float  # before clipping
    terms: Mapping[str, float] = field(default_factory=dict)  # the parts of the loss, when it has several


class Trainer:
    """Fits parameters to a loss.

    `parameters`: a module, or parameters by name. `loss(batch)` returns a scalar, or named scalars that are added up.
    `checkpoint`: the file that `resume` reads; written every `save_every` updates, at the end, and on Ctrl-C.
    `progress(record)` is called after each update. Frozen parameters are not stored in the checkpoint.
    """

    def __init__(
        self,
        parameters: nn.Module | Mapping[str, nn.Parameter],
        loss: Loss,
        batches: Batches,
        config: TrainerConfig,
        checkpoint: Path | None = None,
        save_every: int = 100,
        progress: Callable[[StepRecord], None] | None = None,
    ):
        named = dict(parameters.named_parameters()) if isinstance(parameters, nn.Module) else dict(parameters)
        self.loss, self.batches, self.config = loss, batches, config
        self.checkpoint, self.save_every, self.progress = checkpoint, save_every, progress
        self.trained = _freeze(named, config.frozen)
        self.optimizer = _optimizer(self.trained, config)
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self.history: list[StepRecord] = []

    @property
    def step(self) -> int:
        """Updates made so far."""
        return len(self.history)

    def resume(self) -> bool:
        """Continue from the checkpoint file; False when there is none. Raises CheckpointError when it is of another
        run: other settings, data or parameters."""
        if self.checkpoint is None or not self.checkpoint.exists():
            return False
        records = load_state(self.checkpoint, self.trained, self.optimizer, self.config, self.batches.fingerprint)
        try:
            self.history = [StepRecord(**record) for record in records]
        except TypeError:
            raise CheckpointError(f"{self.checkpoint} is a damaged training state: remove it and start again") from None
        return True

    def save(self) -> None:
        """Write the checkpoint file, whole or not at all."""
        if self.checkpoint is not None:
            save_state(
                self.checkpoint, self.trained, self.optimizer, self.config, self.batches.fingerprint, self.history
            )

    def run(self) -> list[StepRecord]:
        """Make the updates that are left; returns the history. Raises NumericalError when the loss is not finite."""
        try:
            while self.step < self.config.steps:
                record = self._update()
                if self.progress is not None:
                    self.progress(record)
                if self.step % self.save_every == 0 and self.step < self.config.steps:
                    self.save()
        except KeyboardInterrupt:
            self.save()  # parameters change only in one uninterrupted piece, so this is the last whole update
            raise
        self.save()
        return self.history

    def _update(self) -> StepRecord:
        config = self.config
        factor = learning_rate_factor(config.schedule, self.step, config.steps, config.warmup, config.final)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.zero_grad(set_to_none=True)
        with _seeded(config.seed, self.step, self.trained), torch.inference_mode(False), torch.enable_grad():
            loss, terms = self._accumulate()
        limit = math.inf if config.clip is None else config.clip
        norm = float(nn.utils.clip_grad_norm_(self.trained.values(), limit))
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise NumericalError(
                f"training step {self.step + 1}: the loss is {loss:g} and its gradient's norm {norm:g}: "
                "lower the learning rate, or check the data"
            )
        record = StepRecord(self.step + 1, loss, config.learning_rate * factor, norm, terms)
        with _uninterrupted():
            self.optimizer.step()
            self.history.append(record)
        return record

    def _accumulate(self) -> tuple[float, dict[str, float]]:
        """Backward through `accumulate` batches; the mean loss and its terms."""
        share = 1 / self.config.accumulate
        total, sums = 0.0, dict[str, float]()
        for index in range(self.config.accumulate):
            result = self.loss(self.batches.batch(self.step * self.config.accumulate + index))
            parts = {"loss": result} if isinstance(result, Tensor) else dict(result)
            loss = torch.stack([part.reshape(()) for part in parts.values()]).sum() * share
            loss.backward()
            total += float(loss.detach())
            for name, part in parts.items():
                sums[name] = sums.get(name, 0.0) + float(part.detach()) * share
        return total, {} if list(sums) == ["loss"] else sums


def _freeze(named: dict[str, nn.Parameter], frozen: tuple[str, ...]) -> dict[str, nn.Parameter]:
    """The parameters that are trained. Those that match a pattern, or come without a gradient, are not."""
    for pattern in frozen:
        _check_matches(pattern, named)
    for name, parameter in named.items():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in frozen):
            parameter.requires_grad_(False)
    trained = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    if not trained:
        raise UsageError(f"nothing is left to train: all {len(named)} parameters are frozen")
    if len({id(parameter) for parameter in trained.values()}) < len(trained):
        raise UsageError("a parameter appears under two names: give each one once")
    return trained


def _check_matches(pattern: str, named: Mapping[str, nn.Parameter]) -> None:
    if not fnmatch.filter(named, pattern):
        shown = ", ".join(list(named)[:4]) + (", …" if len(named) > 4 else "")
        raise UsageError(f"the pattern '{pattern}' matches no parameter: the names are {shown}")


def _optimizer(trained: Mapping[str, nn.Parameter], config: TrainerConfig) -> torch.optim.AdamW:
    rest = ParameterGroup("*", config.learning_rate, config.weight_decay)
    for group in config.groups:
        _check_matches(group.pattern, trained)
    members: dict[ParameterGroup, list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        chosen = next((g for g in config.groups if fnmatch.fnmatchcase(name, g.pattern)), rest)
        members.setdefault(chosen, []).append(parameter)
    return torch.optim.AdamW(
        [{"params": p, "lr": g.learning_rate, "weight_decay": g.weight_decay} for g, p in members.items()],
        betas=config.betas,
    )


@contextmanager
def _seeded(seed: int, step: int, trained: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Random numbers of this update, on every device in use; the caller's generators are left as they were."""
    devices = sorted({p.device.index or 0 for p in trained.values() if p.is_cuda})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed((seed * 1_000_003 + step) % 2**63)
        yield


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until the block is done: an update is made whole or not at all."""
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield
        return
    arrived: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: arrived.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if arrived:
        previous(arrived[0], None)
