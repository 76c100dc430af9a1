"""What one decoding step has to read under each cache, and what that costs at least: plain arithmetic, no tensors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Of a model and of how its keys are stored."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    element_bytes: int = 2

    @property
    def row_bytes(self) -> int:
        """Key and value of one token in one key head."""
        return 2 * self.head_dim * self.element_bytes

    @property
    def token_bytes(self) -> int:
        """Key and value of one token in all layers and heads."""
        return self.layers * self.kv_heads * self.row_bytes


def everything(shape: Shape, context: int) -> float:
    """Every key and value of `context` tokens: what dense attention reads. All results are bytes a step."""
    return context * shape.token_bytes


def split_heads(shape: Shape, context: int, streaming: float, kept: int) -> float:
    """A share `streaming` of the key heads reads `kept` tokens, the others everything (DuoAttention)."""
    return shape.token_bytes * (streaming * min(kept, context) + (1 - streaming) * context)


def chosen_pages(
    shape: Shape, context: int, streaming: float, kept: int, budget: int, list_heads: int, row_bytes: int,
    logical_size: int, interval: int,
) -> float:  # fmt: skip
    """A share `streaming` of the key heads reads `kept` tokens; for the others, `list_heads` a layer if none streamed
    read `budget` tokens each, and once in `interval` steps the largest and smallest key of every logical page
    (LServe). `row_bytes`: key and value of a token in one head as they are stored."""
    retrieving = shape.layers * (1 - streaming)
    read = retrieving * list_heads * min(budget, context) * row_bytes
    bounds = retrieving * shape.kv_heads * context / logical_size * shape.row_bytes / interval
    return read + bounds + shape.layers * streaming * shape.kv_heads * min(kept, context) * row_bytes


def chosen_tokens(shape: Shape, context: int, budget: int, dense_layers: int, list_heads: int) -> float:
    """`dense_layers` read everything; in the others each of `list_heads` reads `budget` tokens (TidalDecode)."""
    sparse = (shape.layers - dense_layers) * list_heads * min(budget, context) * shape.row_bytes
    return dense_layers * shape.kv_heads * context * shape.row_bytes + sparse


def chosen_by_bounds(shape: Shape, context: int, budget: int, dense_layers: int, page_size: int) -> float:
    """`dense_layers` read everything; in the others each query head reads `budget` tokens, and the largest and smallest
    key of every page is read (Quest)."""
    bounds = (shape.layers - dense_layers) * shape.kv_heads * context / page_size * shape.row_bytes
    return chosen_tokens(shape, context, budget, dense_layers, shape.heads) + bounds


def kept_tokens(shape: Shape, context: int, budget: int) -> float:
    """Every key head holds and reads `budget` tokens (windows, eviction)."""
    return shape.token_bytes * min(budget, context)


def floor_seconds(weight_bytes: float, read_bytes: float, rate: float) -> float:
    """The least a step can take: weights and keys once, at `rate` bytes a second."""
    return (weight_bytes + read_bytes) / rate


def prefix_flops(shape: Shape, batch: int, prefix: int) -> float:
    """Operations of one step's attention of `batch` rows over a prefix, a multiplication and an addition as two."""
    return 4.0 * shape.layers * batch * shape.heads * shape.head_dim * prefix


def unexplained_decline(
    seconds: tuple[float, float], prefixes: tuple[int, int], batch: int, shape: Shape, flops_rate: float
) -> float:
    """How many times longer a step over the longer prefix takes than the step over the shorter one and the added
    operations at `flops_rate` together: 1 where these alone explain it (Hydragen)."""
    short, long = seconds
    added = prefix_flops(shape, batch, prefixes[1]) - prefix_flops(shape, batch, prefixes[0])
    return long / (short + added / flops_rate)


def over_interval(choosing: float, reusing: float, interval: int) -> float:
    """Average of a step where every `interval`-th one chooses."""
    return (choosing + (interval - 1) * reusing) / interval


def length_name(tokens: int) -> str:
    """262144 -> 256k: how lengths are written in names of sections."""
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)
