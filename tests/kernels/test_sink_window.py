"""Sinks and a window block by block: the same as a mask over everything, and so are its gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewer.kernels.attention import attend
from fewer.kernels.sink_window import BLOCK, sink_window_attention

WIDTH = 2 * BLOCK + 40


def problem(start: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(start)
    shapes = (2, 4, WIDTH, 8), (2, 2, start + WIDTH, 8), (2, 2, start + WIDTH, 8)
    return tuple(torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)  # type: ignore[return-value]


def masked(q: Tensor, k: Tensor, v: Tensor, start: int, sinks: int, window: int, softcap: float) -> Tensor:
    behind = torch.arange(start, start + WIDTH)[:, None] - torch.arange(start + WIDTH)
    seen = (behind >= 0) & ((behind < window) | (torch.arange(start + WIDTH) < sinks))
    return attend(q, k, v, 0.3, seen[None, None], softcap)[0]


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize(("sinks", "window"), [(0, 1), (0, 50), (4, 12), (4, BLOCK), (200, 30), (3, 10_000)])
@pytest.mark.parametrize("start", [0, 7, 300])
def test_it_equals_a_mask_over_everything_with_its_gradients(
    start: int, sinks: int, window: int, softcap: float
) -> None:
    q, k, v = problem(start)
    found = sink_window_attention(q, k, v, start, sinks, window, 0.3, softcap)
    wanted = masked(q, k, v, start, sinks, window, softcap)
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    for ours, theirs in zip(
        *(torch.autograd.grad((out * weights).sum(), (q, k, v)) for out in (found, wanted)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
