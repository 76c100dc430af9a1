"""config.json as it was and is written: both forms of the rotary settings, and the configs of published models."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from fewer.checkpoint.huggingface_config import FAMILIES, read_config
from fewer.checkpoint.huggingface_fields import Fields
from fewer.errors import CheckpointError
from fewer.model.config import ExpertsConfig, ModelConfig, RopeScaling
from fewer.model.rope import Rotary
from tests.model import families

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}


def config_of(model_type: str, **values: Any) -> ModelConfig:
    return read_config(Fields(Path("config.json"), {**SIZES, "model_type": model_type, **values}))


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
FACTORS = {"short_factor": [1.0] * 6, "long_factor": [2.0] * 6}

# model type, the older form, the form of transformers 5
ROPES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": (
        "llama",
        {"rope_theta": 500000.0, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    ),
    "linear": (
        "llama",
        {"rope_theta": 20000, "rope_scaling": {"type": "linear", "factor": 2}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 20000.0, "factor": 2.0}},
    ),
    "dynamic": (
        "llama",
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "llama3": (
        "llama",
        {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}},
    ),
    "yarn": (
        "qwen2",
        {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "rope_theta": 2e6,
            "rope_local_base_freq": 5000.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 2e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
            }
        },
    ),
    "longrope": (
        "phi3",
        {
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 64,
            "rope_scaling": {"type": "longrope", **FACTORS},
        },
        {
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
                "original_max_position_embeddings": 64,
                **FACTORS,
            },
        },
    ),
}


@pytest.mark.parametrize("case", ROPES)
def test_old_and_new_rope_settings_mean_the_same(case: str) -> None:
    model_type, old, new = ROPES[case]
    assert config_of(model_type, **old) == config_of(model_type, **new)


@pytest.mark.parametrize("case", ROPES)
def test_old_rope_settings_turn_as_transformers_does(case: str) -> None:
    import transformers

    model_type, old, _ = ROPES[case]
    config = config_of(model_type, **old)
    settings = copy.deepcopy(
        {**SIZES, "head_dim": config.head_dim, "pad_token_id": None, **old}
    )  # transformers writes into them
    theirs = transformers.AutoConfig.for_model(model_type, **settings)
    ours = Rotary(
        config.rotary_dim or config.head_dim,
        config.head_dim,
        config.rope_theta,
        config.context_length,
        config.rope_scaling,
    )
    rotary = transformers.AutoModel.from_config(theirs).rotary_emb
    positions = torch.arange(200)[None]  # beyond the original context of those that have one
    kinds = ["full_attention"] if model_type == "gemma3_text" else []
    cosine, sine = rotary(torch.zeros(1, 200, 1), positions, *kinds)
    factors = ours.factors(positions)
    half = factors.shape[-1]
    torch.testing.assert_close(factors.real, cosine[..., :half], atol=1e-4, rtol=0)
    torch.testing.assert_close(factors.imag, sine[..., :half], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["su", "yarn"])
def test_early_names_of_longrope_are_known(name: str) -> None:
    """Phi-3's first files; transformers 5 knows them too, but refuses them for a key that they keep elsewhere."""
    _, old, _ = ROPES["longrope"]
    assert config_of("phi3", **old) == config_of("phi3", **{**old, "rope_scaling": {"type": name, **FACTORS}})


def test_yarn_heeds_truncate_and_mscale() -> None:
    import transformers

    settings = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    settings |= {"truncate": False, "mscale": 1.0, "mscale_all_dim": 0.5, "beta_fast": 16.0, "beta_slow": 2.0}
    config = config_of("llama", rope_parameters=settings)
    theirs = transformers.AutoConfig.for_model("llama", **{**SIZES, "rope_parameters": dict(settings)})
    rotary = transformers.AutoModel.from_config(theirs).rotary_emb
    ours = Rotary(16, 16, config.rope_theta, config.context_length, config.rope_scaling)
    torch.testing.assert_close(ours.frequencies.float(), rotary.inv_freq, rtol=1e-5, atol=0)
    assert ours.magnitude == pytest.approx(rotary.attention_scaling)
    truncated = config_of("llama", rope_parameters=settings | {"truncate": True})
    assert not torch.equal(ours.frequencies, Rotary(16, 16, 1e4, 256, truncated.rope_scaling).frequencies)


def test_dynamic_scaling_stretches_a_longer_context_as_transformers_does() -> None:
    import transformers

    settings = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    theirs = transformers.AutoConfig.for_model("llama", **{**SIZES, "rope_parameters": dict(settings)})
    rotary = transformers.AutoModel.from_config(theirs).rotary_emb
    scaling = config_of("llama", rope_parameters=settings).rope_scaling
    rotary(torch.zeros(1, 1, 1), torch.tensor([[1023]]))  # it recomputes its frequencies for 1,024 tokens
    ours = Rotary(16, 16, 10000.0, 1024, scaling)
    torch.testing.assert_close(ours.frequencies.float(), rotary.inv_freq, rtol=1e-5, atol=0)


# Excerpts of published config.json files, and what they must come to.
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Mistral 7B v0.1": (
        {"model_type": "mistral", "sliding_window": 4096, "max_position_embeddings": 32768, "num_key_value_heads": 2},
        {"sliding_window": 4096, "sliding_layers": (), "kv_heads": 2, "tied_embeddings": False},
    ),
    "Mistral 7B v0.2": ({"model_type": "mistral", "sliding_window": None}, {"sliding_window": None}),
    "Qwen2.5 0.5B": (
        {
            "model_type": "qwen2",
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "sliding_window": 128,
            "max_window_layers": 2,
        },
        {"attention_bias": True, "output_bias": False, "sliding_window": None, "tied_embeddings": True},
    ),
    "Qwen2 with windows": (
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 128, "max_window_layers": 4},
        {"sliding_window": 128, "sliding_layers": (False, False, False, False, True, True)},
    ),
    "Qwen3 8B": (
        {"model_type": "qwen3", "head_dim": 128, "attention_bias": False, "use_sliding_window": False},
        {"head_dim": 128, "qk_norm": "head", "attention_bias": False, "sliding_window": None},
    ),
    "Gemma 2 9B": (
        {"model_type": "gemma2", "hidden_act": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "sliding_window": 64},
        {
            "sliding_layers": (True, False, True, False, True, False),
            "head_dim": 256,
            "attention_scale": None,
            "attention_softcap": 50.0,
            "logit_softcap": 30.0,
            "embedding_scale": 8.0,
            "activation": "gelu_tanh",
            "tied_embeddings": True,
        },
    ),
    "Gemma 3 4B": (  # its text_config leaves out whatever equals the class
        {
            "model_type": "gemma3",
            "vision_config": {"hidden_size": 1152},
            "text_config": {
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "model_type": "gemma3_text",
                "num_hidden_layers": 6,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
        },
        {
            "heads": 8,
            "kv_heads": 4,
            "head_dim": 256,
            "vocab_size": 262208,
            "context_length": 131072,
            "rope_theta": 1e6,
            "local_rope_theta": 1e4,
            "rope_scaling": RopeScaling("linear", 8.0),
            "sliding_window": 1024,
            "sliding_layers": (True, True, True, True, True, False),
            "logit_softcap": None,
        },
    ),
    "Gemma 3 with a shorter pattern": (
        {"model_type": "gemma3_text", "sliding_window_pattern": 3, "sliding_window": 512},
        {"sliding_window": 512, "sliding_layers": (True, True, False, True, True, False), "context_length": 256},
    ),
    "SmolLM3": (
        {"model_type": "smollm3", "no_rope_layer_interval": 3, "use_sliding_window": False},
        {"rope_layers": (True, True, False, True, True, False), "rope_theta": 2e6, "tied_embeddings": True},
    ),
    "Phi-3 mini 4k": (
        {"model_type": "phi3", "sliding_window": 2047, "max_position_embeddings": 4096, "attention_bias": False},
        {"sliding_window": 2047, "rotary_dim": 0, "rope_scaling": None},
    ),
    "Phi-3 mini 128k": (  # a window that never closes is none
        {"model_type": "phi3", "sliding_window": 262144, "max_position_embeddings": 131072},
        {"sliding_window": None},
    ),
    "OLMo-2": (
        {"model_type": "olmo2", "rope_theta": 500000},
        {"qk_norm": "all", "norm_placement": "post", "rope_theta": 500000.0},
    ),
    "Mixtral": (
        {"model_type": "mixtral", "num_local_experts": 8, "num_experts": None, "sliding_window": None},
        {"experts": ExpertsConfig(8, 2, 96, normalize=True), "rope_theta": 1e6},
    ),
    "Qwen1.5-MoE": (
        {"model_type": "qwen2_moe", "decoder_sparse_step": 2, "mlp_only_layers": [5], "norm_topk_prob": False},
        {
            "experts": ExpertsConfig(4, 2, 32, False, 32, (False, True, False, True, False, False)),
            "attention_bias": True,
        },
    ),
    "Qwen3-MoE": (
        {"model_type": "qwen3_moe", "norm_topk_prob": True, "mlp_only_layers": []},
        {"experts": ExpertsConfig(4, 2, 32, normalize=True), "qk_norm": "head"},
    ),
    "OLMoE": (
        {"model_type": "olmoe", "clip_qkv": None, "norm_topk_prob": False, "attention_bias": False},
        {"experts": ExpertsConfig(4, 2, 96, normalize=False), "clip_qkv": None, "qk_norm": "all"},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_read(name: str) -> None:
    values, expected = PUBLISHED[name]
    config = config_of(**values)
    assert {key: getattr(config, key) for key in expected} == expected


JSON = some.recursive(
    some.none() | some.booleans() | some.integers() | some.floats() | some.text(max_size=20),
    lambda inner: some.lists(inner, max_size=6) | some.dictionaries(some.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
WHOLE: dict[str, Any] = {  # a setting of every kind that some family reads
    **SIZES,
    "layer_types": ["full_attention"] * 6,
    "rope_parameters": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
    "use_sliding_window": True,
    "sliding_window": 64,
    "max_window_layers": 3,
    "no_rope_layers": [1] * 6,
    "mlp_only_layers": [1],
    "decoder_sparse_step": 1,
    "query_pre_attn_scalar": 16,
    "eos_token_id": [2, 3],
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "clip_qkv": 1.0,
    "model_type": "llama",
}


def changed(key: str) -> some.SearchStrategy[tuple[str, Any]]:
    """Another value for a setting, or the same with one entry changed."""
    value = WHOLE[key]
    other = JSON
    if isinstance(value, list):
        other |= JSON.map(lambda entry: [*value[:-1], entry])
    if isinstance(value, dict):
        other |= some.tuples(some.sampled_from(list(value)), JSON).map(lambda entry: {**value, entry[0]: entry[1]})
    return other.map(lambda new: (key, new))


@settings(max_examples=300, deadline=None)
@given(some.sampled_from(list(FAMILIES)), some.lists(some.sampled_from(list(WHOLE)).flatmap(changed), max_size=3))
def test_a_config_is_read_or_refused_in_one_sentence(model_type: str, changes: list[tuple[str, Any]]) -> None:
    try:
        read_config(Fields(Path("config.json"), {**WHOLE, "model_type": model_type, **dict(changes)}))
    except CheckpointError as fault:
        assert "\n" not in str(fault) and len(str(fault)) < 500


def test_every_family_of_the_table_is_tested_against_transformers() -> None:
    tested = {model_type.removesuffix("_text") for model_type, _ in families.FAMILIES.values()}
    assert tested == set(FAMILIES)


def test_what_transformers_leaves_out_has_its_default() -> None:
    """A config with only what a class cannot know equals the one that transformers fills in and writes."""
    import transformers

    for model_type in ("llama", "mistral", "qwen2", "gemma2", "smollm3", "phi3", "olmo2", "qwen2_moe", "olmoe"):
        bare = {**SIZES, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
        written = json.loads(transformers.AutoConfig.for_model(model_type, **bare).to_json_string(use_diff=False))
        assert config_of(model_type, **bare) == read_config(Fields(Path("config.json"), written)), model_type


@pytest.mark.parametrize(
    ("model_type", "changes", "named"),
    [
        ("gemma3_text", {"layer_types": ["sliding_attention"]}, "'layer_types'"),
        ("gemma3_text", {"layer_types": ["chunked_attention"] * 6}, "'layer_types'"),
        ("gemma3_text", {"layer_types": [["full_attention"]] * 6}, "'layer_types'"),
        ("gemma3_text", {"sliding_window": 0}, "'sliding_window' is '0'"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (
            "gemma3_text",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "windowed layers",
        ),
        ("gemma2", {"query_pre_attn_scalar": 0}, "'query_pre_attn_scalar' is '0'"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "'no_rope_layers'"),
        ("phi3", {"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0] * 8}}, "'short_factor'"),
        ("mixtral", {"num_experts": None}, "'num_local_experts' is missing"),
        ("qwen3_moe", {"num_experts": None}, "'num_experts' is missing"),
        ("qwen3_moe", {"num_experts_per_tok": 5}, "'num_experts_per_tok' is '5'"),
        ("qwen3_moe", {"num_experts": 10**9}, "'num_experts' is '1000000000'"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "'decoder_sparse_step' is '0'"),
        ("qwen3_moe", {"mlp_only_layers": "all"}, "'mlp_only_layers' is 'all'"),
        ("llama", {"num_attention_heads": 5, "num_key_value_heads": 5}, "64"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}},
            "'high_freq_factor' is '1.0'",
        ),
        ("llama", {"rms_norm_eps": math.nan}, "'rms_norm_eps' is 'nan'"),
        ("llama", {"rope_theta": 10**400}, "'rope_theta'"),
    ],
)
def test_a_setting_that_cannot_be_is_named(model_type: str, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError) as fault:
        config_of(model_type, **changes)
    assert named in str(fault.value) and "\n" not in str(fault.value)
