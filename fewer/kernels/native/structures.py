"""The structures of decode.c, products.h and attention.h for ctypes; what their fields mean is said there."""

from __future__ import annotations

from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p

FLOAT32, BFLOAT16, INT8, INT4 = range(4)
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
QK_NORMS = {"none": 0, "head": 1, "all": 2}
KINDS_OF_LAYER = 2  # stores and rotations of a step
WIDEST_HEAD, MOST_GROUP, LANES, SHORTEST_GROUP = 256, 64, 16, 32


class Part(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("kind", "rows", "columns", "group", "copies", "tile", "padded")),
        *((name, c_void_p) for name in ("weight", "scale", "bias")),
    ]


class Matrix(Structure):
    _fields_ = [("parts", c_int32), ("part", POINTER(Part))]


class Heads(Structure):
    _fields_ = [*((name, c_int32) for name in ("bfloat16", "heads", "kv_heads", "dim")), ("softcap", c_float)]


class Layer(Structure):
    _fields_ = [
        *(
            (name, c_void_p)
            for name in (
                *("attention_norm", "post_attention_norm", "feed_forward_norm", "post_feed_forward_norm"),
                *("q_norm", "k_norm"),
            )
        ),
        *((name, Matrix) for name in ("qkv", "o", "gate_up", "down")),
        *((name, c_int32) for name in ("turn", "kind", "index")),
    ]


class Model(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("layers", "hidden", "intermediate", "vocab", "activation", "qk_norm", "rotary")),
        ("heads", Heads),
        *((name, c_float) for name in ("eps", "scale", "clip_qkv", "residual_scale")),
        ("layer", POINTER(Layer)),
        ("norm", c_void_p),
        ("head", Matrix),
    ]


class Store(Structure):
    _fields_ = [
        ("pool", c_void_p),
        *((name, c_int64) for name in ("layer", "value", "head")),
        *((name, c_int32) for name in ("slot", "sinks", "first")),
    ]


class Step(Structure):
    _fields_ = [
        ("model", POINTER(Model)),
        ("embedded", c_void_p),
        ("turns", c_void_p * KINDS_OF_LAYER),
        ("store", Store * KINDS_OF_LAYER),
        ("shared", c_void_p),
        ("logits", c_void_p),
        ("best", c_int32),
        ("finite", c_int32),
    ]
