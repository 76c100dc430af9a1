"""Folders in Hugging Face layout: shards, fused and stacked tensors, and folders that are refused in one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from fewer.checkpoint.huggingface import HuggingFaceCheckpoint
from fewer.checkpoint.huggingface_files import INDEX
from fewer.checkpoint.open import open_checkpoint
from fewer.errors import CheckpointError
from tests.model.families import tiny_models, write_tiny_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders that transformers wrote; tests that change one take a copy."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("llama3", "gemma3", "phi3", "mixtral", "qwen3-moe")}
    for name, folder in folders.items():
        write_tiny_model(name, folder)
    folders["shards"] = tmp_path_factory.mktemp("shards")
    tiny_models("llama3")[1].save_pretrained(folders["shards"], max_shard_size="40KB")
    return folders


@pytest.fixture
def llama(saved: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved["llama3"], tmp_path / "llama"))


@pytest.fixture
def shards(saved: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved["shards"], tmp_path / "shards"))


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; a key set to `...` is removed."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder / "model.safetensors"
    save_file(edit({name: tensor.clone() for name, tensor in load_file(path).items()}), path)


def assert_same_tensors(first: HuggingFaceCheckpoint, second: HuggingFaceCheckpoint) -> None:
    assert first.names() == second.names()
    for name in first.names():
        assert torch.equal(first[name].dense(), second[name].dense()), name


def test_shards_hold_the_same_model_as_one_file(saved: dict[str, Path]) -> None:
    assert len(list(saved["shards"].glob("*.safetensors"))) > 2
    one, several = HuggingFaceCheckpoint(saved["llama3"]), HuggingFaceCheckpoint(saved["shards"])
    assert one.config == several.config
    assert_same_tensors(one, several)


def test_tensors_are_read_only_when_asked_for(shards: Path) -> None:
    checkpoint = HuggingFaceCheckpoint(shards)
    place = json.loads((shards / INDEX).read_text())["weight_map"]["model.norm.weight"]
    (shards / place).unlink()  # opened so far: the headers
    assert checkpoint["norm.weight"].shape == (64,)
    with pytest.raises(CheckpointError, match="norm.weight"):
        checkpoint["norm.weight"].dense()


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_stacked_experts_equal_separate_ones(name: str, saved: dict[str, Path], tmp_path: Path) -> None:
    """transformers holds the experts of a layer as [E, N, K], and versions of it have written them so."""
    folder = Path(shutil.copytree(saved[name], tmp_path / "stacked"))
    stacked = tiny_models(name)[1].state_dict()
    assert any(key.endswith("mlp.experts.gate_up_proj") for key in stacked)
    save_file(dict(stacked), folder / "model.safetensors")
    assert_same_tensors(HuggingFaceCheckpoint(folder), HuggingFaceCheckpoint(saved[name]))


def test_the_text_decoder_of_a_model_with_images_is_found(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved["gemma3"], tmp_path / "whole"))
    decoder = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": decoder}))
    edit_tensors(
        folder,
        lambda tensors: (
            {f"language_model.{name}": tensor for name, tensor in tensors.items()}
            | {"vision_tower.embeddings.weight": torch.zeros(3)}
        ),
    )
    assert_same_tensors(HuggingFaceCheckpoint(folder), HuggingFaceCheckpoint(saved["gemma3"]))


def test_half_precision_is_kept_and_counted(llama: Path) -> None:
    edit_tensors(llama, lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()})
    stored = HuggingFaceCheckpoint(llama)["layers.0.feed_forward.down.weight"]
    assert (stored.kind, stored.nbytes) == ("BF16", 2 * 64 * 96)
    assert stored.dense(torch.bfloat16).dtype == torch.bfloat16


def test_the_fingerprint_follows_headers_and_config(llama: Path, saved: dict[str, Path]) -> None:
    before = HuggingFaceCheckpoint(llama).fingerprint()
    assert before == HuggingFaceCheckpoint(saved["llama3"]).fingerprint()
    edit_json(llama / "config.json", rms_norm_eps=1e-4)
    assert HuggingFaceCheckpoint(llama).fingerprint() != before


def test_a_name_that_is_not_there_is_refused(llama: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tensor 'layers\.9\.attention\.q\.weight'"):
        HuggingFaceCheckpoint(llama)["layers.9.attention.q.weight"]


def test_the_tokenizer_lies_beside_the_weights(llama: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        HuggingFaceCheckpoint(llama).tokenizer()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.save(str(llama / "tokenizer.json"))
    tokenizer = HuggingFaceCheckpoint(llama).tokenizer()
    assert tokenizer.eos_tokens == {2}  # from config.json
    assert tokenizer.decode(tokenizer.encode("Grüße aus Köln")) == "Grüße aus Köln"


def refusal(folder: Path) -> str:
    """The sentence with which a folder is refused."""
    with pytest.raises(CheckpointError) as fault:
        open_checkpoint(folder)
    sentence = str(fault.value)
    assert sentence and "\n" not in sentence and len(sentence) < 600
    return sentence


# changes to a Llama's config.json, and what the refusal names
CONFIGS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown architecture": ({"model_type": "mamba"}, ["'mamba'", "llama, mistral, qwen2"]),
    "no architecture": ({"model_type": ...}, ["model_type", "llama, mistral, qwen2"]),
    "architecture of another type": ({"model_type": 7}, ["'model_type' is '7'", "text"]),
    "missing size": ({"hidden_size": ...}, ["'hidden_size' is missing"]),
    "size as text": ({"hidden_size": "64"}, ["'hidden_size' is '64'", "whole number"]),
    "size as flag": ({"num_hidden_layers": True}, ["'num_hidden_layers' is 'True'"]),
    "negative size": ({"vocab_size": -1}, ["'vocab_size' is '-1'"]),
    "zero heads": ({"num_attention_heads": 0}, ["'num_attention_heads' is '0'"]),
    "absurd depth": ({"num_hidden_layers": 10**12}, ["'num_hidden_layers' is '1000000000000'"]),
    "more layers than tensors": ({"num_hidden_layers": 4000}, ["claims 4000 layers", "30 tensors"]),
    "uneven groups": ({"num_key_value_heads": 3}, ["4 heads", "3 key-value heads"]),
    "epsilon of another type": ({"rms_norm_eps": [1e-5]}, ["'rms_norm_eps'", "number"]),
    "activation": ({"hidden_act": "relu2"}, ["'hidden_act' is 'relu2'", "silu"]),
    "rope kind": ({"rope_parameters": {"rope_type": "spiral"}}, ["'spiral'", "linear", "llama3", "yarn"]),
    "rope of another type": ({"rope_parameters": 3}, ["'rope_parameters' is '3'", "object"]),
    "rope without its factor": ({"rope_parameters": {"rope_type": "linear"}}, ["'factor' is missing"]),
    "infinite rope factor": (
        {"rope_parameters": {"rope_type": "linear", "factor": float("inf")}},
        ["'factor' is 'inf'"],
    ),
    "base of one": ({"rope_parameters": {"rope_theta": 1}}, ["'rope_theta' is '1'", "above 1"]),
    "odd rotation": ({"partial_rotary_factor": 0.2}, ["0.2", "head size of 16"]),
    "tied as text": ({"tie_word_embeddings": "no"}, ["'tie_word_embeddings' is 'no'", "true or false"]),
    "end token": ({"eos_token_id": [2, "</s>"]}, ["'eos_token_id'", "whole numbers"]),
    "quantised by others": ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config", "GGUF"]),
    "another width": ({"hidden_size": 128, "head_dim": 16}, ["'model.embed_tokens.weight'", "[96, 64]", "[96, 128]"]),
    "another inner width": (
        {"intermediate_size": 128},
        ["'model.layers.0.mlp.gate_proj.weight'", "[96, 64]", "[128, 64]"],
    ),
    "too few layers": ({"num_hidden_layers": 2}, ["'model.layers.2.", "no place"]),
    "too many layers": ({"num_hidden_layers": 4}, ["lacks the tensor 'model.layers.3."]),
    "biases that are not there": ({"mlp_bias": True}, ["lacks the tensor 'model.layers.0.mlp.gate_proj.bias'", "[96]"]),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_cannot_be_is_refused(case: str, llama: Path) -> None:
    changes, named = CONFIGS[case]
    edit_json(llama / "config.json", **changes)
    sentence = refusal(llama)
    assert all(part in sentence for part in named), sentence


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '{"a": ' * 5000, "\x00\xff", '{"vocab_size": ' + "9" * 5000 + "}"])
def test_a_config_that_is_no_object_is_refused(text: str, llama: Path) -> None:
    (llama / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json" in refusal(llama)


def test_pickled_weights_are_refused(llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    assert "pytorch_model.bin" in refusal(llama)
    assert "safetensors or GGUF" in refusal(llama)


def test_a_folder_without_weights_is_refused(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    assert "no .safetensors file" in refusal(llama)


def test_files_without_an_index_are_refused(shards: Path) -> None:
    (shards / INDEX).unlink()
    assert INDEX in refusal(shards)


def test_a_missing_shard_is_named(shards: Path) -> None:
    first = sorted(shards.glob("*.safetensors"))[0]
    first.unlink()
    assert f"lacks the file '{first.name}'" in refusal(shards)


@pytest.mark.parametrize(
    "place", ["../out.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "x.bin", "a\\b", "a\nb"]
)
def test_an_index_that_leaves_the_folder_is_refused(place: str, shards: Path) -> None:
    index = json.loads((shards / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = place
    (shards / INDEX).write_text(json.dumps(index))
    assert f"names the file {place!r}" in refusal(shards)


@pytest.mark.parametrize("places", [None, {}, [], {"model.norm.weight": 3}])
def test_an_index_without_places_is_refused(places: object, shards: Path) -> None:
    (shards / INDEX).write_text(json.dumps({"weight_map": places}))
    assert "'weight_map'" in refusal(shards)


def test_an_index_that_lies_about_a_tensor_is_refused(shards: Path) -> None:
    index = json.loads((shards / INDEX).read_text())
    index["weight_map"]["model.layers.0.self_attn.q_proj.bias"] = sorted(set(index["weight_map"].values()))[0]
    (shards / INDEX).write_text(json.dumps(index))
    assert "'model.layers.0.self_attn.q_proj.bias'" in refusal(shards)


def test_a_lying_header_is_refused(llama: Path) -> None:
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    assert "model.safetensors" in refusal(llama)


def test_a_missing_tensor_is_named(llama: Path) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    edit_tensors(llama, lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name})
    assert f"lacks the tensor '{name}'" in refusal(llama)


def test_a_tensor_of_integers_is_refused(llama: Path) -> None:
    edit_tensors(llama, lambda tensors: tensors | {"model.norm.weight": tensors["model.norm.weight"].to(torch.int32)})
    assert "'model.norm.weight'" in refusal(llama)
    assert "I32" in refusal(llama)


def test_a_fused_tensor_of_another_height_is_refused(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved["phi3"], tmp_path / "phi3"))
    name = "model.layers.0.self_attn.qkv_proj.weight"
    edit_tensors(folder, lambda tensors: tensors | {name: tensors[name][:96].clone()})
    sentence = refusal(folder)
    assert name in sentence and "[96, 64]" in sentence and "[128, 64]" in sentence
