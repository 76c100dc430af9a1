"""Fewer bits: one file a method, each turning matrices into formats (`fewer.slots.WeightMethod`)."""

from fewer.weights.auto import AutoWeights
from fewer.weights.dense import DenseWeights
from fewer.weights.int4 import Int4Config, Int4Weights
from fewer.weights.int8 import Int8Weights

__all__ = ["AutoWeights", "DenseWeights", "Int4Config", "Int4Weights", "Int8Weights"]
