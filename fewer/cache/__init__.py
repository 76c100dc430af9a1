"""Fewer keys and values: one file a method, all behind `fewer.slots.KVCache`."""

from fewer.cache.full import FullCache
from fewer.cache.paged import PagedCache, PagedConfig
from fewer.cache.sink_window import SinkWindowCache, SinkWindowConfig

__all__ = ["FullCache", "PagedCache", "PagedConfig", "SinkWindowCache", "SinkWindowConfig"]
