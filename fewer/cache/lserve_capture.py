"""A decoding step of LServe as launches that a CUDA graph replays: what a layer's kernels are told, and in which order.

[norm · rotation · packing · bounds], where some row is due [scores] and [choice], and [attention of all heads]. What
changes from step to step is read on the device: positions say where a token goes and what a row sees, the page table
grows when a page begins. So there are two graphs, with a choice and without, until some tensor is allocated anew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fewer.kernels.head_stores import HeadStores
from fewer.kernels.new_tokens import NewTokens
from fewer.slots import Capture

if TYPE_CHECKING:
    from fewer.cache.lserve import LServeCache


def can_capture(cache: LServeCache) -> bool:
    """Whether the kernels take the cache's heads, all of its layers, and as many pages as the longest row has."""
    from fewer.kernels.triton.page_selector import MOST_PAGES  # Triton is imported only where there is a GPU

    layout, pool = cache.pages.layout, cache.pages.pool
    return (
        len(cache.rings) == 1
        and layout.head_dim % (4 if layout.quantised else 2) == 0
        and 2 * pool.pages_for(max(cache.counts) + 1) <= MOST_PAGES  # the table grows to twice its width
    )


class Launches:
    """What the kernels of all layers are told, for as long as no tensor of the cache is allocated anew."""

    def __init__(self, cache: LServeCache):
        pages, group = cache.pages, cache.config.heads // cache.config.kv_heads
        self.held = _tensors(cache)
        self.choice = pages.choice
        self.stores = [_stores(cache, layer) for layer in range(len(cache.layers))]
        self.lists = [pages.lists_of(layer, each.pages.shape[2] * group) for layer, each in enumerate(self.stores)]
        tensors = *self.held, cache._due, *self.lists, *(each.bounds for each in self.stores)
        homes = (layer.homes for layer in cache.layers)
        placed = tuple((tensor.data_ptr(), tensor.shape) for tensor in (*tensors, *homes))
        self.settings, self.placed = cache.settings, placed

    def serve(self, cache: LServeCache) -> bool:
        """Whether they are still those of the cache."""
        return all(ours is theirs for ours, theirs in zip(self.held, _tensors(cache), strict=True))

    def capture(self, due: Tensor | None) -> Capture:
        """Of a step that is placed; `due` [B] int32: rows that choose pages, None: no row does."""
        from fewer.kernels.triton.pack_new import pack_and_turn
        from fewer.kernels.triton.packed_attention import attend_packed
        from fewer.kernels.triton.page_selector import choose

        def attend(layer: int, new: NewTokens) -> None:
            own, lists = self.stores[layer], self.lists[layer]
            chooses = due is not None and own.pages.shape[2] > 0
            queries = pack_and_turn(new, own)
            if due is not None and chooses:
                choose(new, queries, own, due, lists, self.choice.pages)
            attend_packed(new, queries, own, lists, self.choice.budget, chooses)

        return Capture((self.settings, due is not None, self.placed), attend)


def _tensors(cache: LServeCache) -> tuple[Tensor, ...]:
    """What may be allocated anew; bounds grow with the pool."""
    pool = cache.pages.pool
    return pool.storage, pool.table, cache.ring.storage, cache.pages.statistics[0].bounds


def _stores(cache: LServeCache, index: int) -> HeadStores:
    pages, ring, layer = cache.pages, cache.ring, cache.layers[index]
    return HeadStores(
        layer.homes,
        pages.pool.storage[0][:, :, pages.spans[index]],
        pages.pool.table,
        pages.statistics[index].bounds[0],
        ring.storage[:, :, layer.span],
        ring.sinks,
        ring.window,
        pages.layout.bits,
        pages.choice.logical_size,
    )
