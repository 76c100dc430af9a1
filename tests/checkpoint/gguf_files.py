"""GGUF files for tests: a tiny transformers model in the layout of llama.cpp's converter.

`write_gguf` names tensors with the gguf package's own table and permutes, shifts and stacks as the converter does for
each architecture, so that what reads it is held against llama.cpp's layout.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy
import torch
from safetensors.torch import load_file
from torch import Tensor

# transformers' model type -> llama.cpp's architecture
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "smollm3": gguf.MODEL_ARCH.SMOLLM3,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "olmo2": gguf.MODEL_ARCH.OLMO2,
    "qwen2_moe": gguf.MODEL_ARCH.QWEN2MOE,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "olmoe": gguf.MODEL_ARCH.OLMOE,
}
PAIRED = ("llama", "mistral", "mixtral", "smollm3")  # the converter interleaves rotary rows of these


Experts = Literal["stacked", "fused", "separate"]


def write_gguf(model: Any, folder: Path, path: Path, kind: str = "F32", experts: Experts = "stacked") -> None:
    """Save `model` to `folder` as transformers does, and convert that to `path`.

    `kind` is a storage type that the gguf package can quantise to; only matrices take it. Experts lie as the converter
    stacks them, with gate and up in one tensor (its option), or one by one (as in files of early 2024).
    """
    model.save_pretrained(folder)
    config, tensors = model.config, load_file(folder / "model.safetensors")
    architecture = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    _add_metadata(writer, config)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    converted: dict[str, Tensor] = {}
    for name, tensor in _stacked(tensors).items():
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert target is not None, name
        converted[target] = _converted(config, name, tensor)
    for target, tensor in _placed(converted, experts).items():
        _add_tensor(writer, target, tensor, kind)
    for target, values in _rope_tensors(config).items():
        _add_tensor(writer, target, torch.tensor(values), "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tensor(writer: gguf.GGUFWriter, name: str, tensor: Tensor, kind: str) -> None:
    values = numpy.ascontiguousarray(tensor.numpy(), dtype=numpy.float32)
    number = gguf.GGMLQuantizationType[kind if tensor.dim() > 1 and "gate_inp" not in name else "F32"]
    writer.add_tensor(name, gguf.quantize(values, number), raw_dtype=number)


def _stacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The experts of a layer as one tensor [E, N, K], under the name that gguf's table knows."""
    stacked: dict[str, Tensor] = {}
    experts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        parts = re.fullmatch(
            r"(?:model\.)?(layers\.\d+\.)(?:mlp|block_sparse_moe)(\.experts\.)(\d+)\.(\w+)\.weight", name
        )
        if parts is None:
            stacked[name] = tensor
            continue
        layer, middle, number, part = parts.groups()
        block = f"{layer}feed_forward" if part in ("w1", "w2", "w3") else f"model.{layer}mlp"
        experts.setdefault(f"{block}{middle}{part}.weight", {})[int(number)] = tensor
    for name, members in experts.items():
        stacked[name] = torch.stack([members[number] for number in range(len(members))])
    return stacked


def _placed(tensors: dict[str, Tensor], experts: Experts) -> dict[str, Tensor]:
    """The experts where `experts` says; everything else as it is."""
    placed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if "_exps." not in name or experts == "stacked":
            placed[name] = tensor
        elif experts == "separate":
            placed |= {name.replace("_exps.", f".{number}."): one for number, one in enumerate(tensor)}
        elif "ffn_gate_exps" in name:
            both = torch.cat((tensor, tensors[name.replace("gate", "up")]), dim=1)  # [E, 2N, K]
            placed[name.replace("gate", "gate_up")] = both
        elif "ffn_up_exps" not in name:
            placed[name] = tensor
    return placed


def _converted(config: Any, name: str, tensor: Tensor) -> Tensor:
    if config.model_type.startswith("gemma") and name.endswith("norm.weight"):
        return tensor + 1
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    projection = name.split(".")[-2]
    if config.model_type in PAIRED and projection in heads:
        halves = tensor.unflatten(0, (heads[projection], 2, -1))  # [H, 2, D/2, ...]
        return halves.transpose(1, 2).reshape(tensor.shape)
    return tensor


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _add_metadata(writer: gguf.GGUFWriter, config: Any) -> None:
    kind = config.model_type
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    if getattr(config, "head_dim", None) is not None and kind != "phi3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if kind in PAIRED:
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(_head_dim(config))
    if kind == "gemma2":  # its converter writes no base: 10,000 is llama.cpp's default
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if kind in ("gemma2", "gemma3_text", "phi3"):
        writer.add_sliding_window(config.sliding_window or 0)
    if kind != "gemma2":
        _add_rope(writer, config)
    if (experts := getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)) is not None:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if kind in ("qwen2_moe", "qwen3_moe"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if kind == "qwen2_moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


def _add_rope(writer: gguf.GGUFWriter, config: Any) -> None:
    settings = config.rope_parameters
    if "sliding_attention" in settings:
        writer.add_rope_freq_base_swa(settings["sliding_attention"]["rope_theta"])
    settings = settings.get("full_attention", settings)
    writer.add_rope_freq_base(settings["rope_theta"])
    if config.model_type == "phi3":
        turned = settings.get("partial_rotary_factor", 1.0) * config.hidden_size
        writer.add_rope_dimension_count(int(turned) // config.num_attention_heads)
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        if "long_factor" in settings:
            stretch = config.max_position_embeddings / config.original_max_position_embeddings
            longer = math.log(stretch) / math.log(config.original_max_position_embeddings)
            writer.add_rope_scaling_attn_factors(math.sqrt(1 + longer) if stretch > 1 else 1.0)
    elif settings["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(settings["factor"])
    elif settings["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(settings["factor"])
        writer.add_rope_scaling_orig_ctx_len(settings["original_max_position_embeddings"])
        if settings.get("attention_factor") is not None:
            writer.add_rope_scaling_yarn_attn_factor(settings["attention_factor"])
        if settings.get("beta_fast") is not None:
            writer.add_rope_scaling_yarn_beta_fast(settings["beta_fast"])
        if settings.get("beta_slow") is not None:
            writer.add_rope_scaling_yarn_beta_slow(settings["beta_slow"])


def _rope_tensors(config: Any) -> dict[str, list[float]]:
    """What the converter stores as tensors: Phi-3's factors, and the divisors of Llama 3's frequencies."""
    settings = config.rope_parameters
    if settings.get("rope_type") == "longrope":
        return {f"rope_factors_{length}.weight": settings[f"{length}_factor"] for length in ("long", "short")}
    if settings.get("rope_type") != "llama3":
        return {}
    dim, low, high = _head_dim(config), settings["low_freq_factor"], settings["high_freq_factor"]
    divisors = []
    for channel in range(0, dim, 2):
        turns = settings["original_max_position_embeddings"] / (2 * math.pi * settings["rope_theta"] ** (channel / dim))
        share = min(max((turns - low) / (high - low), 0.0), 1.0)  # 1: a fast frequency, which stays
        divisors.append(1 / ((1 - share) / settings["factor"] + share))
    return {"rope_freqs.weight": divisors}
