"""The k largest scores by radix selection, in Triton, against PyTorch's `topk`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewer.kernels.new_tokens import Workspace
from fewer.kernels.triton.top_k import top_k

INFINITY = float("inf")
SCORES = {
    "spread": lambda *shape: 3.0 * torch.randn(shape),
    "shifted, all positive": lambda *shape: 50 + torch.rand(shape),
    "all equal": lambda *shape: torch.full(shape, -1.5),
    "few values": lambda *shape: torch.randint(-2, 3, shape) * 0.5,
    "zeros of both signs": lambda *shape: torch.randn(shape) * 0.0,
    "mostly minus infinity": lambda *shape: torch.where(torch.rand(shape) < 0.1, torch.randn(shape), -INFINITY),
    "infinities": lambda *shape: torch.where(torch.rand(shape) < 0.5, torch.randn(shape), torch.randn(shape) / 0.0),
    "tiny and huge": lambda *shape: torch.randn(shape) * 10.0 ** torch.randint(-40, 38, shape),
    "differing in the last bits": lambda *shape: (torch.randint(0, 300, shape, dtype=torch.int32) + (1 << 30)).view(
        torch.float32
    ),
}


def chosen(scores: Tensor, k: int, newest: list[int], device: torch.device, lists: int = 0, block: int = 64) -> Tensor:
    batch, heads, _ = scores.shape
    indices = torch.full((batch, lists or heads, k), -7, dtype=torch.int32, device=device)
    pinned = torch.tensor(newest, dtype=torch.int32, device=device)
    workspace = Workspace(device)
    for _ in range(2):  # the second finds the workspace as the first has left it
        top_k(scores.to(device), k, pinned, lists or heads, indices, workspace, block=block)
    return indices.cpu().long()


def check(scores: Tensor, k: int, newest: list[int], device: torch.device, lists: int = 0, block: int = 64) -> None:
    """Distinct indices, the newest among them, and beside it the values that `topk` finds."""
    found = chosen(scores, k, newest, device, lists, block)
    worth = scores if not lists else scores.unflatten(1, (lists, -1)).amax(2)
    own = torch.tensor(newest)[:, None, None].expand(-1, worth.shape[1], 1)
    assert (found == own).any(-1).all()
    assert all(len(set(of_list.tolist())) == k for of_list in found.flatten(0, 1))
    wanted = worth.scatter(2, own, INFINITY).topk(k).values
    assert torch.equal(worth.scatter(2, own, INFINITY).gather(2, found).sort(-1, descending=True).values, wanted)


@pytest.mark.parametrize("kind", list(SCORES))
@pytest.mark.parametrize("k", [1, 40, 200])
def test_the_values_are_those_of_topk(kind: str, k: int, device: torch.device) -> None:
    torch.manual_seed(0)
    check(SCORES[kind](2, 1, 200), k, [199, 5], device)


def test_a_list_for_several_heads_ranks_by_the_best_of_them(device: torch.device) -> None:
    torch.manual_seed(1)
    check(torch.randn(2, 6, 200), 17, [100, 199], device, lists=2)


@pytest.mark.parametrize("size", [1, 64, 65, 64 * 64 + 1])  # of a block, and of all that one block a program covers
def test_sizes_around_those_of_blocks(size: int, device: torch.device) -> None:
    torch.manual_seed(2)
    check(torch.randn(1, 1, size), max(1, size // 8), [0], device)


def test_equal_scores_are_taken_in_their_order(device: torch.device) -> None:
    assert chosen(torch.zeros(1, 1, 200), 5, [150], device)[0, 0].sort().values.tolist() == [0, 1, 2, 3, 150]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", list(SCORES))
@pytest.mark.parametrize("size", [262144, 262144 + 333, 1 << 19])
def test_long_rows(kind: str, size: int) -> None:
    torch.manual_seed(3)
    check(SCORES[kind](1, 8, size), 4096, [size - 1], torch.device("cuda"), block=4096)
