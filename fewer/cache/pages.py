"""A pool of pages: keys and values in blocks of `page_size` tokens, which rows own and may own together.

Source: Efficient Memory Management for Large Language Model Serving with PagedAttention, arXiv 2309.06180 (pages, page
tables, copy-on-write); SGLang, arXiv 2312.07104 (prompts that begin alike are found by their tokens).

Slot s of a row lies in page `rows[row][s // page_size]`, at place s % page_size of it. Three rules keep sharing safe:

- Only a page with one owner is written. Before a step writes, a page with several is copied for the row that writes.
- A whole page of known tokens is published under (the page in front, its tokens), so equal keys mean equal prefixes. It
  is withdrawn when it is written again and when nobody owns it any more.
- A row writes to its end. So the page in front of a published one never changes while that one lives.

A contiguous cache [layers, 2, B, Hk, capacity, D] is the pool with one page a row: page_size = capacity, and row b owns
page b.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, count

import torch
from torch import Tensor

from fewer.errors import PoolExhausted
from fewer.kernels.from_host import from_host

Key = tuple[int, tuple[int, ...]]  # the page in front (NONE at the text's start), and the tokens of this page
NONE = -1


class PagePool:
    """Pages of one kind of layers, and the rows that own them."""

    def __init__(
        self,
        layers: int,
        batch: int,
        kv_heads: int,
        head_dim: int,
        page_size: int,
        pages: int,
        dtype: torch.dtype,
        device: torch.device,
        grows: bool = False,
    ):
        """`pages` to begin with; a pool that `grows` allocates more when they are used up."""
        self.page_size, self.grows = page_size, grows
        # [layers, 2 (keys, values), pages, Hk, page_size, D]
        self.storage = torch.zeros(layers, 2, pages, kv_heads, page_size, head_dim, dtype=dtype, device=device)
        self.table = torch.full((batch, 1), NONE, dtype=torch.int32, device=device)  # [B, P], NONE behind a row's end
        self.rows: list[list[int]] = [[] for _ in range(batch)]  # the table, on the host
        self.lengths = [0] * batch  # slots of each row that are written, or will be by the step under way
        self.owners = [0] * pages  # rows that own each page
        self.free = list(range(pages))[::-1]  # taken from the end
        self.published: dict[Key, int] = {}
        self.keys: dict[int, Key] = {}  # page -> what it is published under
        self._latest: list[int] = []  # pages that the last step published

    @property
    def pages(self) -> int:
        return len(self.owners)

    @property
    def owned(self) -> int:
        """Pages that some row owns."""
        return self.pages - len(self.free)

    @property
    def nbytes(self) -> int:
        return self.storage.nbytes + self.table.nbytes

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def admits(self, tokens: int) -> bool:
        """Whether a row of this many tokens that shares nothing would find its pages."""
        return self.grows or self.pages_for(tokens) <= len(self.free)

    def prepare(
        self,
        starts: Sequence[int],
        stops: Sequence[int],
        texts: Sequence[Sequence[int] | None] | None = None,
        rows: Sequence[int] | None = None,
    ) -> list[int]:
        """Make slots starts[b]..stops[b]-1 of each row writable, and stops[b] its length (never a smaller one). With
        `rows`, b counts those.

        Where `texts[b]`, all tokens of the row up to its stop, is given, pages that already hold the same text are
        shared and not to be written again. Returns the first slot that each row has to write. Raises PoolExhausted, and
        then nothing has changed.
        """
        claim = Claim(self)
        firsts = []
        for index, (start, stop) in enumerate(zip(starts, stops, strict=True)):
            text = texts[index] if texts is not None else None
            firsts.append(claim.row(index if rows is None else rows[index], start, stop, text))
        self._settle(claim)
        return firsts

    def cut(self, row: int, length: int) -> None:
        """Forget the slots of `row` from `length` on; pages that hold none of its slots lose it as an owner."""
        kept = self.pages_for(length)
        dropped = self.rows[row][kept:]
        self.lengths[row] = min(self.lengths[row], length)
        if dropped:
            del self.rows[row][kept:]
            for page in dropped:
                self._set_owners(page, self.owners[page] - 1)
            self._tabulate(row)

    def release(self, row: int) -> None:
        self.cut(row, 0)

    def abandon(self, lengths: Sequence[int], rows: Sequence[int] | None = None) -> None:
        """Take back the last `prepare`, whose slots were not (all) written: what it published is not to be trusted."""
        for page in self._latest:
            self._withdraw(page)
        self._latest = []
        for row, length in zip(range(len(lengths)) if rows is None else rows, lengths, strict=True):
            self.cut(row, length)

    def share(self, row: int, into: int, tokens: int) -> None:
        """Row `into` forgets its own and begins with the first `tokens` tokens of `row`; no key is copied."""
        if row == into or not 0 <= tokens <= self.lengths[row]:
            raise ValueError(f"row {into} cannot share {tokens} tokens of row {row}, which has {self.lengths[row]}")
        self.release(into)
        self.rows[into] = self.rows[row][: self.pages_for(tokens)]
        self.lengths[into] = tokens
        for page in self.rows[into]:
            self.owners[page] += 1
        self._tabulate(into)

    def fork(self, row: int, into: int) -> None:
        """Row `into` becomes a second `row`; whichever writes to a common page first gets its own copy."""
        self.share(row, into, self.lengths[row])

    def places(self, rows: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Where slots [N] of rows [N] lie: (page [N], place in the page [N]), int64."""
        return self.table[rows, slots // self.page_size].long(), slots % self.page_size

    def _settle(self, claim: Claim) -> None:
        short = claim.taken - len(self.free)
        if short > 0 and not self.grows:
            raise PoolExhausted(
                f"the cache's pool of {self.pages} pages ({self.page_size} tokens each) is used up: this step needs "
                f"{claim.taken} more and {len(self.free)} are free; use fewer sequences, a shorter context or a larger "
                "pool"
            )
        if short > 0:
            self._grow(max(short, self.pages // 4))
        if claim.taken:
            del self.free[-claim.taken :]
        for page in claim.rewritten:
            self._withdraw(page)
        for source, target, live in claim.copies:
            self.storage[:, :, target, :, :live] = self.storage[:, :, source, :, :live]
        for page, owners in claim.owners.items():
            self._set_owners(page, owners)
        entries = []  # of the table: row, place, page
        for row, (pages, length, first) in claim.rows.items():
            self.lengths[row] = length
            if pages != self.rows[row]:
                self.rows[row] = pages
                entries += [(row, place, pages[place]) for place in range(first, len(pages))]
        self._enter(entries)
        self._latest = list(claim.published.values())
        for key, page in claim.published.items():
            self.published[key], self.keys[page] = page, key

    def _grow(self, extra: int) -> None:
        """The new pages are numbered on and will be taken after those that are free, in ascending order."""
        self.free = [*reversed(range(self.pages, self.pages + extra)), *self.free]
        self.owners += [0] * extra
        with torch.inference_mode(False):  # what a pass allocates is written outside of passes, too
            self.storage = torch.nn.functional.pad(self.storage, (0, 0, 0, 0, 0, 0, 0, extra))

    def _set_owners(self, page: int, owners: int) -> None:
        self.owners[page] = owners
        if owners == 0:
            self._withdraw(page)
            self.free.append(page)

    def _withdraw(self, page: int) -> None:
        key = self.keys.pop(page, None)
        if key is not None:
            del self.published[key]

    def _widen(self, pages: int) -> None:
        missing = pages - self.table.shape[1]
        if missing > 0:
            missing = max(missing, self.table.shape[1])
            with torch.inference_mode(False):
                self.table = torch.nn.functional.pad(self.table, (0, missing), value=NONE)

    def _enter(self, entries: list[tuple[int, int, int]]) -> None:
        """Write (row, place, page) into the table: at once, because many rows come to a page's end together."""
        if not entries:
            return
        self._widen(1 + max(place for _, place, _ in entries))
        rows, places, pages = from_host(entries, torch.int64, self.table.device).t()
        self.table[rows, places] = pages.int()

    def _tabulate(self, row: int) -> None:
        pages = self.rows[row]
        self._widen(len(pages))
        self.table[row, : len(pages)] = from_host(pages, torch.int32, self.table.device)
        self.table[row, len(pages) :] = NONE


class Claim:
    """What one step takes from a pool, worked out for all rows before the pool is touched."""

    def __init__(self, pool: PagePool):
        self.pool = pool
        self.taken = 0  # pages
        self.rows: dict[
            int, tuple[list[int], int, int]
        ] = {}  # row -> its pages, length, and first page of another number
        self.owners: dict[int, int] = {}  # page -> owners afterwards, where they change
        self.copies: list[tuple[int, int, int]] = []  # from this page, to that one, this many slots
        self.rewritten: set[int] = set()  # pages that their only owner writes again
        self.published: dict[Key, int] = {}
        self.unwritten: dict[int, int] = {}  # published page -> the first slot of it that this step has yet to write
        # Beyond the free pages, the numbers that a growing pool would give.
        self._numbers: Iterator[int] = chain(reversed(pool.free), count(pool.pages))

    def row(self, row: int, start: int, stop: int, text: Sequence[int] | None) -> int:
        """Claim slots start..stop-1 of a row; returns the first that is to be written."""
        pool, size = self.pool, self.pool.page_size
        length, first, last = pool.lengths[row], start // size, pool.pages_for(stop)
        if not start <= length <= stop:
            raise ValueError(f"row {row} holds {length} slots: it cannot be written from {start} to {stop} only")
        if start == stop:
            return start
        pages = list(pool.rows[row])
        shared = first if text is None else self._match(pages, start, stop, text)
        for index in range(shared, last):
            if index == len(pages):
                pages.append(self._take())
            elif self._owners(pages[index]) > 1:
                source, pages[index] = pages[index], self._take()
                self._add_owner(source, -1)
                self.copies.append((source, pages[index], min(size, length - index * size)))
            else:
                self.rewritten.add(pages[index])
        self.rows[row] = pages, stop, first
        if text is not None:
            for index in range(shared, stop // size):
                self.published.setdefault(self._key(pages, index, text), pages[index])
                self.unwritten[pages[index]] = max(start, index * size)
        return max(start, shared * size)

    def _match(self, pages: list[int], start: int, stop: int, text: Sequence[int]) -> int:
        """Put published pages of the same text into `pages`, from slot `start` on; returns the first index without one.

        What the row holds already must be safe in the page even if this step fails: a page that another row writes in
        this step only serves where that row begins at `start` or behind it.
        """
        for index in range(start // self.pool.page_size, stop // self.pool.page_size):
            key = self._key(pages, index, text)
            page = self.published.get(key)
            if page is None:
                page = self.pool.published.get(key)
                if page is None or page in self.rewritten:
                    return index
            elif self.unwritten[page] < start:
                return index
            self._add_owner(page, 1)
            if index < len(pages):  # the row's own page held the first tokens of it
                self._add_owner(pages[index], -1)
                pages[index] = page
            else:
                pages.append(page)
        return stop // self.pool.page_size

    def _key(self, pages: list[int], index: int, text: Sequence[int]) -> Key:
        size = self.pool.page_size
        return pages[index - 1] if index else NONE, tuple(text[index * size : (index + 1) * size])

    def _take(self) -> int:
        self.taken += 1
        page = next(self._numbers)
        self._add_owner(page, 1)
        return page

    def _owners(self, page: int) -> int:
        return self.owners.get(page, self.pool.owners[page] if page < self.pool.pages else 0)

    def _add_owner(self, page: int, change: int) -> None:
        self.owners[page] = self._owners(page) + change
