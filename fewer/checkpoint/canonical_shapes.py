"""The canonical tensors of a model and their shapes, as `Transformer` asks for them."""

from __future__ import annotations

from collections.abc import Iterator

from fewer.model.config import ModelConfig

Named = tuple[str, tuple[int, ...]]


def canonical_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a model of this config consists of: matrices [out, in], norms and biases [n]."""
    vocabulary = config.vocab_size, config.hidden_size
    shapes = {"embed.weight": vocabulary, "norm.weight": (config.hidden_size,)}
    if not config.tied_embeddings:
        shapes["head.weight"] = vocabulary
    for layer in range(config.layers):
        shapes.update((f"layers.{layer}.{name}", shape) for name, shape in _layer(config, layer))
    return shapes


def _layer(config: ModelConfig, layer: int) -> Iterator[Named]:
    width = config.hidden_size
    norms = ("attention_norm", "feed_forward_norm") if config.norm_placement != "post" else ()
    after = ("post_attention_norm", "post_feed_forward_norm") if config.norm_placement != "pre" else ()
    yield from ((f"{norm}.weight", (width,)) for norm in (*norms, *after))
    yield from _attention(config)
    experts = config.experts
    if experts is None or not config.has_experts(layer):
        yield from _block(config, "feed_forward", config.intermediate_size)
        return
    yield "router.weight", (experts.count, width)
    for expert in range(experts.count):
        yield from _block(config, f"experts.{expert}", experts.intermediate_size)
    if experts.shared_intermediate_size:
        yield from _block(config, "shared_expert", experts.shared_intermediate_size)
        yield "shared_expert_gate.weight", (1, width)


def _attention(config: ModelConfig) -> Iterator[Named]:
    query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
    for part, rows in (("q", query), ("k", key), ("v", key)):
        yield f"attention.{part}.weight", (rows, config.hidden_size)
        if config.attention_bias:
            yield f"attention.{part}.bias", (rows,)
    yield "attention.o.weight", (config.hidden_size, query)
    if config.output_bias:
        yield "attention.o.bias", (config.hidden_size,)
    if config.qk_norm != "none":
        whole = config.qk_norm == "all"
        yield "attention.q_norm.weight", (query if whole else config.head_dim,)
        yield "attention.k_norm.weight", (key if whole else config.head_dim,)


def _block(config: ModelConfig, name: str, inner: int) -> Iterator[Named]:
    for part, rows, columns in (
        ("gate", inner, config.hidden_size),
        ("up", inner, config.hidden_size),
        ("down", config.hidden_size, inner),
    ):
        yield f"{name}.{part}.weight", (rows, columns)
        if config.mlp_bias:
            yield f"{name}.{part}.bias", (rows,)
