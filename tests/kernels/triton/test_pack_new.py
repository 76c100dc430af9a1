"""New tokens are packed bit by bit as `RowLayout` packs them, where their head and position say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fewer.cache.quantised_pages import RowLayout
from fewer.kernels.head_stores import HeadStores
from fewer.kernels.new_tokens import Fusion, NewTokens, Workspace
from fewer.kernels.triton.pack_new import pack_and_turn
from fewer.model.norm import rms_norm
from fewer.model.rope import Rotary

PAGE_SIZE, LOGICAL, SINKS, WINDOW = 16, 4, 3, 5


def stores_for(layout: RowLayout, homes: list[int], batch: int, device: torch.device) -> HeadStores:
    """Four pages a row, taken backwards; all of it full of what earlier texts left behind."""
    retrieval = sum(home >= 0 for home in homes)
    table = torch.arange(4 * batch, dtype=torch.int32).flip(0).view(batch, 4)
    stored = torch.uint8 if layout.quantised else layout.dtype
    return HeadStores(
        torch.tensor(homes, dtype=torch.int32, device=device),
        torch.ones(2, 4 * batch, retrieval, PAGE_SIZE, layout.width, device=device).to(stored),
        table.to(device),
        torch.full((4 * batch, retrieval, PAGE_SIZE // LOGICAL, 2, layout.head_dim), 0.25, device=device),
        torch.ones(2, batch, len(homes) - retrieval, SINKS + WINDOW, layout.width, device=device).to(stored),
        SINKS, WINDOW, layout.bits, LOGICAL,
    )  # fmt: skip


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("homes, group, head_dim", [([0, -1, 1, -2], 2, 16), ([0, 1], 3, 24), ([-1], 1, 32)])
def test_rows_and_bounds_are_those_of_the_reference(
    bits: Any, homes: list[int], group: int, head_dim: int, device: torch.device
) -> None:
    """Nothing is turned here, so every bit is to be the same; one head is constant, and its scale zero."""
    torch.manual_seed(bits)
    layout, positions, kv_heads = RowLayout(head_dim, bits, torch.float32), [0, 22, 37, 3], len(homes)
    projected = torch.randn(len(positions), (group + 2) * kv_heads, head_dim)
    projected[1, -1] = 0.7
    new = NewTokens(
        projected.flatten(1).to(device), torch.tensor(positions, dtype=torch.int32, device=device), torch.empty(0),
        group * kv_heads, kv_heads, 1.0, None, Fusion(None, 0), Workspace(device), device.type == "cuda",
    )  # fmt: skip
    stores = stores_for(layout, homes, len(positions), device)
    pages, ring, bounds = (part.clone().cpu() for part in (stores.pages, stores.ring, stores.bounds))
    queries = pack_and_turn(new, stores)

    q, k, v = projected.split((group * kv_heads, kv_heads, kv_heads), 1)
    assert torch.equal(queries.cpu(), q)
    packed = layout.pack(torch.stack((k, v)))
    for row, position in enumerate(positions):
        page, offset = int(stores.table[row, position // PAGE_SIZE]), position % PAGE_SIZE
        slot = position if position < SINKS else SINKS + (position - SINKS) % WINDOW
        for head, home in enumerate(homes):
            if home < 0:
                ring[:, row, -1 - home, slot] = packed[:, row, head]
                continue
            pages[:, page, home, offset] = packed[:, row, head]
            of_page, key = bounds[page, home, offset // LOGICAL], k[row, head]
            fresh = offset % LOGICAL == 0
            of_page[0] = key if fresh else torch.maximum(of_page[0], key)
            of_page[1] = key if fresh else torch.minimum(of_page[1], key)
    assert torch.equal(stores.pages.cpu(), pages)
    assert torch.equal(stores.ring.cpu(), ring)
    assert torch.equal(stores.bounds.cpu(), bounds)


@pytest.mark.parametrize("heads, kv_heads, head_dim, rotary_dim", [(6, 2, 16, 16), (4, 4, 24, 8)])
@pytest.mark.parametrize("norm", [False, True])
def test_queries_and_keys_are_normalised_and_turned(
    heads: int, kv_heads: int, head_dim: int, rotary_dim: int, norm: bool, device: torch.device
) -> None:
    torch.manual_seed(heads)
    layout, positions = RowLayout(head_dim, 16, torch.float32), torch.tensor([0, 7, 41])
    projected, gains = torch.randn(3, heads + 2 * kv_heads, head_dim), torch.rand(2, head_dim)
    rotary = Rotary(rotary_dim, head_dim, 1e4, 64)
    q, k, _ = projected.split((heads, kv_heads, kv_heads), 1)
    if norm:
        q, k = (rms_norm(x, gain, 1e-5, torch.float32) for x, gain in zip((q, k), gains, strict=True))
    q, k = (rotary.apply(x[:, :, None], positions[:, None])[:, :, 0] for x in (q, k))
    table = torch.view_as_real(rotary.table(64, torch.device("cpu"))).to(device)
    gain = [each.to(device) if norm else None for each in gains]
    new = NewTokens(
        projected.flatten(1).to(device), positions.int().to(device), torch.empty(0), heads, kv_heads, 1.0, None,
        Fusion(table, rotary_dim, gain[0], gain[1], 1e-5), Workspace(device), device.type == "cuda",
    )  # fmt: skip
    stores = stores_for(layout, list(range(kv_heads)), 3, device)
    torch.testing.assert_close(pack_and_turn(new, stores).cpu(), q, rtol=1e-5, atol=1e-5)
    for row, position in enumerate(positions.tolist()):
        found = stores.pages[0, int(stores.table[row, position // PAGE_SIZE]), :, position % PAGE_SIZE]
        torch.testing.assert_close(found.cpu(), k[row], rtol=1e-5, atol=1e-5)
