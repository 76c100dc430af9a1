"""Attention over packed rows against PyTorch's over what `RowLayout.unpack` makes of them, head by head."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewer.cache.quantised_pages import RowLayout
from fewer.kernels.head_stores import HeadStores
from fewer.kernels.triton.packed_attention import attend_packed
from tests.kernels.triton.test_pack_new import PAGE_SIZE, SINKS, WINDOW, stores_for
from tests.kernels.triton.test_page_selector import tokens_at

BUDGET, COUNT, SCALE = 48, 3, 0.3  # tokens, and pages on the list of a longer row


def problem(layout: RowLayout, homes: list[int], batch: int, pages: int, device: torch.device) -> HeadStores:
    """Random rows, in pages that lie in no order; the ring is full of them."""
    stores = stores_for(layout, homes, batch, device)
    table = torch.randperm(pages * batch).view(batch, pages).int()
    rows = torch.randn(2, pages * batch, stores.pages.shape[2], PAGE_SIZE, layout.head_dim)
    ring = torch.randn(2, batch, stores.ring.shape[2], SINKS + WINDOW, layout.head_dim)
    return replace(
        stores, table=table.to(device), pages=layout.pack(rows).to(device), ring=layout.pack(ring).to(device)
    )


def seen_by(
    stores: HeadStores, layout: RowLayout, row: int, home: int, position: int, listed: list[int]
) -> tuple[Tensor, Tensor]:
    """Keys and values [S, D] that a query at `position` of this row and head meets."""
    if home < 0:
        keys, values = layout.unpack(stores.ring.cpu()[:, row, -1 - home, : min(position + 1, SINKS + WINDOW)])
        return keys, values
    if position <= BUDGET:
        listed = list(range(position // PAGE_SIZE + 1))
    tokens = [page * PAGE_SIZE + at for page in listed if page >= 0 for at in range(PAGE_SIZE)]
    tokens = [token for token in tokens if token <= position]
    table = stores.table.cpu()[row]
    at = torch.tensor([[int(table[token // PAGE_SIZE]), token % PAGE_SIZE] for token in tokens]).t()
    keys, values = layout.unpack(stores.pages.cpu()[:, at[0], home, at[1]])
    return keys, values


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize(
    "homes, group, head_dim, shared, softcap",
    [
        ([-1, 0], 2, 16, False, None),
        ([0], 3, 24, True, None),
        ([-1], 1, 32, False, 2.0),
        ([1, 0], 1, 64, False, None),
    ],
)
def test_heads_meet_their_lists_or_their_ring(
    bits: Any, homes: list[int], group: int, head_dim: int, shared: bool, softcap: float | None, device: torch.device
) -> None:
    torch.manual_seed(bits)
    positions, kv_heads = [111, 48, 5], len(homes)
    layout = RowLayout(head_dim, bits, torch.float32)
    stores = problem(layout, homes, len(positions), 8, device)
    retrieval = stores.pages.shape[2]
    own = retrieval * (1 if shared else group)
    lists = torch.full((len(positions), own, COUNT + 1), -1, dtype=torch.int32)
    for row, position in enumerate(positions):
        for of_list in lists[row]:
            older = torch.randperm(position // PAGE_SIZE)[: COUNT - 1]
            of_list[1 : 1 + len(older)] = older
            of_list[-1] = position // PAGE_SIZE
    q = torch.randn(len(positions), kv_heads * group, head_dim)
    new = replace(
        tokens_at(positions, kv_heads * group, kv_heads, head_dim, device),
        out=torch.zeros(len(positions), kv_heads * group * head_dim, device=device), scale=SCALE, softcap=softcap,
    )  # fmt: skip
    for fresh in (False, True):  # the second finds the workspace as the first has left it
        new.out.zero_()
        attend_packed(new, q.to(device), stores, lists.to(device), BUDGET, fresh, resident=3 if fresh else 40)
        found = new.out.cpu().view(q.shape)
        for row, position in enumerate(positions):
            for head in range(kv_heads * group):
                home = homes[head // group]
                listed = [] if home < 0 else lists[row, home if shared else home * group + head % group].tolist()
                keys, values = seen_by(stores, layout, row, home, position, listed)
                logits = keys @ q[row, head] * SCALE
                if softcap is not None:
                    logits = torch.tanh(logits / softcap) * softcap
                torch.testing.assert_close(found[row, head], logits.softmax(0) @ values, rtol=1e-4, atol=1e-4)
