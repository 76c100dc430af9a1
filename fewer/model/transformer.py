"""The decoder: embedding, layers of attention and feed-forward, final norm, head. It knows no method.

One class covers every family; `ModelConfig` says what differs. The residual stream is float32 on the CPU and `dtype` on
CUDA; products take `dtype`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fewer.formats.base import WeightFormat
from fewer.model.attention import Attention
from fewer.model.config import ModelConfig
from fewer.model.experts import Experts, MakeRouter, MakeStore, ResidentStore, TopKRouter
from fewer.model.feed_forward import ACTIVATIONS, FeedForward
from fewer.model.linear import Linear
from fewer.model.norm import rms_norm
from fewer.model.rope import Rotary
from fewer.model.step import LayerCaches, Output, Step

Matrix = Callable[[str], WeightFormat]
Vector = Callable[[str], Tensor]


@dataclass(slots=True)
class Layer:
    attention_norm: Tensor | None
    attention: Attention
    post_attention_norm: Tensor | None
    feed_forward_norm: Tensor | None
    feed_forward: FeedForward | Experts
    post_feed_forward_norm: Tensor | None


class Transformer:
    def __init__(
        self,
        config: ModelConfig,
        matrix: Matrix,
        vector: Vector,
        dtype: torch.dtype,
        device: torch.device,
        router: MakeRouter = TopKRouter,
        store: MakeStore = ResidentStore,
    ):
        """`matrix(name)` and `vector(name)` deliver weights by canonical name; vectors are float32. `router` and
        `store` make the two halves of every mixture of experts."""
        self.config, self.dtype, self.device = config, dtype, device
        self.residual_dtype = torch.float32 if device.type == "cpu" else dtype
        self.embed = matrix("embed.weight")
        self.rotary, self.local_rotary = _rotaries(config)
        build = _Builder(config, matrix, vector, self.rotary, self.local_rotary, router, store)
        self.layers = [build.layer(index) for index in range(config.layers)]
        self.norm = vector("norm.weight")
        self.head = self.embed if config.tied_embeddings else matrix("head.weight")

    def forward(self, step: Step, caches: LayerCaches) -> Output:
        """Run one step. Raises nothing of its own: shapes are the caller's promise."""
        x = self._embed(step)
        taps = {0: x.to(self.dtype)} if 0 in step.taps else {}
        for index, layer in enumerate(self.layers):
            x = self._run_layer(index, layer, x, step, caches)
            if index + 1 in step.taps:
                taps[index + 1] = x.to(self.dtype)
        if step.logits == "none" and not step.hidden:
            return Output(None, None, taps)
        wanted = _last(x, step) if step.logits == "last" and not step.hidden else x
        hidden = rms_norm(wanted, self.norm, self.config.norm_eps, self.dtype)
        if step.logits == "none":
            return Output(None, hidden, taps)
        scored = _last(hidden, step) if step.logits == "last" and step.hidden else hidden
        return Output(self.logits(scored), hidden, taps)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., d] after the final norm -> [..., V] float32."""
        logits = self.head.matmul(hidden).float()
        if self.config.logit_scale != 1.0:
            logits = logits * self.config.logit_scale
        if self.config.logit_softcap is not None:
            logits = torch.tanh(logits / self.config.logit_softcap) * self.config.logit_softcap
        return logits

    def find_non_finite(self, step: Step, caches: LayerCaches) -> str:
        """Name the first place whose output is not finite, by running the step again. The cache is spoiled after it."""
        x = self._embed(step)
        if not torch.isfinite(x).all():
            return "already in the embeddings"
        for index, layer in enumerate(self.layers):
            x = self._run_layer(index, layer, x, step, caches)
            if not torch.isfinite(x).all():
                return f"first in layer {index}"
        return "in the final norm or the output head"

    def matrices(self) -> Iterator[tuple[str, WeightFormat]]:
        """Every stored matrix with a name; fused projections appear once."""
        yield "embed", self.embed
        for index, layer in enumerate(self.layers):
            for name, linear in _linears(layer):
                for part in linear.parts:
                    yield f"layers.{index}.{name}", part
        if self.head is not self.embed:
            yield "head", self.head

    @property
    def nbytes(self) -> int:
        """Bytes of all weights: matrices, norms and biases."""
        vectors = [self.norm.nbytes]
        for layer in self.layers:
            norms = (
                layer.attention_norm,
                layer.post_attention_norm,
                layer.feed_forward_norm,
                layer.post_feed_forward_norm,
            )
            vectors += [
                norm.nbytes for norm in (*norms, layer.attention.q_norm, layer.attention.k_norm) if norm is not None
            ]
            vectors += [linear.bias.nbytes for _, linear in _linears(layer) if linear.bias is not None]
        return sum(vectors) + sum(stored.nbytes for _, stored in self.matrices())

    def _embed(self, step: Step) -> Tensor:
        if step.embeddings is not None:
            return step.embeddings.to(self.residual_dtype)
        assert step.tokens is not None
        x = self.embed.rows(step.tokens)
        if self.config.embedding_scale is not None:
            x = x * self.config.embedding_scale
        return x.to(self.residual_dtype)

    def _run_layer(self, index: int, layer: Layer, x: Tensor, step: Step, caches: LayerCaches) -> Tensor:
        if step.layer_plan is None:
            return self._layer(layer, x, step, caches, index)
        runs = step.layer_plan[:, :, index].to(x.device)
        if not runs.any():
            return self._skip(index, x, step, caches)
        return torch.where(runs[..., None], self._layer(layer, x, step, caches, index), x)

    def _layer(self, layer: Layer, x: Tensor, step: Step, caches: LayerCaches, index: int) -> Tensor:
        eps, scale = self.config.norm_eps, self.config.residual_scale
        normed = (
            x.to(self.dtype) if layer.attention_norm is None else rms_norm(x, layer.attention_norm, eps, self.dtype)
        )
        out = layer.attention(normed, step, caches.layers[index])
        if layer.post_attention_norm is not None:
            out = rms_norm(out, layer.post_attention_norm, eps, x.dtype)
        x = x + (out if scale == 1.0 else out * scale)
        normed = (
            x.to(self.dtype)
            if layer.feed_forward_norm is None
            else rms_norm(x, layer.feed_forward_norm, eps, self.dtype)
        )
        block = layer.feed_forward
        out = block(normed, step) if isinstance(block, Experts) else block(normed)
        if layer.post_feed_forward_norm is not None:
            out = rms_norm(out, layer.post_feed_forward_norm, eps, x.dtype)
        return x + (out if scale == 1.0 else out * scale)

    def _skip(self, index: int, x: Tensor, step: Step, caches: LayerCaches) -> Tensor:
        """No token runs this layer: no product, but the cache marks their slots as holding nothing."""
        batch, width = x.shape[:2]
        config = self.config
        nothing = x.new_zeros(batch, config.kv_heads, width, config.head_dim, dtype=self.dtype)
        caches.layers[index].skip(nothing, step)
        return x


class _Builder:
    """Makes layers from named weights."""

    def __init__(
        self,
        config: ModelConfig,
        matrix: Matrix,
        vector: Vector,
        rotary: Rotary,
        local: Rotary,
        router: MakeRouter,
        store: MakeStore,
    ):
        self.config, self.matrix, self.vector = config, matrix, vector
        self.rotary, self.local_rotary = rotary, local
        self.router, self.store = router, store

    def layer(self, index: int) -> Layer:
        name, placement = f"layers.{index}", self.config.norm_placement

        def norm(kind: str, *placements: str) -> Tensor | None:
            return self.vector(f"{name}.{kind}.weight") if placement in placements else None

        return Layer(
            attention_norm=norm("attention_norm", "pre", "sandwich"),
            attention=self._attention(index, f"{name}.attention"),
            post_attention_norm=norm("post_attention_norm", "sandwich", "post"),
            feed_forward_norm=norm("feed_forward_norm", "pre", "sandwich"),
            feed_forward=self._experts(name) if self.config.has_experts(index) else self._block(f"{name}.feed_forward"),
            post_feed_forward_norm=norm("post_feed_forward_norm", "sandwich", "post"),
        )

    def _attention(self, index: int, name: str) -> Attention:
        config = self.config
        sliding = config.is_sliding(index)
        rotary = self.local_rotary if sliding and config.local_rope_theta is not None else self.rotary
        normed = config.qk_norm != "none"
        return Attention(
            config=config,
            qkv=self._linear([f"{name}.{part}" for part in "qkv"], config.attention_bias),
            o=self._linear([f"{name}.o"], config.output_bias),
            q_norm=self.vector(f"{name}.q_norm.weight") if normed else None,
            k_norm=self.vector(f"{name}.k_norm.weight") if normed else None,
            rotary=rotary if config.has_rope(index) else None,
            window=config.sliding_window if sliding else None,
        )

    def _block(self, name: str) -> FeedForward:
        bias = self.config.mlp_bias
        gate_up = self._linear([f"{name}.gate", f"{name}.up"], bias)
        return FeedForward(gate_up, self._linear([f"{name}.down"], bias), ACTIVATIONS[self.config.activation])

    def _experts(self, name: str) -> Experts:
        settings = self.config.experts
        assert settings is not None
        router = self.router(self.matrix(f"{name}.router.weight"), settings)
        store = self.store([self._block(f"{name}.experts.{expert}") for expert in range(settings.count)])
        if not settings.shared_intermediate_size:
            return Experts(router, store)
        gate = self._linear([f"{name}.shared_expert_gate"], False)
        return Experts(router, store, self._block(f"{name}.shared_expert"), gate)

    def _linear(self, names: list[str], bias: bool) -> Linear:
        biases = torch.cat([self.vector(f"{name}.bias") for name in names]) if bias else None
        return Linear([self.matrix(f"{name}.weight") for name in names], biases)


def _rotaries(config: ModelConfig) -> tuple[Rotary, Rotary]:
    dim = config.rotary_dim or config.head_dim
    rotary = Rotary(dim, config.head_dim, config.rope_theta, config.context_length, config.rope_scaling)
    if config.local_rope_theta is None:
        return rotary, rotary
    return rotary, Rotary(dim, config.head_dim, config.local_rope_theta, config.context_length)


def _last(x: Tensor, step: Step) -> Tensor:
    """The last new token of each row: [B, d]."""
    if step.lengths is None:
        return x[:, -1]
    last = torch.tensor([max(length - 1, 0) for length in step.lengths], device=x.device)
    return x[torch.arange(len(last), device=x.device), last]


def _linears(layer: Layer) -> Iterator[tuple[str, Linear]]:
    yield "attention.qkv", layer.attention.qkv
    yield "attention.o", layer.attention.o
    block = layer.feed_forward
    if isinstance(block, FeedForward):
        yield "feed_forward.gate_up", block.gate_up
        yield "feed_forward.down", block.down
        return
    yield "router", Linear([block.router.matrix])
    for index, expert in enumerate(block.store.experts):
        yield f"experts.{index}.gate_up", expert.gate_up
        yield f"experts.{index}.down", expert.down
    if block.shared is not None:
        yield "shared_expert.gate_up", block.shared.gate_up
        yield "shared_expert.down", block.shared.down
    if block.shared_gate is not None:
        yield "shared_expert_gate", block.shared_gate
