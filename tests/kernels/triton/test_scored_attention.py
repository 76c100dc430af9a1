"""The kernels of eviction by scores against plain tensors: scores, the slot that goes, attention, logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewer.kernels.attention import attend
from fewer.kernels.new_tokens import Fusion, NewTokens, Workspace
from fewer.kernels.triton import scored_attention
from fewer.kernels.triton.attention_decode import Tiling
from fewer.kernels.triton.scored_attention import ScoredKeys, attend_scored, place_new
from fewer.model.rope import Rotary


def new_tokens(projected: Tensor, positions: Tensor, heads: int, kv_heads: int, softcap: float | None) -> NewTokens:
    batch, head_dim = projected.shape[0], projected.shape[2]
    device = projected.device
    table = torch.view_as_real(Rotary(head_dim, head_dim, 1e4, 64).table(64, torch.device("cpu"))).to(device)
    out = torch.empty(batch, heads * head_dim, device=device)
    return NewTokens(
        projected.flatten(1), positions, out, heads, kv_heads, 0.3, softcap, Fusion(table, head_dim),
        Workspace(device), device.type == "cuda",
    )  # fmt: skip


def keys_of(layers: int, batch: int, heads: int, kv_heads: int, capacity: int, rows: list[list[int]]) -> ScoredKeys:
    """Random state of a pass before: positions 0, 1, … lie in random slots of every head."""
    held = torch.rand(layers, batch, kv_heads, capacity).argsort(-1).int()
    logits = torch.randn(layers, batch, heads, capacity)
    told = torch.tensor(rows, dtype=torch.int32)
    taken = torch.zeros(layers, batch, kv_heads, dtype=torch.int32)
    scores = torch.rand(layers, batch, kv_heads, capacity)
    return ScoredKeys(scores, held, logits, torch.rand(layers, batch, heads) + 4, taken, told)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("block", [16, 1024])
def test_the_lowest_key_gives_its_slot(
    together: bool, block: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(block)
    monkeypatch.setattr(scored_attention, "RANKED", block)
    layers, heads, kv_heads, capacity, decay = 2, 6, 2, 37, 0.0 if together else 0.7
    # Rows: full, with a key to go; within its budget; behind a prompt, where nothing was scored yet.
    rows = [[37, 1, 1, 5], [20, 1, 0, 0], [21, 0, 0, 0]]
    before = keys_of(layers, 3, heads, kv_heads, capacity, rows)
    position = torch.tensor([37, 40, 50], dtype=torch.int32)
    ours = ScoredKeys(*(tensor.clone().to(device) for tensor in before))
    projected = torch.zeros(3, heads + 2 * kv_heads, 16, device=device)
    place_new(new_tokens(projected, position.to(device), heads, kv_heads, None), ours, decay, together)

    shares = (before.logits - before.lse[..., None]).exp().unflatten(2, (kv_heads, -1)).sum(3)
    scores, held = before.scores.clone(), before.held.clone()
    scores[:, 0] = decay * scores[:, 0] + shares[:, 0]
    scores[:, 1, :, :19] = decay * scores[:, 1, :, :19] + shares[:, 1, :, :19]
    ranking = scores[:, 0].mean(1, keepdim=True).expand(-1, kv_heads, -1) if together else scores[:, 0]
    taken = torch.tensor([0, 19, 20])[None, :, None].repeat(layers, 1, kv_heads)
    taken[:, 0] = ranking.masked_fill(37 - held[:, 0] <= 5, torch.inf).argmin(-1)
    if together:  # heads that hold other tokens protect others
        assert torch.equal(ranking[:, 0], ranking[:, 1])
    scores.scatter_(3, taken[..., None], 0.0)
    held.scatter_(3, taken[..., None], position[None, :, None, None].expand(layers, -1, kv_heads, 1).contiguous())
    assert torch.equal(ours.taken.cpu().long(), taken)
    assert torch.equal(ours.held.cpu(), held)
    torch.testing.assert_close(ours.scores.cpu(), scores, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "capacity", "softcap", "tiling"),
    [
        (6, 2, 16, 150, None, None),
        (4, 4, 24, 40, 2.0, None),
        (8, 1, 32, 200, None, Tiling(2, 8, 32, stages=3)),
        (2, 2, 16, 130, None, Tiling(1, 8, 64, warps=2, stages=1, heads=8)),
    ],
)
@pytest.mark.parametrize("scoring", [True, False])
def test_attention_leaves_its_logits(
    heads: int,
    kv_heads: int,
    head_dim: int,
    capacity: int,
    softcap: float | None,
    tiling: Tiling | None,
    scoring: bool,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if tiling is not None:
        monkeypatch.setattr(scored_attention, "tiling_for", lambda *_: tiling)
    torch.manual_seed(capacity)
    batch, stops = 2, [capacity, capacity // 2]
    before = keys_of(2, batch, heads, kv_heads, capacity, [[stop, 0, 0, 0] for stop in stops])
    before.taken[1] = torch.tensor([[3], [stops[1] - 1]])
    logits = torch.zeros(2, batch, heads, capacity if scoring else 0)
    ours = ScoredKeys(*(tensor.clone().to(device) for tensor in before._replace(logits=logits)))
    keys, values = torch.randn(2, batch, kv_heads, capacity, head_dim)
    projected, positions = torch.randn(batch, heads + 2 * kv_heads, head_dim), torch.tensor([9, 50], dtype=torch.int32)
    stored = keys.to(device), values.to(device)
    stored[0][0, :, 3] = torch.finfo(torch.float32).max / 1e4  # of the key that went: it is not looked at
    new = new_tokens(projected.to(device), positions.to(device), heads, kv_heads, softcap)
    for _ in range(2):  # tickets are as they were
        attend_scored(new, *stored, ours, 1)

    rotary = Rotary(head_dim, head_dim, 1e4, 64)
    q, k, v = projected[:, :, None].split((heads, kv_heads, kv_heads), 1)
    q, k = rotary.apply(q, positions[:, None].long()), rotary.apply(k, positions[:, None].long())
    for row, stop in enumerate(stops):
        slot = int(before.taken[1, row, 0])
        keys[row, :, slot], values[row, :, slot] = k[row, :, 0], v[row, :, 0]
        own = keys[row : row + 1, :, :stop], values[row : row + 1, :, :stop]
        out, lse = attend(q[row : row + 1], *own, 0.3, None, softcap or 0.0)
        torch.testing.assert_close(new.out[row].cpu(), out.flatten(), rtol=1e-4, atol=1e-5)
        if scoring:
            scores = q[row].unflatten(0, (kv_heads, -1))[:, :, 0] @ own[0][0].transpose(1, 2) * 0.3
            scores = torch.tanh(scores / softcap) * softcap if softcap else scores
            torch.testing.assert_close(ours.logits[1, row, :, :stop].cpu(), scores.flatten(0, 1), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(ours.lse[1, row].cpu(), lse[0, :, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stored[0].cpu(), keys, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stored[1].cpu(), values)
