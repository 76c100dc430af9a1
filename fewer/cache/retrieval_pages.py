"""Pages of the heads that keep the whole text: all are read while it is short, the best ones once it is long.

Source: LServe, arXiv 2502.14866, sections 3.5.1 (a constant number of pages a query), 3.5.2 (small logical pages are
scored, large physical ones are read) and 3.5.3 (a choice serves several steps); Quest, arXiv 2406.10774 (the score).

Where a choice of physical pages is due, with t tokens before the new one and P = t // page_size + 1 pages:

    s_j = Σ_c max(q_c·largest_jc, q_c·smallest_jc)      for each logical page j          (fewer.cache.page_statistics)
    S_p = max s_j over the logical pages of physical page p
    pages = the K - 1 best of S_0 … S_{P-2}, and page P - 1,      K = min(max(3, budget // page_size), P)

It is due when t is a multiple of `interval`, which divides `page_size`: so a new page never waits for one. Each row
goes by its own t, so a batch chooses what its rows would choose alone. Every query head has its own list, as in the
paper's code; with `shared`, the query heads of a group score together (the largest S_p) and read one list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewer.cache.page_statistics import Arrivals, PageStatistics, choose_pages, physical_scores
from fewer.cache.pages import PagePool
from fewer.cache.quantised_pages import RowLayout, attend_listed_pages, attend_whole_rows
from fewer.kernels.causal import needs_no_mask

FEWEST = 3  # pages that are read at least


@dataclass(frozen=True)
class PageChoice:
    """How pages are cut and chosen; sizes and the budget in tokens."""

    page_size: int
    logical_size: int
    budget: int
    interval: int
    shared: bool

    @property
    def pages(self) -> int:
        """Most pages on a list."""
        return max(FEWEST, self.budget // self.page_size)


@dataclass(slots=True)
class PagesPlan:
    """What all layers do in one step. N tokens are written."""

    lengths: Tensor  # [B] int64: tokens of each row, the new ones included
    longest: int  # the largest of them
    rows: Tensor  # [N] row of the batch
    columns: Tensor  # [N] place among the step's tokens
    pages: Tensor  # [N] page that takes it
    offsets: Tensor  # [N] place in that page
    arrivals: Arrivals  # the same, for the statistics
    listed: bool  # one generated token a row, and some row exceeds the budget
    mask: Tensor | None  # [B, 1, T, S] bool, not `listed`: what each token sees of its row; None: all of it …
    causal: bool  # … or, where all rows begin the step at one slot, the triangle
    short: Tensor | None  # [B] bool, `listed`: rows within the budget; None: no such row
    due: Tensor | None  # [R] rows that choose pages in this step
    has_list: list[bool]  # what holds of each row's lists once the step is committed


class RetrievalPages:
    """Keys and values of the retrieval heads of all layers, side by side in one pool; layer l has heads[l] of them."""

    def __init__(
        self,
        batch: int,
        heads: Sequence[int],
        layout: RowLayout,
        choice: PageChoice,
        capacity: int,
        device: torch.device,
    ):
        self.layout, self.choice, self.device = layout, choice, device
        pages = batch * -(-capacity // choice.page_size)
        self.pool = PagePool(
            1, batch, sum(heads), layout.width, choice.page_size, pages, layout.stored_dtype, device, grows=True
        )
        firsts = [sum(heads[:layer]) for layer in range(len(heads))]
        self.spans = [slice(first, first + count) for first, count in zip(firsts, heads, strict=True)]
        sizes = choice.page_size, choice.logical_size, layout.dtype, device
        self.statistics = [PageStatistics(1, self.pool.pages, count, layout.head_dim, *sizes) for count in heads]
        self.lists: list[Tensor | None] = [None] * len(heads)  # [B, H or Hk, K] int32 logical pages, -1: none
        self.has_list = [False] * batch  # rows whose lists are those of the text before the next token
        self._plan: PagesPlan | None = None
        self._placed: list[bool] | None = None  # `has_list` after a step that `place_one_each` began

    @property
    def nbytes(self) -> int:
        lists = sum(chosen.nbytes for chosen in self.lists if chosen is not None)
        return self.pool.nbytes + sum(of_layer.nbytes for of_layer in self.statistics) + lists

    def begin(self, counts: Sequence[int], new: Sequence[int], positions: Tensor, decodes: bool) -> None:
        """Plan a step of new[b] tokens a row at `positions` [B, T], behind the counts[b] that are there."""
        totals = [count + n for count, n in zip(counts, new, strict=True)]
        self._prepare(counts, totals)
        columns = torch.arange(positions.shape[1])
        written = (columns < torch.tensor(new)[:, None]).nonzero()  # [N, 2]
        rows, columns = written.t().to(self.device)
        pages, offsets = self.pool.places(rows, torch.tensor(counts, device=self.device)[rows] + columns)
        lengths = torch.tensor(totals, device=self.device)
        long = [decodes and n > 0 and count > self.choice.budget for count, n in zip(counts, new, strict=True)]
        ragged = max(new) < positions.shape[1]
        behind = max(counts) and not (min(counts) == max(counts) and needs_no_mask(self.device))
        mask = None
        if not decodes and (behind or ragged):
            mask = (torch.arange(max(totals), device=self.device) <= positions[..., None])[:, None]
        due = [row for row, at in enumerate(long) if at and self._is_due(row, counts[row])]
        has_list = [
            row in due or (held and (decodes or not n))
            for row, (held, n) in enumerate(zip(self.has_list, new, strict=True))
        ]
        self._plan = PagesPlan(
            lengths,
            max(totals),
            rows,
            columns,
            pages,
            offsets,
            self.statistics[0].place(pages, offsets),
            any(long),
            mask,
            not decodes and mask is None,
            None if all(long) else ~torch.tensor(long, device=self.device),
            torch.tensor(due, device=self.device) if due else None,
            has_list,
        )

    def place_one_each(self, counts: Sequence[int]) -> list[bool]:
        """Begin a step of one generated token in every row, for kernels that find its places themselves: which rows
        choose pages."""
        self._prepare(counts, [count + 1 for count in counts])
        due = [count > self.choice.budget and self._is_due(row, count) for row, count in enumerate(counts)]
        self._placed = [held or chosen for held, chosen in zip(self.has_list, due, strict=True)]
        return due

    def _prepare(self, counts: Sequence[int], totals: Sequence[int]) -> None:
        """Pages for rows of `totals` tokens, and statistics for as many pages as there are."""
        self.pool.prepare(counts, totals)
        for of_layer in self.statistics:
            if of_layer.bounds.shape[1] < self.pool.pages:
                of_layer.grow(self.pool.pages, self.choice.page_size)

    def _is_due(self, row: int, count: int) -> bool:
        return count % self.choice.interval == 0 or not self.has_list[row]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float) -> Tensor:
        """q [B, H, T, D] and new k, v [B, Hk, T, D] of the layer's retrieval heads, all turned -> [B, H, T, D]."""
        plan = self._plan
        assert plan is not None
        self.write(layer, k, v)
        whole = self.layout, self.pool.storage[0], self.spans[layer], self.pool.table
        if not plan.listed:
            return attend_whole_rows(q, *whole, plan.lengths, scale, plan.mask, plan.causal, softcap, plan.longest)
        lists = self._chosen(layer, q[:, :, 0], plan)
        return attend_listed_pages(q[:, :, 0], *whole, lists, plan.lengths, scale, softcap)[:, :, None]

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """The step's new keys and values [B, Hk, T, D] of the layer, rotated."""
        plan = self._plan
        assert plan is not None
        new = torch.stack([part[plan.rows, :, plan.columns] for part in (k, v)])  # [2, N, Hk, D]
        rows = self.layout.pack(new).transpose(0, 1)
        self.pool.storage[0][:, plan.pages, self.spans[layer], plan.offsets] = rows
        self.statistics[layer].add(0, new[0], plan.arrivals)  # of keys as they came, not as they were rounded

    def _chosen(self, layer: int, q: Tensor, plan: PagesPlan) -> Tensor:
        """The lists of a layer [B, H or Hk, K], with a new choice for rows where it is due; short rows read all."""
        choice, statistics = self.choice, self.statistics[layer]
        lists = self.lists_of(layer, q.shape[1])
        heads, longest = lists.shape[1:]
        if plan.due is not None:
            lengths = plan.lengths[plan.due]
            table = self.pool.table[plan.due, : self.pool.pages_for(int(lengths.max()))]
            bounds = statistics.upper_bounds(0, q[plan.due], table, lengths)
            scores = physical_scores(bounds, statistics.parts)  # [R, H, P]
            if choice.shared:
                scores = scores.unflatten(1, (heads, -1)).amax(2)
            chosen = choose_pages(scores, lengths, choice.page_size, choice.pages)
            lists[plan.due] = torch.nn.functional.pad(chosen, (longest - chosen.shape[2], 0), value=-1)
        if plan.short is None:
            return lists[..., longest - choice.pages :]
        every = torch.arange(longest, dtype=torch.int32, device=self.device)  # those beyond a row's end are unseen
        return torch.where(plan.short[:, None, None], every, lists)

    def lists_of(self, layer: int, query_heads: int) -> Tensor:
        """The lists of a layer with this many query heads at its retrieval heads: [B, H or Hk, K + 1] int32."""
        lists, heads = self.lists[layer], self.spans[layer]
        if lists is None:  # a row at the budget may have begun one page more
            shape = len(self.has_list), heads.stop - heads.start if self.choice.shared else query_heads
            with torch.inference_mode(False):
                lists = torch.full((*shape, self.choice.pages + 1), -1, dtype=torch.int32, device=self.device)
            self.lists[layer] = lists
        return lists

    def commit(self, lengths: Sequence[int]) -> None:
        """End the step: each row has this many tokens now."""
        if self._plan is not None:
            self.has_list = self._plan.has_list
        elif self._placed is not None:
            self.has_list = self._placed
        self._plan = self._placed = None
        for row, length in enumerate(lengths):
            if length < self.pool.lengths[row]:
                self._cut(row, length)

    def abandon(self, lengths: Sequence[int]) -> None:
        """Take back a step that was not committed."""
        if self._plan is not None or self._placed is not None:
            self._plan = self._placed = None
            for row, length in enumerate(lengths):
                self._cut(row, length)

    def truncate(self, row: int, length: int) -> None:
        """Forget the tokens of a row from `length` on."""
        self.has_list[row] = False
        self._cut(row, length)

    def _cut(self, row: int, length: int) -> None:
        """The row's last logical page is bounded again, from its keys as they are stored: rounded, with 8 or 4 bits."""
        self.pool.cut(row, length)
        left = length % self.choice.logical_size
        if not left:
            return
        page, part = self.pool.rows[row][-1], length % self.choice.page_size // self.choice.logical_size
        where = [torch.tensor([number], device=self.device) for number in (page, part, left)]
        for span, of_layer in zip(self.spans, self.statistics, strict=True):
            keys = self.layout.unpack(self.pool.storage[0, 0, page : page + 1, span])  # [1, Hk, page_size, D]
            of_layer.rebuild([keys.expand(self.pool.pages, -1, -1, -1)], *where)
