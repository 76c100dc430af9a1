"""Fewer keys and values: one file a method, all behind `fewer.slots.KVCache`."""

from fewer.cache.full import FullCache
from fewer.cache.oracle_topk import OracleTopkCache, OracleTopkConfig
from fewer.cache.paged import PagedCache, PagedConfig
from fewer.cache.quest import QuestCache, QuestConfig
from fewer.cache.random_topk import RandomTopkCache, RandomTopkConfig
from fewer.cache.sink_window import SinkWindowCache, SinkWindowConfig
from fewer.cache.tidal_decode import TidalDecodeCache, TidalDecodeConfig

__all__ = [
    "FullCache",
    "OracleTopkCache",
    "OracleTopkConfig",
    "PagedCache",
    "PagedConfig",
    "QuestCache",
    "QuestConfig",
    "RandomTopkCache",
    "RandomTopkConfig",
    "SinkWindowCache",
    "SinkWindowConfig",
    "TidalDecodeCache",
    "TidalDecodeConfig",
]
