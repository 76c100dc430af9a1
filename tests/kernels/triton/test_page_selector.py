"""The selector's lists are those of `choose_pages` over the bounds of `PageStatistics`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fewer.cache.page_statistics import PageStatistics, choose_pages, physical_scores
from fewer.cache.quantised_pages import RowLayout
from fewer.kernels.head_stores import HeadStores
from fewer.kernels.new_tokens import Fusion, NewTokens, Workspace
from fewer.kernels.triton.page_selector import choose
from tests.kernels.triton.test_pack_new import LOGICAL, PAGE_SIZE, stores_for

PAGES = 40  # of a row


def problem(homes: list[int], head_dim: int, batch: int, device: torch.device, ties: bool = False) -> HeadStores:
    """Random bounds of pages that lie in no order; `ties`: of few values, so that many pages are worth the same."""
    stores = stores_for(RowLayout(head_dim, 16, torch.float32), homes, batch, device)
    table = torch.randperm(PAGES * batch).view(batch, PAGES).int()
    keys = torch.randn(PAGES * batch, stores.pages.shape[2], PAGE_SIZE // LOGICAL, 2, head_dim)
    if ties:
        keys = keys.sign()
    return replace(stores, table=table.to(device), bounds=keys.sort(3, descending=True).values.to(device))


def tokens_at(positions: list[int], heads: int, kv_heads: int, head_dim: int, device: torch.device) -> NewTokens:
    projected = torch.zeros(len(positions), (heads + 2 * kv_heads) * head_dim, device=device)
    at = torch.tensor(positions, dtype=torch.int32, device=device)
    workspace, pdl = Workspace(device), device.type == "cuda"
    return NewTokens(projected, at, torch.empty(0), heads, kv_heads, 1.0, None, Fusion(None, 0), workspace, pdl)


def reference(stores: HeadStores, q: Tensor, positions: list[int], shared: bool, count: int) -> Tensor:
    """q [B, H, D] of the retrieval heads."""
    bounds = stores.bounds.cpu()
    statistics = PageStatistics(
        1, len(bounds), bounds.shape[1], q.shape[2], PAGE_SIZE, LOGICAL, torch.float32, torch.device("cpu")
    )
    statistics.bounds = bounds[None]
    lengths = torch.tensor(positions) + 1
    scores = physical_scores(statistics.upper_bounds(0, q, stores.table.cpu(), lengths), statistics.parts)
    if shared:
        scores = scores.unflatten(1, (bounds.shape[1], -1)).amax(2)
    return choose_pages(scores, lengths, PAGE_SIZE, count)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("homes, group, head_dim", [([-1, 0, 1, -2], 2, 16), ([0, 1], 3, 24)])
def test_lists_are_those_of_the_reference_where_they_are_due(
    shared: bool, homes: list[int], group: int, head_dim: int, device: torch.device
) -> None:
    torch.manual_seed(head_dim)
    positions, due, count, kv_heads = [639, 210, 96, 500], [1, 1, 1, 0], 6, len(homes)
    stores = problem(homes, head_dim, 4, device)
    q = torch.randn(4, kv_heads * group, head_dim)
    kept = torch.tensor([head for head in range(kv_heads * group) if homes[head // group] >= 0])
    own = len(kept) // (group if shared else 1)
    lists = torch.full((4, own, count + 1), -1, dtype=torch.int32, device=device)
    new = tokens_at(positions, kv_heads * group, kv_heads, head_dim, device)
    choose(new, q.to(device), stores, torch.tensor(due, dtype=torch.int32, device=device), lists, count)
    wanted, found = reference(stores, q[:, kept], positions, shared, count), lists.cpu()
    assert (found[3] == -1).all() and (found[:3, :, 0] == -1).all()
    assert torch.equal(found[:3, :, 1:].sort(-1).values, wanted[:3].sort(-1).values)
    assert torch.equal(found[:3, :, -1], wanted[:3, :, -1])  # the newest last


@pytest.mark.parametrize("count", [3, 17, 39])
def test_pages_of_equal_worth_are_listed_once_and_no_better_one_is_left_out(count: int, device: torch.device) -> None:
    torch.manual_seed(count)
    stores = problem([0], 16, 1, device, ties=True)
    q = torch.randn(1, 2, 16).sign()
    lists = torch.full((1, 2, count + 1), -1, dtype=torch.int32, device=device)
    new = tokens_at([PAGES * PAGE_SIZE - 1], 2, 1, 16, device)
    choose(new, q.to(device), stores, torch.ones(1, dtype=torch.int32, device=device), lists, count)
    found = lists.cpu()[0, :, 1:].long()
    bounds = stores.bounds.cpu()[stores.table.cpu()[0].long(), 0]  # [P, g, 2, D]
    high, low = q[0].clamp(min=0), q[0].clamp(max=0)
    worth = (bounds[:, :, 0] @ high.T + bounds[:, :, 1] @ low.T).amax(1).T  # [H, P]
    for head, of_head in enumerate(found):
        assert len(set(of_head.tolist())) == count
        best = worth[head, :-1].topk(count - 1).values
        assert torch.equal(worth[head, of_head[:-1]].sort(descending=True).values, best)
