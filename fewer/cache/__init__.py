"""Fewer keys and values: one file a method, all behind `fewer.slots.KVCache`."""

from fewer.cache.a2sf import A2sfCache, A2sfConfig
from fewer.cache.duo_attention import DuoAttentionCache, DuoAttentionConfig
from fewer.cache.full import FullCache
from fewer.cache.h2o import H2OCache, H2OConfig
from fewer.cache.hydragen import HydragenCache, HydragenConfig
from fewer.cache.lserve import LServeCache, LServeConfig
from fewer.cache.oracle_topk import OracleTopkCache, OracleTopkConfig
from fewer.cache.paged import PagedCache, PagedConfig
from fewer.cache.quest import QuestCache, QuestConfig
from fewer.cache.random_topk import RandomTopkCache, RandomTopkConfig
from fewer.cache.sink_window import SinkWindowCache, SinkWindowConfig
from fewer.cache.snapkv import SnapKVCache, SnapKVConfig
from fewer.cache.tidal_decode import TidalDecodeCache, TidalDecodeConfig
from fewer.cache.tova import TovaCache, TovaConfig

__all__ = [
    "A2sfCache",
    "A2sfConfig",
    "DuoAttentionCache",
    "DuoAttentionConfig",
    "FullCache",
    "H2OCache",
    "H2OConfig",
    "HydragenCache",
    "HydragenConfig",
    "LServeCache",
    "LServeConfig",
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
    "SnapKVCache",
    "SnapKVConfig",
    "TidalDecodeCache",
    "TidalDecodeConfig",
    "TovaCache",
    "TovaConfig",
]
