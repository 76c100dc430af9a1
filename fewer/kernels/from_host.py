"""Small tensors on their way to a GPU that is busy: copied from pinned memory, so that the host waits for no kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def from_host(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Nested lists of numbers as a tensor on `device`, behind what was launched there before."""
    on_gpu = device.type == "cuda"
    return torch.tensor(values, dtype=dtype, pin_memory=on_gpu).to(device, non_blocking=on_gpu)


def write_from_host(target: Tensor, values: Any) -> None:
    """The same into a tensor that is there, of as many numbers."""
    on_gpu = target.is_cuda
    target.copy_(torch.tensor(values, dtype=target.dtype, pin_memory=on_gpu), non_blocking=on_gpu)
