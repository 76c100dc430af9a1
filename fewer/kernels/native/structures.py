"""The structures of decode.c, products.h and attention.h for ctypes; what their fields mean is said there."""

from __future__ import annotations

from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_uint32, c_void_p

FLOAT32, BFLOAT16, INT8, INT4 = range(4)
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
QK_NORMS = {"none": 0, "head": 1, "all": 2}
MOST_KINDS = 4  # stores and rotations of a step
MOST_ROWS, MOST_QUERIES, WIDEST_HEAD, LANES = 32, 256, 256, 16


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
        ("turn", c_int32),
    ]


class Model(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("layers", "hidden", "intermediate", "vocab", "activation", "qk_norm", "rotary")),
        ("integers", c_int32),
        ("heads", Heads),
        *((name, c_float) for name in ("eps", "scale", "clip_qkv", "residual_scale", "embedding_scale")),
        ("embed", Matrix),
        ("layer", POINTER(Layer)),
        ("norm", c_void_p),
        ("head", Matrix),
    ]


class Visible(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("start", "count", "stop", "sinks")),
        ("first", c_int32 * MOST_ROWS),
        ("sees", c_uint32 * MOST_ROWS),
    ]


class Store(Structure):
    _fields_ = [("keys", c_void_p), ("values", c_int64), ("visible", Visible)]


class Step(Structure):
    _fields_ = [
        ("model", POINTER(Model)),
        ("rows", c_int32),
        ("token", c_int32 * MOST_ROWS),
        ("turns", c_void_p * MOST_KINDS),
        ("store", Store * MOST_KINDS),
        *((name, c_void_p) for name in ("homes", "slots", "weights")),
        ("width", c_int64),
        *((name, c_void_p) for name in ("shared", "logits", "hidden")),
        ("best", c_int32 * MOST_ROWS),
        ("finite", c_int32),
    ]
