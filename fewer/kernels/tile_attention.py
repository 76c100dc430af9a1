"""Prefill attention over part of the keys: sinks and a window per head, or listed key tiles for each tile of queries.

Softmax runs over what is kept, run by run, and T × S is never made. What is not kept is not read; CUDA tensors go to
`fewer.kernels.triton.tile_attention`.

- `Lambda`: exact to the token, different for every head (DuoAttention, arXiv 2410.10819; a retrieval head has a window
  that holds everything).
- `TileLists`: static or dynamic block sparsity (LServe, arXiv 2502.14866, section 3.2).

`column_sums` gives what each key received from weighted queries, α^(n-q) for A2SF (arXiv 2407.20485, equation 5) and 1
for H2O, in a second pass over the same tiles, with the log-sum-exp of the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fewer.kernels.attention import attend, merge

EVERYTHING = 2**30  # a window that holds every key
LONGEST_RUN = 4096  # keys whose scores exist at once
Rule = tuple[int, ...]
Run = tuple[int, int]  # first key, and the one behind the last


@dataclass(frozen=True)
class Lambda:
    """Query i of head h sees key j where j <= i and (j < sinks[h] or i - j < windows[h]). Both [H] int32."""

    sinks: Tensor
    windows: Tensor
    query_tile: ClassVar[int] = 128

    def rules(self, batch: int) -> list[list[Rule]]:
        return [list(zip(self.sinks.tolist(), self.windows.tolist(), strict=True))] * batch

    def kept(self, rule: Rule, tile: int, first: int, stop: int) -> list[Run]:
        """Runs of keys before `stop` for a tile of queries that begins at position `first`."""
        sinks, window = rule
        low = max(0, first - window + 1)
        return [(0, min(sinks, low)), (low, stop)]

    def sees(self, rule: Rule, i: Tensor, j: Tensor) -> Tensor:
        sinks, window = rule
        return (j < sinks) | (i - j < window)


@dataclass(frozen=True)
class TileLists:
    """Head h of row b keeps, for its tile t of queries, the key tiles lists[kinds[b, h], t, :counts[kinds[b, h], t]].

    Tiles are numbered from the first query of this call and from key 0, and none is listed twice. Their sizes are
    powers of two, 16 or more. Negative entries are ignored.
    """

    lists: Tensor  # [kinds, query tiles, n] int32
    counts: Tensor  # [kinds, query tiles] int32
    kinds: Tensor  # [B, H] int32
    query_tile: int = 64
    key_tile: int = 64

    def rules(self, batch: int) -> list[list[Rule]]:
        return [[(kind,) for kind in row] for row in self.kinds.tolist()]

    def kept(self, rule: Rule, tile: int, first: int, stop: int) -> list[Run]:
        (kind,) = rule
        runs: list[Run] = []
        for entry in sorted(self.lists[kind, tile, : int(self.counts[kind, tile])].tolist()):
            low, high = entry * self.key_tile, (entry + 1) * self.key_tile
            if entry < 0 or low >= stop:
                continue
            if runs and runs[-1][1] == low:
                low = runs.pop()[0]
            runs.append((low, min(high, stop)))
        return runs

    def sees(self, rule: Rule, i: Tensor, j: Tensor) -> Tensor:
        return torch.ones(len(i), len(j), dtype=torch.bool)

    def transposed(self, key_tiles: int) -> TileLists:
        """For each tile of keys, the tiles of queries that keep it: lists [kinds, key tiles, query tiles]."""
        kinds, query_tiles, longest = self.lists.shape
        live = (torch.arange(longest, device=self.lists.device) < self.counts[..., None]) & (self.lists >= 0)
        kept = torch.zeros(kinds, query_tiles, key_tiles + 1, dtype=torch.bool, device=self.lists.device)
        kept.scatter_(2, torch.where(live, self.lists, key_tiles).long(), True)  # the last column takes what is ignored
        kept = kept[..., :key_tiles].transpose(1, 2)
        order = kept.to(torch.uint8).argsort(dim=-1, descending=True, stable=True).int()
        return TileLists(order, kept.sum(-1, dtype=torch.int32), self.kinds, self.key_tile, self.query_tile)


Tiles = Lambda | TileLists


def attend_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: int | Tensor,
    tiles: Tiles,
    scale: float,
    softcap: float | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """q [B, H, T, D], k and v [B, Hk, S, D] -> (output [B, H, T, D] in q's dtype, log-sum-exp [B, H, T] float32).

    Query t stands at position start + t (start [B] int32 where rows differ), key s at position s; `causal` hides the
    keys behind a query, and a `Lambda` always does. A query that sees nothing gives zeros and -inf.
    """
    _check(tiles, q.shape[2], causal)
    if q.is_cuda:
        from fewer.kernels.triton import tile_attention as fused

        return fused.attend_tiles(q, k, v, start, tiles, scale, softcap, causal)
    out, lse = torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf)
    for rows, heads, key_heads, queries, runs in _pieces(q, k, start, tiles, causal):
        query = q[rows, heads, queries].float()  # float32 parts, rounded once
        parts = [
            attend(query, k[rows, key_heads, keys], v[rows, key_heads, keys], scale, seen, softcap or 0.0)
            for keys, seen in runs
        ]
        if parts:
            out[rows, heads, queries], lse[rows, heads, queries] = merge(parts)
    return out, lse


def column_sums(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    weights: Tensor,
    start: int | Tensor,
    tiles: Tiles,
    scale: float,
    softcap: float | None = None,
    causal: bool = True,
) -> Tensor:
    """Σ_t weights[t]·softmax(q_t·k)[s] -> [B, H, S] float32; weights [T] or [B, T] float32.

    `lse` is what `attend_tiles` gave for the same arguments. Where early queries weigh nothing (α <= 0.3: all but the
    last 32), slice q, lse and weights, and move `start`.
    """
    _check(tiles, q.shape[2], causal)
    if q.is_cuda:
        from fewer.kernels.triton import tile_attention as fused

        return fused.column_sums(q, k, lse, weights, start, tiles, scale, softcap, causal)
    sums = torch.zeros(*q.shape[:2], k.shape[2])
    weights = weights.expand(len(q), -1)
    for rows, heads, key_heads, queries, runs in _pieces(q, k, start, tiles, causal):
        query, weight = q[rows, heads, queries].float(), weights[rows, None, queries, None]
        total = lse[rows, heads, queries].nan_to_num(neginf=0.0)[..., None]
        for keys, seen in runs:
            key = k[rows, key_heads, keys].float()
            scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(2, 3) * scale
            if softcap:
                scores = torch.tanh(scores / softcap) * softcap
            shares = (scores.masked_fill(~seen, -torch.inf) - total).exp()  # [B, H, T, S]
            sums[rows, heads, keys] += (weight * shares).sum(2)
    return sums


def _check(tiles: Tiles, queries: int, causal: bool) -> None:
    if isinstance(tiles, Lambda):
        if not causal:
            raise ValueError("sinks and a window are a causal rule: pass causal=True, or TileLists")
    elif tiles.lists.shape[1] != -(-queries // tiles.query_tile):
        raise ValueError(f"{tiles.lists.shape[1]} lists for {queries} queries in tiles of {tiles.query_tile}")


class _Piece(NamedTuple):
    """A tile of queries of heads with one rule, and the runs of keys that it keeps with what is seen of them."""

    rows: slice
    heads: slice
    key_heads: slice
    queries: slice
    runs: list[tuple[slice, Tensor]]  # keys, seen [1, 1, T, S] bool


def _pieces(q: Tensor, k: Tensor, start: int | Tensor, tiles: Tiles, causal: bool) -> Iterator[_Piece]:
    batch, heads, count = q.shape[:3]
    starts = start.tolist() if isinstance(start, Tensor) else [start] * batch
    rules = tiles.rules(batch)
    for (begin, of_heads), members in groupby(range(batch), lambda row: (starts[row], rules[row])):
        rows = _span(list(members))
        for head_span, key_heads in _head_spans(of_heads, heads // k.shape[1]):
            rule = of_heads[head_span.start]
            for tile, at in enumerate(range(0, count, tiles.query_tile)):
                queries = slice(at, min(count, at + tiles.query_tile))
                i = begin + torch.arange(queries.start, queries.stop)[:, None]
                stop = min(k.shape[2], int(i[-1]) + 1) if causal else k.shape[2]
                runs = []
                for low, high in tiles.kept(rule, tile, begin + at, stop):
                    for first in range(low, high, LONGEST_RUN):
                        j = torch.arange(first, min(high, first + LONGEST_RUN))
                        seen = tiles.sees(rule, i, j)
                        seen = seen & (j <= i) if causal else seen
                        runs.append((slice(first, first + len(j)), seen[None, None]))
                yield _Piece(rows, head_span, key_heads, queries, runs)


def _head_spans(rules: list[Rule], group: int) -> Iterator[tuple[slice, slice]]:
    """Query heads that follow one rule with their key heads: whole groups together, or heads within one group."""
    uniform = [len(set(rules[first : first + group])) == 1 for first in range(0, len(rules), group)]

    def together(head: int) -> tuple[Rule, int]:
        key_head = head // group
        return rules[head], -1 if uniform[key_head] else key_head

    for _, members in groupby(range(len(rules)), together):
        heads = _span(list(members))
        yield heads, slice(heads.start // group, (heads.stop - 1) // group + 1)


def _span(members: list[int]) -> slice:
    return slice(members[0], members[-1] + 1)
