"""One tiny random model a family, made by transformers: what the loaders and the network are held against.

`FAMILIES` is the table: a model type of transformers and the settings that differ from `SIZES`. Adding a family is one
entry. Every column count is a multiple of 32, so that the same models fit the blocks of GGUF.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VOCABULARY = 96
WINDOW = 16  # of families with sliding windows: shorter than the prompts of the tests
CONTEXT = 256

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
GEMMA2 = {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "sliding_window": WINDOW,
    "attn_logit_softcapping": 3.0,  # low enough to bend scores of this size
    "final_logit_softcapping": 8.0,
    "tie_word_embeddings": True,
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.05, 1.1, 1.2, 1.3, 1.4],
    "long_factor": [1.0, 1.5, 2.0, 4.0, 8.0, 12.0],
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2}

# name -> (model type, settings beside SIZES)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("llama", {"num_key_value_heads": 4}),
    "llama3": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "llama-dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}}),
    "llama-yarn": ("llama", {"rope_parameters": YARN_ROPE}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": WINDOW, "head_dim": 32}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-windowed": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "gemma2": ("gemma2", {**GEMMA2, "query_pre_attn_scalar": 16}),
    "gemma2-scaled": ("gemma2", {**GEMMA2, "query_pre_attn_scalar": 24}),  # not the head size, as in the 27B
    "gemma3": (
        "gemma3_text",
        {
            "num_hidden_layers": 7,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": WINDOW,
            "rope_parameters": GEMMA3_ROPE,
            "tie_word_embeddings": True,
        },
    ),
    "smollm2": (
        "llama",
        {
            "hidden_size": 96,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
            "tie_word_embeddings": True,
        },
    ),
    "smollm3": ("smollm3", {"num_hidden_layers": 5, "tie_word_embeddings": True}),
    "phi3": ("phi3", {"sliding_window": WINDOW}),
    # the long factors hold beyond the original context; the engine chooses by the model's context, once
    "phi3-longrope": ("phi3", {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 24}),
    "phi3-shortrope": ("phi3", {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": CONTEXT}),
    "olmo2": ("olmo2", {}),
    "mixtral": ("mixtral", {"num_local_experts": 6, "num_experts_per_tok": 2}),
    "qwen2-moe": (
        "qwen2_moe",
        {
            **EXPERTS,
            "num_hidden_layers": 4,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 64,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "norm_topk_prob": False,
        },
    ),
    "qwen2-moe-all": ("qwen2_moe", {**EXPERTS, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64}),
    "qwen3-moe": ("qwen3_moe", {**EXPERTS, "head_dim": 32, "moe_intermediate_size": 32, "norm_topk_prob": True}),
    "olmoe": ("olmoe", {**EXPERTS, "clip_qkv": 1.5, "norm_topk_prob": False}),
}


def tiny_models(name: str, **changes: Any) -> tuple[Any, Any]:
    """(transformers config, model in float32, eval mode) of a family, with `changes` to its settings.

    The same weights for every call. Norms, biases and caps are far from neutral, so that leaving one out shows.
    """
    import transformers

    model_type, settings = FAMILIES[name]
    config = transformers.AutoConfig.for_model(model_type, **{**SIZES, **settings, **changes})
    config._attn_implementation = "eager"  # the plain formula, and the only one with Gemma 2's soft-cap
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            zero = 1.0 if "gemma" in model_type and "norm" in key else 0.0  # Gemma multiplies by 1 + weight
            spread = 0.25 if config.tie_word_embeddings else 1.0  # of embeddings, which may be the head as well
            parameter.copy_(_random(key, parameter, generator, spread) - zero)
    return config, model


def write_tiny_model(name: str, folder: Path, **changes: Any) -> Any:
    """Save a family's model as transformers does (config.json, model.safetensors); returns the model."""
    _, model = tiny_models(name, **changes)
    model.save_pretrained(folder)
    return model


def reference_logits(model: Any, tokens: list[list[int]]) -> Tensor:
    """What transformers computes for whole rows of equal length: [B, T, V] float32, without a cache."""
    with torch.no_grad():
        logits: Tensor = model(torch.tensor(tokens), use_cache=False).logits
    return logits.float()


def _random(key: str, like: Tensor, generator: torch.Generator, embedding_spread: float) -> Tensor:
    noise = torch.randn(like.shape, generator=generator)
    if "norm" in key:
        return 1 + 0.3 * noise
    if key.endswith(".bias"):
        return 0.5 * noise
    if "embed_tokens" in key:
        return embedding_spread * noise
    return 1.5 * noise / like.shape[-1] ** 0.5
