"""Where Triton kernels run: in Triton's interpreter on the CPU, or compiled on a GPU when `-m gpu` asks for it.

Triton decides once a process, when it is first imported, and transformers imports it too. So the choice is made here,
before any test file (or xdist worker) imports anything. Nothing else changes: on the CPU only the tests of
kernels use Triton.
"""

from __future__ import annotations

import os

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("markexpr") in ("", "not gpu") or "not gpu" in config.getoption("markexpr"):
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """A test that takes it is two: one in the interpreter, one (marked gpu) on CUDA."""
    return torch.device(request.param)
