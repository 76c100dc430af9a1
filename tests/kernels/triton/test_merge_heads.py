"""The merge of parts side by side equals the reference's, whatever parts without keys hold."""

from __future__ import annotations

import pytest
import torch

from fewer.kernels.attention import merge
from fewer.kernels.triton.merge_heads import merge_into


@pytest.mark.parametrize(("count", "batch", "heads", "head_dim"), [(1, 1, 1, 16), (2, 3, 6, 64), (5, 7, 5, 80)])
def test_parts_become_one(count: int, batch: int, heads: int, head_dim: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(count, batch, heads, head_dim, generator=generator)
    lse = 30 * torch.randn(count, batch, heads, generator=generator)
    unseen = torch.rand(lse.shape, generator=generator) < 0.4
    lse[unseen] = -torch.inf
    wanted = merge([(part.double(), total) for part, total in zip(parts, lse, strict=True)])[0]
    parts[unseen] = torch.nan
    out = torch.full((batch, heads * head_dim), torch.nan, device=device)
    merge_into(out, parts.to(device), lse.to(device))
    torch.testing.assert_close(out.cpu().double().view(wanted.shape), wanted, rtol=1e-5, atol=1e-6)


def test_the_output_may_be_narrower(device: torch.device) -> None:
    parts, lse = torch.randn(2, 3, 4, 32), torch.randn(2, 3, 4)
    exact, rounded = torch.empty(3, 128, device=device), torch.empty(3, 128, dtype=torch.bfloat16, device=device)
    for out in (exact, rounded):
        merge_into(out, parts.to(device), lse.to(device))
    torch.testing.assert_close(rounded.float(), exact, rtol=2**-7, atol=0)  # the interpreter cuts, a GPU rounds
