"""GGUF metadata to `ModelConfig`, for the architectures whose layout is known here.

Keys are those of gguf's constants (`{architecture}.attention.head_count`, …). What a file leaves out gets the value
that llama.cpp gives it (llama-model.cpp, load_hparams), since converters rely on those.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from fewer.checkpoint.gguf_keys import MAX_LAYERS, Keys
from fewer.checkpoint.gguf_reader import GGUFFile
from fewer.errors import CheckpointError
from fewer.model.config import ExpertsConfig, ModelConfig, RopeScaling

MAX_EXPERTS = 4096  # of a layer
MAX_EXPERTS_IN_ALL = 1 << 17  # of a model: each costs a few hundred bytes before anything is read


@dataclass(frozen=True)
class Family:
    """What an architecture's name implies and its metadata does not say."""

    interleaved: bool = False  # the converter has already paired rotary rows
    norm_placement: Literal["pre", "sandwich", "post"] = "pre"
    qk_norm: Literal["none", "head", "all"] = "none"
    gemma: bool = False  # embeddings scaled, GELU
    window_period: int = 1  # of this many layers all but the last are windowed; 1: every layer, if there is a window
    default_window: int | None = None
    nope_period: int = 0  # every layer of this many that comes last has no rotary embedding
    normalized_experts: bool = False
    layers_of_27b: int = 0  # Gemma's largest model scales attention by its width, and only its depth tells


FAMILIES: dict[str, Family] = {
    "llama": Family(interleaved=True, normalized_experts=True),  # also Mistral, Mixtral, SmolLM 1 and 2
    "qwen2": Family(),
    "qwen3": Family(qk_norm="head"),
    "gemma2": Family(norm_placement="sandwich", gemma=True, window_period=2, default_window=4096, layers_of_27b=46),
    "gemma3": Family(norm_placement="sandwich", qk_norm="head", gemma=True, window_period=6, layers_of_27b=62),
    "smollm3": Family(interleaved=True, nope_period=4),
    "phi3": Family(),
    "olmo2": Family(norm_placement="post", qk_norm="all"),
    "qwen2moe": Family(),
    "qwen3moe": Family(qk_norm="head", normalized_experts=True),
    "olmoe": Family(qk_norm="all"),
}

# llama_ftype of llama.h, as people write it
FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 21: "Q2_K_S", 25: "IQ4_NL",
    30: "IQ4_XS", 32: "BF16",
}  # fmt: skip


def architecture_of(file: GGUFFile) -> str:
    architecture = file.metadata.scalar("general.architecture")
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        name = f"architecture {str(architecture)[:60]!r}" if architecture is not None else "no architecture"
        raise CheckpointError(
            f"'{file.path}' has {name}, which fewer does not know: it reads GGUF files of {', '.join(FAMILIES)}"
        )
    return architecture


def read_config(file: GGUFFile) -> ModelConfig:
    """The model that the metadata describes. Shapes are held against the tensors afterwards (`gguf_names`)."""
    architecture = architecture_of(file)
    family, keys = FAMILIES[architecture], Keys(file.metadata, file.path, architecture)
    layers = keys.count("block_count")
    if layers > min(len(file.tensors), MAX_LAYERS):
        raise CheckpointError(
            f"'{file.path}': the metadata key '{architecture}.block_count' is {layers}, but the file holds "
            f"{len(file.tensors)} tensors and a model may have {MAX_LAYERS} layers; it is damaged, download it again"
        )
    hidden, heads = keys.count("embedding_length"), keys.count("attention.head_count")
    if heads > hidden:
        raise CheckpointError(f"'{file.path}': {heads} heads are claimed for a hidden size of {hidden}")
    head_dim = keys.count("attention.key_length", hidden // heads)
    if keys.count("attention.value_length", head_dim) != head_dim:
        raise CheckpointError(f"'{file.path}': keys and values of different sizes are not supported")
    vocab_size = _vocab_size(file, keys)
    config = ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=keys.count("feed_forward_length", 0 if keys.get("expert_count") else None),
        layers=layers,
        heads=heads,
        kv_heads=keys.count("attention.head_count_kv", heads),
        head_dim=head_dim,
        context_length=keys.count("context_length"),
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        attention_bias="blk.0.attn_q.bias" in file.tensors or "blk.0.attn_qkv.bias" in file.tensors,
        output_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_down.bias" in file.tensors,
        qk_norm=family.qk_norm,
        norm_placement=family.norm_placement,
        clip_qkv=keys.number("attention.clamp_kqv", 0.0) or None,
        tied_embeddings="output.weight" not in file.tensors,
        experts=_experts(file, keys, family, layers),
        bos_token=keys.token("bos", vocab_size),
        eos_tokens=_eos_tokens(keys, vocab_size),
    )
    if config.heads % config.kv_heads:
        raise CheckpointError(f"'{file.path}': {heads} heads cannot share {config.kv_heads} key-value heads evenly")
    if family.gemma:
        config = _with_gemma(config, keys, family)
    return _with_windows(_with_rope(config, file, keys, family), keys, family)


def _vocab_size(file: GGUFFile, keys: Keys) -> int:
    embedding = file.tensors.get("token_embd.weight")
    rows = embedding.shape[0] if embedding is not None and len(embedding.shape) == 2 else None
    size = keys.count("vocab_size", rows)
    tokens = file.metadata.array_length("tokenizer.ggml.tokens") or 0
    if tokens > size:
        raise CheckpointError(
            f"'{file.path}': the tokenizer has {tokens} tokens, but the model's vocabulary only {size}: convert it"
        )
    return size


def _eos_tokens(keys: Keys, vocab_size: int) -> tuple[int, ...]:
    found = (keys.token(name, vocab_size) for name in ("eos", "eot", "eom"))
    return tuple(dict.fromkeys(token for token in found if token is not None))


def _experts(file: GGUFFile, keys: Keys, family: Family, layers: int) -> ExpertsConfig | None:
    count = keys.count("expert_count", 0, least=0)
    if count == 0:
        return None
    if count > MAX_EXPERTS or count * layers > MAX_EXPERTS_IN_ALL:
        raise CheckpointError(
            f"'{file.path}': {count} experts in each of {layers} layers are claimed, at most {MAX_EXPERTS} in a layer "
            f"and {MAX_EXPERTS_IN_ALL} in all are supported"
        )
    per_token = keys.count("expert_used_count")
    if per_token > count:
        raise CheckpointError(f"'{file.path}': {per_token} of {count} experts cannot be used for a token")
    width = keys.count("feed_forward_length", 0, least=0)
    qwen = keys.architecture in ("qwen2moe", "qwen3moe")
    has_router = tuple(f"blk.{layer}.ffn_gate_inp.weight" in file.tensors for layer in range(layers))
    shared = 0
    if "blk.0.ffn_gate_inp_shexp.weight" in file.tensors:
        shared = keys.count("expert_shared_feed_forward_length", width)
    return ExpertsConfig(
        count=count,
        per_token=per_token,
        intermediate_size=keys.count("expert_feed_forward_length", max(width // per_token if qwen else width, 1)),
        normalize=keys.flag("expert_weights_norm", family.normalized_experts),
        shared_intermediate_size=shared,
        layers=() if all(has_router) else has_router,
    )


def _with_gemma(config: ModelConfig, keys: Keys, family: Family) -> ModelConfig:
    largest = config.layers == family.layers_of_27b
    old = keys.architecture == "gemma2"  # the caps of Gemma 2 are on unless the file says otherwise
    return replace(
        config,
        activation="gelu_tanh",
        embedding_scale=math.sqrt(config.hidden_size),
        attention_scale=(config.hidden_size // config.heads) ** -0.5 if largest else None,
        attention_softcap=keys.number("attn_logit_softcapping", 50.0 if old else 0.0) or None,
        logit_softcap=keys.number("final_logit_softcapping", 30.0 if old else 0.0) or None,
    )


def _with_windows(config: ModelConfig, keys: Keys, family: Family) -> ModelConfig:
    window = keys.count("attention.sliding_window", family.default_window or 0, least=0)
    if window == 0:
        return config
    stored = keys.get("attention.sliding_window_pattern")
    if isinstance(stored, list) and len(stored) == config.layers:
        windowed = tuple(bool(flag) for flag in stored)
    else:
        period = keys.count("attention.sliding_window_pattern", family.window_period)
        windowed = tuple(period == 1 or layer % period < period - 1 for layer in range(config.layers))
    local_theta = None
    if keys.architecture == "gemma3":
        local_theta = keys.number("rope.freq_base_swa", 10000.0)
    elif keys.architecture == "olmo2" and config.rope_scaling is not None:
        local_theta = config.rope_theta  # its windowed layers turn without the scaling
    sliding = () if all(windowed) else windowed
    return replace(config, sliding_window=window, sliding_layers=sliding, local_rope_theta=local_theta)


def _with_rope(config: ModelConfig, file: GGUFFile, keys: Keys, family: Family) -> ModelConfig:
    rotary_dim = keys.count("rope.dimension_count", config.head_dim, least=0) or config.head_dim
    if rotary_dim > config.head_dim or rotary_dim % 2:
        raise CheckpointError(
            f"'{file.path}': the metadata key '{keys.architecture}.rope.dimension_count' is {rotary_dim}, and an even "
            f"number up to the head size {config.head_dim} is needed"
        )
    theta = keys.number("rope.freq_base", 10000.0)
    if theta <= 1.0:
        raise CheckpointError(
            f"'{file.path}': the metadata key '{keys.architecture}.rope.freq_base' is {theta:g}, and a number above 1 "
            "is needed"
        )
    rotates: tuple[bool, ...] = ()
    if family.nope_period:
        rotates = tuple((layer + 1) % family.nope_period != 0 for layer in range(config.layers))
    return replace(
        config,
        rope_theta=theta,
        rope_scaling=_rope_scaling(config, file, keys, rotary_dim),
        rotary_dim=0 if rotary_dim == config.head_dim else rotary_dim,
        rope_layers=rotates,
    )


def _rope_scaling(config: ModelConfig, file: GGUFFile, keys: Keys, rotary_dim: int) -> RopeScaling | None:
    kind = keys.get("rope.scaling.type") or "linear"
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise CheckpointError(
            f"'{file.path}': the rope scaling {str(kind)[:40]!r} is unknown: allowed are none, linear, yarn, longrope"
        )
    original = keys.count("rope.scaling.original_context_length", config.context_length, least=2)
    attention = keys.number("rope.scaling.attn_factor", 0.0) or None
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 0.0)) or 1.0
    long, short = (_factors(file, f"rope_factors_{name}.weight", rotary_dim) for name in ("long", "short"))
    if long and short:
        return RopeScaling("longrope", factor, original, 1.0, 4.0, 32.0, 1.0, attention, short, long)
    if factors := _factors(file, "rope_freqs.weight", rotary_dim):  # Llama 3: one divisor a frequency, at any length
        return RopeScaling(
            "longrope", factor, original, attention_factor=1.0, short_factor=factors, long_factor=factors
        )
    if kind == "yarn":
        # a file may say 0 for "as usual"; the logarithms of YaRN take no zero
        beta_fast, beta_slow = (keys.number(f"rope.scaling.yarn_beta_{end}", usual) or usual for end, usual in _BETAS)
        attention = keys.number("rope.scaling.yarn_attn_factor", 0.0) or attention
        return RopeScaling("yarn", factor, original, 1.0, 4.0, beta_fast, beta_slow, attention)
    return RopeScaling("linear", factor) if kind == "linear" and factor != 1.0 else None


_BETAS = (("fast", 32.0), ("slow", 1.0))


def _factors(file: GGUFFile, name: str, rotary_dim: int) -> tuple[float, ...]:
    entry = file.tensors.get(name)
    if entry is None:
        return ()
    if entry.kind != "F32" or entry.shape != (rotary_dim // 2,):
        raise CheckpointError(
            f"tensor '{name}' in '{file.path}' is {entry.kind} of shape {list(entry.shape)}, but the metadata asks for "
            f"F32 of shape {[rotary_dim // 2]}"
        )
    values = tuple(file.bytes_of(entry).clone().view(torch.float32).tolist())
    if not all(math.isfinite(value) and value > 0 for value in values):
        raise CheckpointError(f"tensor '{name}' in '{file.path}' holds a rope factor that is not a positive number")
    return values
