"""Our own folder: what the network asks for is what is checked, and damage is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewer import load
from fewer.checkpoint.canonical_shapes import canonical_shapes
from fewer.checkpoint.fewer_folder import FewerCheckpoint, config_from_json, config_to_json
from fewer.errors import CheckpointError
from fewer.formats import DenseFormat, WeightFormat
from fewer.model.config import ExpertsConfig, ModelConfig, RopeScaling
from fewer.model.transformer import Transformer
from tests.random_model import CONFIG, config_of, random_weights
from tests.tiny_model import write_model

EXPERTS = ExpertsConfig(4, 2, 24, True, shared_intermediate_size=40, layers=(False, True, True))
CONFIGS = {
    "llama": CONFIG,
    "tied": config_of(tied_embeddings=True),
    "biases": config_of(attention_bias=True, output_bias=True, mlp_bias=True),
    "sandwich": config_of(norm_placement="sandwich", qk_norm="head"),
    "post": config_of(norm_placement="post", qk_norm="all"),
    "experts": config_of(experts=EXPERTS),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_canonical_shapes_are_what_the_network_asks_for(config: ModelConfig) -> None:
    weights, asked = random_weights(config), dict[str, tuple[int, ...]]()

    def vector(name: str) -> Tensor:
        asked[name] = tuple(weights(name).shape)
        return weights(name)

    def matrix(name: str) -> WeightFormat:
        return DenseFormat(vector(name))

    Transformer(config, matrix, vector, torch.float32, torch.device("cpu"))
    assert canonical_shapes(config) == asked


def test_a_config_survives_its_way_through_json() -> None:
    scaling = RopeScaling("longrope", 4.0, 64, short_factor=(1.0, 2.0), long_factor=(3.0, 4.0))
    config = config_of(experts=EXPERTS, rope_scaling=scaling, sliding_window=8, sliding_layers=(True, False, True))
    assert config_from_json(config_to_json(config)) == config


def test_a_tensor_that_lost_a_field_or_changed_its_shape_is_named(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    file = folder / "model.safetensors"
    whole = load_file(file)
    name = "layers.1.feed_forward.down.weight"
    field = next(key for key in whole if key.startswith(name))
    for damaged in (
        {key: value for key, value in whole.items() if key != field},
        {**whole, field: whole[field][:32].contiguous()},
        {**whole, "norm.weight": torch.ones(63)},
    ):
        save_file(damaged, file)
        with pytest.raises(CheckpointError, match=rf"{name}|norm\.weight"):
            load(folder)


def test_the_fingerprint_changes_with_the_model(tmp_path: Path) -> None:
    first, again = write_model(tmp_path / "first"), write_model(tmp_path / "again")
    other = write_model(tmp_path / "other", context=128)
    prints = [FewerCheckpoint(folder).fingerprint() for folder in (first, again, other)]
    assert prints[0] == prints[1] != prints[2]
