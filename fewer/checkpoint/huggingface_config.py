"""config.json of a Hugging Face folder to `ModelConfig`, for the model types of `FAMILIES`.

What a config leaves out gets the value that transformers gives it, since files of older versions rely on those.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fewer.checkpoint.huggingface_fields import Fields
from fewer.checkpoint.huggingface_rope import FULL, SLIDING, with_rope
from fewer.errors import CheckpointError
from fewer.model.config import ExpertsConfig, ModelConfig

MAX_LAYERS, MAX_EXPERTS = 4096, 4096
ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh", "gelu"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
Windows = Literal["none", "all", "late", "early-even", "even", "periodic", "unrotated"]


@dataclass(frozen=True)
class Family:
    """What a model type implies and its config does not say."""

    norm_placement: Literal["pre", "sandwich", "post"] = "pre"
    qk_norm: Literal["none", "head", "all"] = "none"
    gemma: bool = False  # embeddings scaled, norms stored as weight - 1
    windows: Windows = "none"  # the layers with a window where no `layer_types` names them
    opt_in_window: bool = False  # the window counts only where `use_sliding_window` is true
    lists_layers: bool = False  # the family heeds `layer_types`
    theta: float = 10000.0
    local_theta: float | None = None
    nope_interval: int = 0  # every layer of this many that comes last has no rotary embedding
    experts: Literal["", "mixtral", "qwen", "olmoe"] = ""  # how a mixture of experts is described
    shared_expert: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)  # settings that files leave out


_GEMMA = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
FAMILIES: dict[str, Family] = {
    "llama": Family(),  # also SmolLM 1 and 2
    "mistral": Family(windows="all"),
    "qwen2": Family(windows="late", opt_in_window=True, lists_layers=True, defaults={"qkv_bias": True}),
    "qwen3": Family(qk_norm="head", windows="late", opt_in_window=True, lists_layers=True, defaults={"head_dim": 128}),
    "gemma2": Family(
        norm_placement="sandwich",
        gemma=True,
        windows="even",
        lists_layers=True,
        defaults={**_GEMMA, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    ),
    "gemma3": Family(
        norm_placement="sandwich",
        qk_norm="head",
        gemma=True,
        windows="periodic",
        lists_layers=True,
        theta=1000000.0,
        local_theta=10000.0,
        defaults={**_GEMMA, "vocab_size": 262208, "max_position_embeddings": 131072},
    ),
    "smollm3": Family(
        windows="unrotated",
        opt_in_window=True,
        lists_layers=True,
        theta=2000000.0,
        nope_interval=4,
        defaults={"tie_word_embeddings": True},
    ),
    "phi3": Family(windows="all"),
    "olmo2": Family(norm_placement="post", qk_norm="all"),
    "mixtral": Family(windows="all", theta=1000000.0, experts="mixtral"),
    "qwen2_moe": Family(
        windows="early-even",
        opt_in_window=True,
        lists_layers=True,
        experts="qwen",
        shared_expert=True,
        defaults={"qkv_bias": True},
    ),
    "qwen3_moe": Family(qk_norm="head", windows="all", opt_in_window=True, experts="qwen"),
    "olmoe": Family(qk_norm="all", experts="olmoe"),
}
_INNER = {"gemma3": "text_config"}  # models of several parts: the object that describes the text decoder
_SAME = {"gemma3_text": "gemma3"}


def read_config(fields: Fields) -> ModelConfig:
    """The model that config.json describes; shapes are held against the tensors afterwards (`huggingface_names`).

    Raises CheckpointError for an unknown model type, and for a setting that is missing, ill-typed or absurd.
    """
    architecture = _architecture(fields)
    family = FAMILIES[architecture]
    if fields.get("quantization_config") is not None:
        raise CheckpointError(
            f"'{fields.path}' describes weights that another tool has quantised ('quantization_config'), which fewer "
            "cannot read: use the original checkpoint or a GGUF file of it"
        )
    inner = fields.inner(_INNER.get(architecture, "")) or fields
    fields = Fields(fields.path, inner.values, family.defaults)
    config = _shapes(fields, architecture, family)
    config = with_rope(config, fields, family.theta, family.local_theta)
    if family.gemma:
        config = _with_gemma(config, fields)
    if family.nope_interval:
        config = replace(config, rope_layers=_rotating_layers(config, fields, family))
    if family.experts:
        config = replace(config, experts=_experts(config, fields, family))
    return _with_windows(config, fields, family)


def _architecture(fields: Fields) -> str:
    name = fields.text("model_type")
    name = _SAME.get(name, name)
    if name not in FAMILIES:
        called = f"the architecture {name[:60]!r}" if name else "no 'model_type'"
        raise CheckpointError(f"'{fields.path}' has {called}: fewer reads folders of {', '.join(FAMILIES)}")
    return name


def _shapes(fields: Fields, architecture: str, family: Family) -> ModelConfig:
    hidden, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    kv_heads = fields.count("num_key_value_heads", heads)
    if heads % kv_heads:
        raise CheckpointError(f"'{fields.path}': {heads} heads cannot share {kv_heads} key-value heads evenly")
    if fields.get("head_dim") is None and hidden % heads:
        raise CheckpointError(f"'{fields.path}': a hidden size of {hidden} cannot be shared by {heads} heads evenly")
    attention_bias = fields.flag("attention_bias")
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.count("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.count("intermediate_size"),
        layers=fields.count("num_hidden_layers", most=MAX_LAYERS),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=fields.count("head_dim", hidden // heads),
        context_length=fields.count("max_position_embeddings"),
        norm_eps=fields.number("rms_norm_eps"),
        attention_bias=attention_bias or fields.flag("qkv_bias"),
        output_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias"),
        qk_norm=family.qk_norm,
        clip_qkv=fields.number_or_none("clip_qkv"),
        norm_placement=family.norm_placement,
        activation=_activation(fields, "hidden_activation" if family.gemma else "hidden_act"),
        tied_embeddings=fields.flag("tie_word_embeddings"),
        bos_token=_token(fields, "bos_token_id"),
        eos_tokens=_eos_tokens(fields),
    )


def _activation(fields: Fields, key: str) -> Literal["silu", "gelu_tanh", "gelu"]:
    name = fields.text(key, "silu")
    if name not in ACTIVATIONS:
        raise fields.fault(key, f"one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _token(fields: Fields, key: str) -> int | None:
    return None if fields.get(key) is None else fields.count(key, least=0)


def _eos_tokens(fields: Fields) -> tuple[int, ...]:
    if isinstance(fields.get("eos_token_id"), list):
        return fields.counts("eos_token_id")
    token = _token(fields, "eos_token_id")
    return () if token is None else (token,)


def _with_gemma(config: ModelConfig, fields: Fields) -> ModelConfig:
    if fields.flag("use_bidirectional_attention"):
        raise CheckpointError(f"'{fields.path}' describes an encoder ('use_bidirectional_attention'), not a decoder")
    scalar = fields.number("query_pre_attn_scalar")
    return replace(
        config,
        embedding_scale=math.sqrt(config.hidden_size),
        attention_scale=None if scalar == config.head_dim else scalar**-0.5,
        attention_softcap=fields.number_or_none("attn_logit_softcapping"),
        logit_softcap=fields.number_or_none("final_logit_softcapping"),
    )


def _rotating_layers(config: ModelConfig, fields: Fields, family: Family) -> tuple[bool, ...]:
    """SmolLM3: `no_rope_layers` holds 1 for a layer that rotates."""
    interval = fields.count("no_rope_layer_interval", family.nope_interval)
    flags = fields.counts("no_rope_layers") or tuple((layer + 1) % interval for layer in range(config.layers))
    if len(flags) != config.layers:
        raise fields.fault("no_rope_layers", f"a list of {config.layers} numbers, one a layer,")
    rotates = tuple(bool(flag) for flag in flags)
    return () if all(rotates) else rotates


def _experts(config: ModelConfig, fields: Fields, family: Family) -> ExpertsConfig:
    # transformers renames it now and then; whichever a file has
    named = ("num_local_experts", "num_experts")
    key = next((key for key in named if fields.get(key) is not None), named[family.experts != "mixtral"])
    count = fields.count(key, most=MAX_EXPERTS)
    qwen = family.experts == "qwen"
    sparse: tuple[bool, ...] = ()
    if qwen:
        step, dense = fields.count("decoder_sparse_step", 1), set(fields.counts("mlp_only_layers"))
        sparse = tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(config.layers))
    return ExpertsConfig(
        count=count,
        per_token=fields.count("num_experts_per_tok", most=count),
        intermediate_size=fields.count("moe_intermediate_size") if qwen else config.intermediate_size,
        normalize=family.experts == "mixtral" or fields.flag("norm_topk_prob"),
        shared_intermediate_size=fields.count("shared_expert_intermediate_size") if family.shared_expert else 0,
        layers=() if all(sparse) else sparse,
    )


def _with_windows(config: ModelConfig, fields: Fields, family: Family) -> ModelConfig:
    asked = family.windows != "none" and (not family.opt_in_window or fields.flag("use_sliding_window"))
    two_rotations = config.local_rope_theta is not None  # then windowed layers differ, however wide the window
    window = fields.count("sliding_window", 0, least=int(two_rotations)) if asked else 0
    windowed = _windowed_layers(config, fields, family)
    if window == 0 or not any(windowed) or (window >= config.context_length and not two_rotations):
        return config
    return replace(config, sliding_window=window, sliding_layers=() if all(windowed) else windowed)


def _windowed_layers(config: ModelConfig, fields: Fields, family: Family) -> tuple[bool, ...]:
    layers, kinds = range(config.layers), (FULL, SLIDING)
    listed = fields.get("layer_types") if family.lists_layers else None
    if listed is not None:
        if not isinstance(listed, list) or len(listed) != config.layers or any(kind not in kinds for kind in listed):
            raise fields.fault("layer_types", f"a list of {config.layers} entries, each {FULL} or {SLIDING},")
        return tuple(kind == SLIDING for kind in listed)
    if family.windows == "late":
        first = fields.count("max_window_layers", config.layers, least=0)
        return tuple(layer >= first for layer in layers)
    if family.windows == "early-even":
        stop = fields.count("max_window_layers", config.layers, least=0)
        return tuple(layer % 2 == 0 and layer < stop for layer in layers)
    if family.windows == "even":
        return tuple(layer % 2 == 0 for layer in layers)
    if family.windows == "periodic":
        period = fields.count("sliding_window_pattern", fields.count("_sliding_window_pattern", 6))
        return tuple((layer + 1) % period != 0 for layer in layers)
    if family.windows == "unrotated":
        return tuple(not config.has_rope(layer) for layer in layers)
    return tuple(family.windows == "all" for _ in layers)
