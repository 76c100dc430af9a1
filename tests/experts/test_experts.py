"""The experts slot: the recipe's method builds every mixture, `resident` is the plain one, dense models ignore it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewer import registry
from fewer.checkpoint.canonical_shapes import canonical_shapes
from fewer.checkpoint.export import write_folder
from fewer.experts import ResidentExperts
from fewer.formats import DenseFormat, WeightFormat
from fewer.language_model import LanguageModel, load
from fewer.model.config import ExpertsConfig, ModelConfig
from fewer.model.experts import ResidentStore, TopKRouter
from fewer.model.feed_forward import FeedForward
from fewer.model.step import Step
from fewer.model.transformer import Transformer
from fewer.recipe import Recipe
from fewer.registry import method
from tests.random_model import CPU, config_of, new_session, random_tokens, random_weights
from tests.tiny_model import write_model, write_tokenizer

PROMPT = random_tokens(7)


@dataclass(frozen=True)
class OneExpertConfig:
    expert: int = 0  # the one that every token gets


@dataclass
class OneRouter:
    matrix: WeightFormat
    expert: int

    def route(self, x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        assert step.tokens is not None and step.tokens.numel() == len(x)
        return torch.full((len(x), 1), self.expert), torch.ones(len(x), 1)


class CountingStore(ResidentStore):
    calls = 0

    def run(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        self.calls += 1
        return super().run(x, experts, weights)


class OneExpert:
    def __init__(self, config: OneExpertConfig):
        self.config = config

    def router(self, matrix: WeightFormat, settings: ExpertsConfig) -> OneRouter:
        return OneRouter(matrix, self.config.expert)

    def store(self, experts: list[FeedForward]) -> CountingStore:
        return CountingStore(experts)


@pytest.fixture
def one_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registers `one-expert`, for one test."""
    monkeypatch.setattr(registry, "_METHODS", {(entry.slot, entry.name): entry for entry in registry.methods()})
    method("one-expert", slot="experts", lossless=False, config=OneExpertConfig)(OneExpert)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model like Mixtral on disk: 4 experts in each of 2 layers, 2 a token."""
    root = tmp_path_factory.mktemp("mixture")
    (root / "tokenizer").mkdir()
    tokenizer = write_tokenizer(root / "tokenizer")
    config = config_of(vocab_size=tokenizer.vocab_size, layers=2, experts=ExpertsConfig(4, 2, 24, normalize=True))
    weights, shapes = random_weights(config), canonical_shapes(config)
    write_folder(
        root / "model",
        config,
        ((name, DenseFormat(weights(name))) for name, shape in shapes.items() if len(shape) == 2),
        ((name, weights(name)) for name, shape in shapes.items() if len(shape) == 1),
        tokenizer,
        {"source": "random"},
    )
    return root / "model"


def loaded(folder: Path, experts: str) -> LanguageModel:
    return load(folder, recipe=Recipe("dense", experts=experts, dtype="float32"), device="cpu")


def logits(network: Transformer) -> Tensor:
    """A prompt in one step, then one token alone: [2, V]."""
    session = new_session(network)
    first = session.prefill([PROMPT])
    return torch.cat([first, session.decode([3])])


def dense_equivalent(network: Transformer, expert: int) -> Transformer:
    """The dense model whose feed-forward blocks are `expert` of every layer, made without any mixture."""
    config: ModelConfig = replace(network.config, experts=None, intermediate_size=24)
    weights = random_weights(network.config)

    def dense(name: str) -> Tensor:
        return weights(name.replace(".feed_forward.", f".experts.{expert}."))

    return Transformer(config, lambda name: DenseFormat(dense(name)), dense, torch.float32, CPU)


@pytest.mark.parametrize("expert", [0, 3])
def test_the_recipes_method_builds_every_mixture(expert: int, mixture: Path, one_expert: None) -> None:
    network = loaded(mixture, f"one-expert:expert={expert}").transformer
    assert torch.allclose(logits(network), logits(dense_equivalent(network, expert)), atol=1e-4)
    assert [layer.feed_forward.store.calls for layer in network.layers] == [2, 2]  # type: ignore[union-attr]


def test_resident_equals_the_networks_plain_path(mixture: Path, one_expert: None) -> None:
    network = loaded(mixture, "resident").transformer
    weights = random_weights(network.config)
    plain = Transformer(network.config, lambda name: DenseFormat(weights(name)), weights, torch.float32, CPU)
    assert torch.allclose(logits(network), logits(plain), atol=1e-4)
    assert not torch.allclose(logits(network), logits(loaded(mixture, "one-expert").transformer), atol=0.1)


def test_matrices_and_bytes_are_the_same_under_every_method(mixture: Path, one_expert: None) -> None:
    resident, one = loaded(mixture, "resident").transformer, loaded(mixture, "one-expert").transformer
    assert [name for name, _ in resident.matrices()] == [name for name, _ in one.matrices()]
    assert resident.nbytes == one.nbytes


def test_a_dense_model_ignores_the_slot(tmp_path: Path, one_expert: None) -> None:
    folder = write_model(tmp_path / "dense")
    resident, one = loaded(folder, "resident"), loaded(folder, "one-expert")
    assert torch.equal(logits(resident.transformer), logits(one.transformer))


def test_weights_are_not_shared_between_two_experts_methods(mixture: Path, one_expert: None) -> None:
    model = loaded(mixture, "resident")
    assert model.with_recipe(Recipe("dense", cache="sink-window", dtype="float32")).transformer is model.transformer
    with pytest.raises(ValueError, match="weights, experts and dtype must be the same"):
        model.with_recipe(Recipe("dense", experts="one-expert", dtype="float32"))


def test_resident_builds_the_plain_router_and_store() -> None:
    matrix, settings = DenseFormat(torch.eye(4)), ExpertsConfig(4, 2, 24, normalize=False)
    assert ResidentExperts().router(matrix, settings) == TopKRouter(matrix, settings)
    assert ResidentExperts().store([]) == ResidentStore([])
