"""Builds the network from a checkpoint: which format each matrix gets, on which device, with progress."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewer.checkpoint.checkpoint import Checkpoint
from fewer.errors import UsageError
from fewer.formats import WeightFormat
from fewer.model.transformer import Transformer
from fewer.registry import DTYPES, Choice
from fewer.slots import ExpertsMethod, WeightMethod


def choose_device(device: str | None) -> torch.device:
    """The named device, or CUDA when there is one. Raises UsageError for a device this machine lacks."""
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UsageError(f"unknown device '{device}': use cpu, cuda, or cuda:N") from None
    if chosen.type not in ("cpu", "cuda"):
        raise UsageError(f"device '{device}' is not supported: use cpu, cuda, or cuda:N")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device '{device}' was asked for, but PyTorch sees no CUDA GPU here: use --device cpu")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device '{device}' does not exist: this machine has {torch.cuda.device_count()} CUDA GPU(s)")
    return chosen


def choose_dtype(dtype: str | None) -> torch.dtype:
    """The named dtype; bfloat16 by default, which every format's kernel takes."""
    if dtype is None:
        return torch.bfloat16
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype '{dtype}': allowed are {', '.join(DTYPES)}")
    return DTYPES[dtype]


class MatrixLoader:
    """Decodes a checkpoint's tensors one at a time and passes matrices through the weights method.

    `progress(done, total)` counts matrices.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        weights: Choice,
        dtype: torch.dtype,
        device: torch.device,
        progress: Callable[[int, int], None] | None = None,
    ):
        settings = {} if weights.config is None else {"config": weights.config}
        self.method: WeightMethod = weights.method.target(dtype=dtype, **settings)
        self.checkpoint, self.device, self.progress = checkpoint, device, progress
        self.done = 0
        self.total = sum(name.endswith(".weight") and "norm" not in name for name in checkpoint.names())

    def matrix(self, name: str) -> WeightFormat:
        stored = self.checkpoint[name]
        made = stored.format() if self.method.keeps_file_format else None
        if made is None:  # on CUDA the rounding runs there, and only the finished format stays
            made = self.method.quantize(name, stored.dense(self.method.reads).to(self.device))
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)
        return made.to(self.device)

    def vector(self, name: str) -> Tensor:
        return self.checkpoint[name].dense(torch.float32).to(self.device)

    def transformer(self, dtype: torch.dtype, experts: Choice | None = None) -> Transformer:
        """The whole network, whose mixtures of experts `experts` builds; None: the network's plain ones."""
        parts = (self.checkpoint.config, self.matrix, self.vector, dtype, self.device)
        if experts is None:
            return Transformer(*parts)
        settings = {} if experts.config is None else {"config": experts.config}
        method: ExpertsMethod = experts.method.target(**settings)
        return Transformer(*parts, method.router, method.store)
