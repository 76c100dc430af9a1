"""Batches beyond the narrow products' rows give the general path's logits, for every switch of the network."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fewer.engine import cuda
from tests.engine.test_cuda import CPU, FEATURES, SMALL, assert_same_steps, build, fast_runner, general_runner
from tests.random_model import config_of


@pytest.mark.parametrize("feature", [{}, *FEATURES.values()], ids=["plain", *FEATURES])
def test_steps_equal_the_general_paths(
    feature: dict[str, Any], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "WIDE", 1)
    config = config_of(**SMALL | feature)
    fast, exact = fast_runner(build(config, "dense", device)), general_runner(build(config, "dense", CPU))
    assert_same_steps(fast, exact, 2, 3, 1e-4)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantised_matrices_are_decoded(kind: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "WIDE", 1)
    config = config_of(**SMALL)
    fast, exact = fast_runner(build(config, kind, device)), general_runner(build(config, kind, CPU, dense=True))
    assert_same_steps(fast, exact, 2, 2, 0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["dense", "int4"])
def test_a_hundred_rows_in_bfloat16_stay_near_the_cpus_float32(kind: str) -> None:
    config = config_of(**SMALL | {"hidden_size": 64, "intermediate_size": 96})
    fast = fast_runner(build(config, kind, torch.device("cuda"), torch.bfloat16))
    assert_same_steps(fast, general_runner(build(config, kind, CPU, dense=True)), 100, 105, 0.1)
