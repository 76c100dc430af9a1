"""The kernel before attention against `Rotary` and RMSNorm: queries turned, keys and values at their places."""

from __future__ import annotations

import pytest
import torch

from fewer.kernels.new_tokens import Fusion, NewTokens, Workspace
from fewer.kernels.triton.new_tokens import turn_and_store
from fewer.model.norm import rms_norm
from fewer.model.rope import Rotary


@pytest.mark.parametrize("heads, kv_heads, head_dim, rotary_dim", [(6, 2, 16, 16), (4, 4, 24, 8), (3, 1, 64, 0)])
@pytest.mark.parametrize("norm", [False, True])
def test_turned_and_stored(
    heads: int, kv_heads: int, head_dim: int, rotary_dim: int, norm: bool, device: torch.device
) -> None:
    torch.manual_seed(heads)
    batch, capacity = 3, 5
    positions, slots = torch.tensor([0, 7, 41]), torch.tensor([4, 0, 2])
    projected = torch.randn(batch, heads + 2 * kv_heads, head_dim)
    gains = torch.rand(2, head_dim)
    rotary = Rotary(rotary_dim, head_dim, 1e4, 64) if rotary_dim else None
    q, k, v = projected.split((heads, kv_heads, kv_heads), 1)
    if norm:
        q, k = (rms_norm(x, gain, 1e-5, torch.float32) for x, gain in zip((q, k), gains, strict=True))
    if rotary is not None:
        q, k = (rotary.apply(x[:, :, None], positions[:, None])[:, :, 0] for x in (q, k))

    storage = torch.zeros(2, batch, kv_heads, capacity, head_dim, device=device)
    strides = storage.stride()
    places = (torch.arange(batch)[:, None] * strides[1] + torch.arange(kv_heads) * strides[2]) + slots[
        :, None
    ] * strides[3]
    table = None if rotary is None else torch.view_as_real(rotary.table(64, torch.device("cpu"))).to(device)
    gain = [each.to(device) if norm else None for each in gains]
    new = NewTokens(
        projected.flatten(1).to(device), positions.int().to(device), torch.empty(0), heads, kv_heads, 1.0, None,
        Fusion(table, rotary_dim, gain[0], gain[1], 1e-5), Workspace(device), device.type == "cuda",
    )  # fmt: skip
    found = turn_and_store(new, storage[0], storage[1], places.to(device))
    torch.testing.assert_close(found.cpu(), q, rtol=1e-5, atol=1e-5)
    wanted = torch.zeros(2, batch, kv_heads, capacity, head_dim)
    for row, slot in enumerate(slots.tolist()):
        wanted[0, row, :, slot], wanted[1, row, :, slot] = k[row], v[row]
    torch.testing.assert_close(storage.cpu(), wanted, rtol=1e-5, atol=1e-5)
    whole = torch.zeros(2, batch, kv_heads, 42, head_dim, device=device)
    assert torch.equal(turn_and_store(new, whole[0], whole[1]), found)  # without places, slots are positions
    torch.testing.assert_close(
        whole[:, range(batch), :, positions], storage[:, range(batch), :, slots], rtol=0.0, atol=0.0
    )
    assert whole.count_nonzero() == storage.count_nonzero()
