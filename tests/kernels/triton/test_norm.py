"""RMSNorm kernels against float64, for widths that fill no block and rows of any leading shape."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewer.kernels.triton.norm import add_rms_norm, rms_norm
from fewer.model import norm


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double().cpu()
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double().cpu()


@pytest.mark.parametrize("width", [1, 32, 100, 576])
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 3)])
def test_rms_norm_equals_float64(width: int, shape: tuple[int, ...], device: torch.device) -> None:
    x, weight = torch.randn(*shape, width).to(device), torch.randn(width).to(device)
    out = rms_norm(x, weight, 0.1, torch.float32)  # an eps large enough to be missed
    assert out.shape == x.shape
    torch.testing.assert_close(out.double().cpu(), reference(x, weight, 0.1), rtol=1e-5, atol=1e-6)


def test_rms_norm_reads_and_writes_the_dtypes_asked_for(device: torch.device) -> None:
    x, weight = torch.randn(4, 96).bfloat16().to(device), torch.randn(96).to(device)
    exact = rms_norm(x, weight, 1e-5, torch.float32)
    torch.testing.assert_close(exact.double().cpu(), reference(x, weight, 1e-5), rtol=1e-5, atol=1e-6)
    rounded = rms_norm(x, weight, 1e-5, torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=2**-7, atol=0)


def test_rms_norm_of_a_strided_view_and_of_nothing(device: torch.device) -> None:
    whole, weight = torch.randn(4, 3, 64).to(device), torch.randn(32).to(device)
    view = whole.transpose(0, 1)[:, ::2, 16:48]
    torch.testing.assert_close(
        rms_norm(view, weight, 1e-5, torch.float32).double().cpu(), reference(view, weight, 1e-5), rtol=1e-5, atol=1e-6
    )
    assert rms_norm(whole[:0, 0, :32], weight, 1e-5, torch.float32).shape == (0, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_rms_norm_norms_the_sum_that_it_stores(dtype: torch.dtype, device: torch.device) -> None:
    x, residual = torch.randn(5, 100).to(device), (10 * torch.randn(5, 100)).to(dtype).to(device)
    weight = torch.randn(100).to(device)
    total, out = add_rms_norm(x, residual, weight, 1e-5, torch.float32)
    assert total.dtype == dtype
    rounding = 1e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(total.float(), x + residual.float(), rtol=rounding, atol=rounding)
    torch.testing.assert_close(out.double().cpu(), reference(total, weight, 1e-5), rtol=1e-5, atol=1e-5)


def test_the_fused_norm_equals_the_networks(device: torch.device) -> None:
    x, weight = torch.randn(3, 80), torch.randn(80)
    fused = rms_norm(x.to(device), weight.to(device), 1e-6, torch.float32).cpu()
    torch.testing.assert_close(fused, norm.rms_norm(x, weight, 1e-6, torch.float32), rtol=1e-5, atol=1e-6)
