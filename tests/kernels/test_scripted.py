"""Functions become TorchScript where PyTorch has it, and stay what they are where it has not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewer.kernels.scripted import scripted


def doubled(x: Tensor) -> Tensor:
    return x + x


def test_a_scripted_function_gives_the_plain_ones_numbers() -> None:
    x = torch.randn(3)
    made = scripted(doubled)
    assert isinstance(made, torch.jit.ScriptFunction)
    assert torch.equal(made(x), doubled(x))


def test_without_torchscript_the_plain_function_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.jit, "script")
    assert scripted(doubled) is doubled
