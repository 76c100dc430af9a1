"""One level of a tree of shared prefixes: its keys and values, each prefix once, and which rows of a batch read which.

Paper: Hydragen, arXiv 2402.05099, sections 3.1 to 3.3: all rows of a group are the rows of one matrix product, and the
result is a part of the attention that is merged with the others by its log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewer.kernels.attention_part import attention_part
from fewer.kernels.shared_prefix import attend_prefix


@dataclass
class LevelKeys:
    """Keys and values of one kind of layers. Prefixes of unequal lengths lie behind one another without padding: a
    prefix's page then begins at any token, and reaches over the next ones."""

    pool: Tensor  # [layers, 2, pages, Hk, page_size, D]
    pages: Tensor  # [prefixes, 1] int32: the page in which each prefix lies
    lengths: list[int]  # tokens held of each prefix
    firsts: list[int]  # position of the first of them: a kind with a window may hold a prefix's end only
    window: int | None
    lengths_there: Tensor  # [prefixes] int32, the lengths on the device

    @classmethod
    def take(cls, pool: Tensor, rows: list[int], lengths: list[int], stops: list[int], window: int | None) -> LevelKeys:
        """The first lengths[i] slots of rows[i] of a pool [layers, 2, B, Hk, capacity, D], which end at position
        stops[i]. The pool itself where it holds nothing else, else a copy without gaps."""
        layers, _, batch, kv_heads, capacity, head_dim = pool.shape
        firsts = [stop - length for stop, length in zip(stops, lengths, strict=True)]
        there = torch.tensor(lengths, dtype=torch.int32, device=pool.device)
        if rows == list(range(batch)) and all(length == capacity for length in lengths):
            pages = torch.arange(batch, dtype=torch.int32, device=pool.device)
            return cls(pool, pages[:, None], lengths, firsts, window, there)
        total, longest = sum(lengths), max(lengths)
        flat = pool.new_zeros(layers, 2, kv_heads, total, head_dim)
        starts, used = [0] * len(rows), 0
        for index in sorted(range(len(rows)), key=lambda index: lengths[index]):  # the longest ends where the pool does
            starts[index], length = used, lengths[index]
            flat[:, :, :, used : used + length] = pool[:, :, rows[index], :, :length]
            used += length
        layer, side, head, token, channel = flat.stride()
        shape = layers, 2, total - longest + 1, kv_heads, longest, head_dim
        overlapping = flat.as_strided(shape, (layer, side, token, head, token, channel))
        pages = torch.tensor(starts, dtype=torch.int32, device=pool.device)
        return cls(overlapping, pages[:, None], lengths, firsts, window, there)

    @property
    def nbytes(self) -> int:
        return self.pool.untyped_storage().nbytes()

    def span(self, prefix: int, start: int, stop: int) -> Tensor:
        """Keys and values of positions start..stop-1 of a prefix: [layers, 2, Hk, stop - start, D]."""
        first = self.firsts[prefix]
        return self.pool[:, :, int(self.pages[prefix]), :, start - first : stop - first]


@dataclass
class Reading:
    """Which queries of a step read a level: N of B·T, those of one prefix adjacent."""

    queries: Tensor | None  # [N] places among the B·T, None: all, in their order
    count: int  # N
    pointers: list[int]  # queries pointers[i]..pointers[i + 1]-1 read prefix i
    pointers_there: Tensor  # [prefixes + 1] int32, the same on the device


@dataclass
class Sight:
    """What the queries of one prefix see of it through a window."""

    prefix: int
    queries: slice  # of the N
    first: int  # of the prefix's tokens, the first that some query sees
    mask: Tensor | None  # [1, 1, n, length - first] bool; None: each query sees all from there on


class PrefixLevel:
    """Prefixes starts[i]..stops[i]-1 of a text's positions, and the rows of one batch that read them."""

    def __init__(self, keys: Sequence[LevelKeys], starts: list[int], stops: list[int], members: list[list[int]]):
        self.keys, self.starts, self.stops, self.members = keys, starts, stops, members
        self._known: dict[tuple[tuple[int, ...], int], Reading] = {}
        self._one_each: Reading | None = None

    @property
    def nbytes(self) -> int:
        return sum(kind.nbytes for kind in self.keys)

    def prefix_of(self, row: int) -> int | None:
        return next((prefix for prefix, rows in enumerate(self.members) if row in rows), None)

    def leave(self, row: int) -> None:
        for rows in self.members:
            if row in rows:
                rows.remove(row)
        self._known, self._one_each = {}, None

    def reading(self, new: Sequence[int], width: int) -> Reading:
        """The queries of a step that brings new[b] tokens of row b, padded to `width`. Rows without new tokens, such as
        finished ones, take no part."""
        key = tuple(new), width
        if key not in self._known:
            queries: list[int] = []
            pointers = [0]
            for rows in self.members:
                for row in rows:
                    queries += range(row * width, row * width + new[row])
                pointers.append(len(queries))
            device = self.keys[0].pool.device
            everything = queries == list(range(len(new) * width))
            index = None if everything else torch.tensor(queries, dtype=torch.int64, device=device)
            there = torch.tensor(pointers, dtype=torch.int32, device=device)
            self._known = {key: Reading(index, len(queries), pointers, there)}  # the next step is likely to be alike
        return self._known[key]

    def one_each(self, batch: int) -> Reading:
        """The queries of a step with one token in every row: the same object until a row leaves."""
        if self._one_each is None:
            with torch.inference_mode(False):
                self._one_each = self.reading([1] * batch, 1)
        return self._one_each

    def sights(self, kind: int, reading: Reading, positions: Tensor) -> list[Sight] | None:
        """What the queries at positions [B, T] see through the kind's window. None: everything."""
        keys = self.keys[kind]
        if keys.window is None:
            return None
        at = positions.flatten() if reading.queries is None else positions.flatten()[reading.queries]
        sights = []
        whole = True
        for prefix, (begin, end) in enumerate(zip(reading.pointers, reading.pointers[1:], strict=False)):
            if begin == end:
                continue
            hidden = (at[begin:end] - keys.window + 1 - keys.firsts[prefix]).clamp(min=0)
            least, most, length = int(hidden.min()), int(hidden.max()), keys.lengths[prefix]
            whole = whole and most == 0
            if least >= length:
                continue
            tokens = torch.arange(least, length, device=at.device)
            mask = None if least == most else (tokens >= hidden[:, None])[None, None]
            sights.append(Sight(prefix, slice(begin, end), least, mask))
        return None if whole else sights

    def attend(
        self,
        q: Tensor,
        kind: int,
        member: int,
        reading: Reading,
        sights: list[Sight] | None,
        scale: float,
        softcap: float,
    ) -> tuple[Tensor, Tensor] | None:
        """q [B, H, T, D], of the kind's layer `member` -> (output [B, H, T, D], log-sum-exp [B, H, T]), both float32;
        zeros and -inf for queries that see no prefix. None where none does."""
        if not reading.count or sights == []:
            return None
        keys = self.keys[kind]
        k, v = keys.pool[member]  # [pages, Hk, page_size, D]
        batch, heads, width, head_dim = q.shape
        queries = q.transpose(1, 2).reshape(batch * width, heads, head_dim)
        if reading.queries is not None:
            queries = queries[reading.queries]
        if sights is None:
            pointers = reading.pointers_there
            out, lse = attend_prefix(queries, k, v, keys.pages, keys.lengths_there, pointers, scale, softcap)
        else:
            out = torch.zeros(queries.shape, device=q.device)
            lse = torch.full(queries.shape[:2], -torch.inf, device=q.device)
            for sight in sights:
                page, seen = int(keys.pages[sight.prefix]), slice(sight.first, keys.lengths[sight.prefix])
                rows = queries[sight.queries].transpose(0, 1)[None]  # [1, H, n, D]
                part, total = attention_part(
                    rows, k[page, None, :, seen], v[page, None, :, seen], scale, sight.mask, softcap=softcap
                )
                out[sight.queries], lse[sight.queries] = part[0].transpose(0, 1).float(), total[0].t()
        if reading.queries is not None:
            whole = torch.zeros(batch * width, heads, head_dim, device=q.device)
            total = torch.full((batch * width, heads), -torch.inf, device=q.device)
            out, lse = whole.index_copy_(0, reading.queries, out), total.index_copy_(0, reading.queries, lse)
        return out.view(batch, width, heads, head_dim).transpose(1, 2), lse.view(batch, width, heads).transpose(1, 2)
