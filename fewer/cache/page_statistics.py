"""Largest and smallest key of every page: how high a query may score there, told without reading the page.

Source: Quest, arXiv 2406.10774 (the bound); LServe, arXiv 2502.14866, section 3.5 (bounds of small logical pages inside
large physical ones, and the choice of pages).

Keys lie in physical pages [pages, Hk, page_size, D] with a table [B, P], as in `fewer.kernels.list_attention`; a
contiguous cache is one page a row. A physical page is cut into g = page_size / logical_size logical pages (rounded up).
Each of these has, for every key head and channel c, the largest and the smallest stored key, so that no key of logical
page j has a larger product with a query than

    s_j = Σ_c max(q_c·largest_jc, q_c·smallest_jc) = q⁺·largest_j + q⁻·smallest_j,    q⁺ = max(q, 0), q⁻ = min(q, 0)

which is one product over 2·D channels. Logical pages without tokens score -inf, whatever they hold.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fewer.kernels.list_attention import INFINITY, stretch


class Arrivals(NamedTuple):
    """N new tokens, and the U logical pages that take them."""

    pages: Tensor  # [U] physical page of each logical page
    parts: Tensor  # [U] its number there
    target: Tensor  # [N] which of the U a token goes to
    first: Tensor  # those of the N that begin a logical page
    whole: bool  # the tokens come in whole logical pages, one behind another: the middle of a long prompt


class PageStatistics:
    """Bounds of the keys of some layers. Keys are given as the query meets them: rotated, and not yet quantised."""

    def __init__(
        self,
        layers: int,
        pages: int,
        kv_heads: int,
        head_dim: int,
        page_size: int,
        logical_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.page_size, self.logical_size = page_size, logical_size
        # [layers, pages, Hk, g, 2 (largest, smallest), D]
        shape = layers, pages, kv_heads, -(-page_size // logical_size), 2, head_dim
        self.bounds = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def parts(self) -> int:
        """g: logical pages in a physical one."""
        return self.bounds.shape[3]

    @property
    def nbytes(self) -> int:
        return self.bounds.nbytes

    def grow(self, pages: int, page_size: int) -> None:
        """Make room for this many physical pages of this size; what is known stays."""
        self.page_size = page_size
        parts = -(-page_size // self.logical_size) - self.parts
        padding = 0, 0, 0, 0, 0, parts, 0, 0, 0, pages - self.bounds.shape[1]
        with torch.inference_mode(False):  # what a pass allocates is written outside of passes, too
            self.bounds = torch.nn.functional.pad(self.bounds, padding)

    def place(self, pages: Tensor, offsets: Tensor) -> Arrivals:
        """Where N new tokens go, both [N] int64: the physical page of each and its place there. Layers share it."""
        touched, target = (pages * self.parts + offsets // self.logical_size).unique(return_inverse=True)
        first = (offsets % self.logical_size == 0).nonzero()[:, 0]
        whole = len(first) == len(touched) and len(first) * self.logical_size == len(target)
        if whole:
            of_page = target.view(-1, self.logical_size)
            whole = bool((of_page == of_page[:, :1]).all())
        return Arrivals(touched // self.parts, touched % self.parts, target, first, whole)

    def add(self, layer: int, keys: Tensor, arrivals: Arrivals) -> None:
        """The new tokens' keys [N, Hk, D].

        The first token of a logical page is assigned: nothing stays of what a recycled page held.
        """
        bounds = self.bounds[layer]
        keys = keys.to(bounds.dtype)
        if arrivals.whole:  # below, tokens contend for the same numbers
            grouped, order = keys.unflatten(0, (-1, self.logical_size)), arrivals.target[:: self.logical_size]
            found = torch.stack((grouped.amax(1), grouped.amin(1)), dim=2)  # [U, Hk, 2, D]
            bounds[arrivals.pages[order], :, arrivals.parts[order]] = found
            return
        known = bounds[arrivals.pages, :, arrivals.parts]  # [U, Hk, 2, D]
        known[arrivals.target[arrivals.first]] = keys[arrivals.first][:, :, None]
        into = arrivals.target[:, None, None].expand_as(keys)
        known[:, :, 0].scatter_reduce_(0, into, keys, "amax")
        known[:, :, 1].scatter_reduce_(0, into, keys, "amin")
        bounds[arrivals.pages, :, arrivals.parts] = known

    def rebuild(self, keys: Iterable[Tensor], pages: Tensor, parts: Tensor, counts: Tensor) -> None:
        """Read again logical pages that lost or moved tokens: numbers `parts` of physical `pages`, with `counts` >= 1
        tokens at their beginning, each [U] int64. `keys` [pages, Hk, page_size, D] of every layer."""
        place = torch.arange(self.logical_size, device=self.bounds.device)
        offsets = (parts[:, None] * self.logical_size + place).clamp(max=self.page_size - 1)  # [U, logical_size]
        gone = (place >= counts[:, None])[:, :, None, None]
        for bounds, of_layer in zip(self.bounds, keys, strict=True):
            held = of_layer[pages[:, None], :, offsets]  # [U, logical_size, Hk, D]
            largest, smallest = held.masked_fill(gone, -INFINITY).amax(1), held.masked_fill(gone, INFINITY).amin(1)
            bounds[pages, :, parts] = torch.stack((largest, smallest), dim=2).to(bounds.dtype)

    def upper_bounds(self, layer: int, q: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        """q [B, H, D] of rows with `lengths` [B] tokens in the pages of `table` [B, P] -> s [B, H, P·g] float32, by
        logical page. Query heads of a group read the bounds of their key head."""
        bounds = self.bounds[layer].flatten(3)  # [pages, Hk, g, 2·D]
        batch, heads, head_dim = q.shape
        grouped = q.float().view(batch, bounds.shape[1], -1, head_dim)
        halves = torch.cat((grouped.clamp(min=0), grouped.clamp(max=0)), dim=-1)  # [B, Hk, G, 2·D]
        scores = q.new_full((batch, heads, table.shape[1] * self.parts), -INFINITY, dtype=torch.float32)
        for row, length in enumerate(lengths.tolist()):
            filled = self._filled(length)
            if filled:
                known = stretch(bounds, table[row], filled).float()  # [Hk, n, 2·D]
                scores[row, :, :filled] = (halves[row] @ known.transpose(1, 2)).flatten(0, 1)
        return scores

    def _filled(self, length: int) -> int:
        """Logical pages up to a row's end, counted through its physical pages."""
        whole, rest = divmod(length, self.page_size)
        return whole * self.parts + -(-rest // self.logical_size)


def upper_bound(q: Tensor, largest: Tensor, smallest: Tensor) -> Tensor:
    """s of one page, for queries [H, D] of which those of a group read the bounds [Hk, D] of their key head -> [H]."""
    grouped = q.float().view(len(largest), -1, q.shape[1])
    high, low = grouped.clamp(min=0), grouped.clamp(max=0)
    return (high * largest.float()[:, None] + low * smallest.float()[:, None]).sum(-1).flatten()


def physical_scores(scores: Tensor, parts: int) -> Tensor:
    """s [B, H, P·g] of logical pages -> S [B, H, P]: a physical page is worth what its best logical page is."""
    return scores.unflatten(-1, (-1, parts)).amax(-1)


def choose_pages(scores: Tensor, lengths: Tensor, page_size: int, count: int) -> Tensor:
    """S [B, H, P] -> [B, H, K] int32, K = min(count, P): the K - 1 best whole pages of each row, and its newest page
    last, which may not be full. Rows with fewer pages have -1 in place of those that they lack; lengths [B] >= 1."""
    batch, heads, pages = scores.shape
    newest = (lengths.to(scores.device, torch.int64) - 1) // page_size  # [B]
    older = torch.arange(pages, device=scores.device) < newest[:, None]
    best = scores.masked_fill(~older[:, None], -INFINITY).topk(min(count, pages) - 1)
    chosen = torch.where(best.values > -INFINITY, best.indices, -1)
    return torch.cat((chosen, newest[:, None, None].expand(batch, heads, 1)), dim=-1).int()
