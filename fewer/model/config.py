"""`ModelConfig`: the one description of a decoder that every checkpoint layout is translated into."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context (names as in Hugging Face configs)."""

    kind: Literal["linear", "llama3", "yarn", "longrope", "dynamic"]
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn, longrope: multiplies cos and sin
    short_factor: tuple[float, ...] = ()  # longrope, one a frequency; GGUF rope_freqs.weight is stored here too
    long_factor: tuple[float, ...] = ()  # longrope
    truncate: bool = True  # yarn: the ramp between both kinds of frequencies starts and ends at whole dimensions


@dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of experts in place of the feed-forward block."""

    count: int
    per_token: int
    intermediate_size: int
    normalize: bool  # top-k probabilities are divided by their sum
    shared_intermediate_size: int = 0  # Qwen2-MoE: one expert that always runs, behind a sigmoid gate
    layers: tuple[bool, ...] = ()  # which layers have experts; () = all


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and switches of one decoder-only transformer. Sizes are counts, never bytes."""

    architecture: str  # "llama", "qwen2", "gemma3", …: the family, for messages
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context_length: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rotary_dim: int = 0  # 0 = head_dim; smaller for partial rotation (Phi-3 family)
    rope_layers: tuple[bool, ...] = ()  # False = NoPE layer; () = all rotate
    local_rope_theta: float | None = None  # Gemma 3: base of the sliding-window layers (no scaling there)
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] = ()  # which layers are windowed; () with sliding_window set = all
    attention_bias: bool = False  # on q, k, v
    output_bias: bool = False  # on o
    mlp_bias: bool = False
    qk_norm: Literal["none", "head", "all"] = "none"  # RMSNorm on each head (Qwen3, Gemma 3) or the row (OLMo-2, OLMoE)
    clip_qkv: float | None = None
    norm_placement: Literal["pre", "sandwich", "post"] = "pre"  # sandwich: Gemma; post: OLMo-2
    attention_scale: float | None = None  # None = head_dim ** -0.5
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float | None = None  # Gemma: sqrt(hidden_size)
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    activation: Literal["silu", "gelu_tanh", "gelu"] = "silu"
    tied_embeddings: bool = False
    experts: ExpertsConfig | None = None
    bos_token: int | None = None
    eos_tokens: tuple[int, ...] = ()

    def is_sliding(self, layer: int) -> bool:
        if self.sliding_window is None:
            return False
        return not self.sliding_layers or self.sliding_layers[layer]

    def has_rope(self, layer: int) -> bool:
        return not self.rope_layers or self.rope_layers[layer]

    def has_experts(self, layer: int) -> bool:
        return self.experts is not None and (not self.experts.layers or self.experts.layers[layer])

    @property
    def scale(self) -> float:
        return self.attention_scale if self.attention_scale is not None else self.head_dim**-0.5

    def kv_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * bytes_per_value
