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


def capture_of(cache: LServeCache, due: Tensor | None) -> Capture:
    """The launches of a step that is placed; `due` [B] int32: rows that choose pages, None: no row does."""
    from fewer.kernels.triton.pack_new import pack_and_turn
    from fewer.kernels.triton.packed_attention import attend_packed
    from fewer.kernels.triton.page_selector import choose

    pages, group = cache.pages, cache.config.heads // cache.config.kv_heads
    stores = [_stores(cache, layer) for layer in range(len(cache.layers))]
    lists = [pages.lists_of(layer, each.pages.shape[2] * group) for layer, each in enumerate(stores)]

    def attend(layer: int, new: NewTokens) -> None:
        own, chooses = stores[layer], due is not None and stores[layer].pages.shape[2] > 0
        queries = pack_and_turn(new, own)
        if due is not None and chooses:
            choose(new, queries, own, due, lists[layer], pages.choice.pages)
        attend_packed(new, queries, own, lists[layer], pages.choice.budget, chooses)

    pool, ring = pages.pool, cache.ring.storage
    tensors = pool.storage, pool.table, ring, cache._due, *lists, *(each.bounds for each in stores)
    placed = tuple(tensor.data_ptr() for tensor in tensors), pool.storage.shape, pool.table.shape, ring.shape
    homes = tuple(layer.homes.data_ptr() for layer in cache.layers)
    return Capture((cache.settings, due is not None, placed, homes), attend)


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
