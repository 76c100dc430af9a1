"""Problems of attention over part of the keys, and their answers in float64, one query head at a time.

What must not be seen holds NaN, so an answer that is finite has not used it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewer.kernels.list_attention import Unit
from fewer.kernels.tile_attention import Lambda, TileLists, Tiles


def softmax_attention(
    q: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """q [.., D], keys and values [.., S, D], seen [.., S] -> output, log-sum-exp and scores, in float64."""
    hidden = ~seen[..., None]
    scores = (keys.double().masked_fill(hidden, 0) @ q.double()[..., None])[..., 0] * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    return (weights[..., None, :] @ values.double().masked_fill(hidden, 0))[..., 0, :], scores.logsumexp(-1), scores


@dataclass(frozen=True)
class ListProblem:
    q: Tensor  # [B, H, D]
    keys: Tensor  # [pages, Hk, page_size, D], a view of a pool
    values: Tensor
    table: Tensor
    lists: Tensor | None
    counts: Tensor | None
    unit: Unit
    lengths: Tensor

    def arguments(self, device: torch.device | str = "cpu") -> tuple[Any, ...]:
        return tuple(x.to(device) if isinstance(x, Tensor) else x for x in vars(self).values())

    def positions(self, row: int, head: int) -> Tensor:
        """What a query head is asked to see, in its list's order; -1 where nothing is."""
        page_size = self.keys.shape[2]
        if self.lists is None:
            entry = torch.arange(self.table.shape[1] * page_size)
        else:
            list_head = head * self.lists.shape[1] // self.q.shape[1]
            entry = self.lists[row, list_head].long()
            if self.counts is not None:
                entry = entry.where(torch.arange(len(entry)) < self.counts[row, list_head], -1)
            if self.unit == "page":
                inside = torch.arange(page_size)
                entry = torch.where(entry[:, None] < 0, -1, entry[:, None] * page_size + inside).flatten()
        return entry.where(entry < self.lengths[row], -1)

    def answer(self, scale: float, softcap: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
        batch, heads, head_dim = self.q.shape
        found = []
        for row in range(batch):
            for head in range(heads):
                key_head = head * self.keys.shape[1] // heads
                k, v = (part[self.table[row], key_head].reshape(-1, head_dim) for part in (self.keys, self.values))
                at = self.positions(row, head)
                found.append(softmax_attention(self.q[row, head], k[at], v[at], at >= 0, scale, softcap))
        out, lse, scores = (torch.stack(parts) for parts in zip(*found, strict=True))
        return out.view(batch, heads, -1), lse.view(batch, heads), scores.view(batch, heads, -1)

    def poisoned(self) -> ListProblem:
        """NaN in every slot of the storage that no list names."""
        keys, values = torch.full_like(self.keys, torch.nan), torch.full_like(self.values, torch.nan)
        page_size = self.keys.shape[2]
        for row in range(len(self.q)):
            for head in range(self.q.shape[1]):
                at = self.positions(row, head)
                at = at[at >= 0]
                place = self.table[row, at // page_size].long(), head * keys.shape[1] // self.q.shape[1], at % page_size
                keys[place], values[place] = self.keys[place], self.values[place]
        return replace(self, keys=keys, values=values)


def list_problem(
    lengths: list[int], listed: str, unit: Unit = "page", group: int = 2, head_dim: int = 32, page_size: int = 16,
    pages: int = 5, poison: bool = True,
) -> ListProblem:  # fmt: skip
    """Two key heads. `listed`: "all", or a list for each "key head" or "query head", of random entries and lengths
    (of the first head 0), with -1 behind and one among them."""
    torch.manual_seed(0)
    batch, heads = len(lengths), 2 * group
    pool = torch.randn(2, batch * pages + 1, 2, page_size, head_dim)
    table = torch.randperm(batch * pages + 1)[: batch * pages].view(batch, pages).int()
    lists = counts = None
    if listed != "all":
        list_heads, most = (2 if listed == "key head" else heads), pages * (1 if unit == "page" else page_size)
        lists = torch.rand(batch, list_heads, most).argsort(-1).int()[..., : most - 1]
        counts = torch.randint(1, most, (batch, list_heads)).int()
        counts[0, 0], lists[-1, -1, 0] = 0, -1
        lists = lists.where(torch.arange(most - 1) < counts[..., None], -1)
    at = torch.tensor(lengths, dtype=torch.int32)
    q = torch.randn(batch, heads, head_dim)
    case = ListProblem(q, pool[0], pool[1], table, lists, counts, unit, at)
    return case.poisoned() if poison else case


@dataclass(frozen=True)
class TileProblem:
    q: Tensor  # [B, H, T, D]
    k: Tensor  # [B, Hk, S, D]
    v: Tensor
    start: int | Tensor
    tiles: Tiles
    causal: bool
    weights: Tensor  # [T]

    def seen(self) -> Tensor:
        """[B, H, T, S] bool."""
        batch, heads, queries, _ = self.q.shape
        start = torch.as_tensor(self.start).expand(batch)
        i = (start[:, None] + torch.arange(queries))[:, None, :, None]
        j = torch.arange(self.k.shape[2])
        if isinstance(self.tiles, Lambda):
            sinks, windows = self.tiles.sinks[:, None, None], self.tiles.windows[:, None, None]
            kept = (j < sinks) | (i - j < windows)
        else:
            kept = torch.zeros(batch, heads, queries, len(j), dtype=torch.bool)
            for row in range(batch):
                for head in range(heads):
                    kind = int(self.tiles.kinds[row, head])
                    for t in range(queries):
                        tile = t // self.tiles.query_tile
                        listed = self.tiles.lists[kind, tile, : self.tiles.counts[kind, tile]]
                        kept[row, head, t] = torch.isin(j // self.tiles.key_tile, listed)
        return (kept & (j <= i)) if self.causal else kept.expand(batch, heads, queries, len(j))

    def answer(self, scale: float, softcap: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Output [B, H, T, D], log-sum-exp [B, H, T] and column sums [B, H, S] in float64."""
        group = self.q.shape[1] // self.k.shape[1]
        k, v = (x.double().repeat_interleave(group, 1) for x in (self.k, self.v))
        scores = self.q.double() @ k.transpose(2, 3) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~self.seen(), -torch.inf)
        shares = scores.softmax(-1).nan_to_num(0.0)
        return shares @ v, scores.logsumexp(-1), (shares * self.weights[:, None]).sum(2)

    def to(self, device: torch.device) -> TileProblem:
        def moved(x: Any) -> Any:
            return x.to(device) if isinstance(x, Tensor) else x

        tiles = type(self.tiles)(*(moved(x) for x in vars(self.tiles).values()))
        return TileProblem(*(tiles if x is self.tiles else moved(x) for x in vars(self).values()))


def tile_problem(
    tiles: Tiles, queries: int, keys: int, start: int | Tensor, group: int = 2, head_dim: int = 32,
    causal: bool = True, batch: int = 2,
) -> TileProblem:  # fmt: skip
    torch.manual_seed(0)
    q = torch.randn(batch, queries, 2 * group, head_dim).transpose(1, 2)  # as projections lie in memory
    k, v = torch.randn(2, batch, 2, keys, head_dim).unbind(0)
    return TileProblem(q, k, v, start, tiles, causal, torch.rand(queries))


def random_tile_lists(queries: int, keys: int, batch: int, heads: int, query_tile: int, key_tile: int) -> TileLists:
    """Three kinds; one list is empty, one holds a -1."""
    torch.manual_seed(1)
    query_tiles, key_tiles = -(-queries // query_tile), -(-keys // key_tile)
    lists = torch.rand(3, query_tiles, key_tiles).argsort(-1).int()
    counts = torch.randint(1, key_tiles + 1, (3, query_tiles)).int()
    counts[0, 0], lists[1, -1, 0] = 0, -1
    return TileLists(lists, counts, torch.randint(0, 3, (batch, heads)).int(), query_tile, key_tile)


@dataclass(frozen=True)
class PrefixProblem:
    q: Tensor  # [B, H, D]
    keys: Tensor
    values: Tensor
    table: Tensor
    lengths: Tensor  # of the prefixes
    pointers: Tensor

    def arguments(self, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
        return tuple(x.to(device) for x in vars(self).values())

    def answer(self, scale: float, softcap: float | None = None) -> tuple[Tensor, Tensor]:
        """As if every row had its own copy of the prefix."""
        sizes = self.pointers.diff()
        table, lengths = (x.repeat_interleave(sizes, 0) for x in (self.table, self.lengths))
        alone = ListProblem(self.q, self.keys, self.values, table, None, None, "page", lengths)
        return alone.answer(scale, softcap)[:2]


def prefix_problem(
    sizes: list[int], lengths: list[int], group: int = 2, head_dim: int = 32, page_size: int = 16, pages: int = 5
) -> PrefixProblem:
    """One prefix for each group of `sizes` rows."""
    of_prefix = list_problem(lengths, "all", group=group, head_dim=head_dim, page_size=page_size, pages=pages)
    q = torch.randn(sum(sizes), 2 * group, head_dim)
    pointers = torch.tensor([0, *sizes]).cumsum(0).int()
    return PrefixProblem(q, of_prefix.keys, of_prefix.values, of_prefix.table, of_prefix.lengths, pointers)


def assert_equal(found: tuple[Tensor | None, ...], wanted: tuple[Tensor, ...], tolerance: float = 2e-5) -> None:
    for one, other in zip(found, wanted, strict=False):
        assert one is not None
        torch.testing.assert_close(one.double().cpu(), other, rtol=tolerance, atol=tolerance)
