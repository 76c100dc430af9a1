"""Adapters of the drafters that read hidden states, for a model in memory: fresh, trained, or always wrong."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fewer.decoding.chimera import Chimera, ChimeraConfig
from fewer.decoding.chimera_network import ChimeraFitConfig, ChimeraNetwork
from fewer.decoding.draft_training import DraftNetwork, Lesson, stored
from fewer.decoding.eagle import Eagle, EagleConfig, EagleFitConfig, EagleNetwork
from fewer.decoding.frozen_target import FrozenTarget
from fewer.decoding.medusa import Medusa, MedusaConfig, MedusaFitConfig, MedusaNetwork
from fewer.model.step import Step
from fewer.model.transformer import Transformer
from fewer.training import Adapter, Provenance
from tests.random_model import new_session

NETWORKS: dict[str, Any] = {"chimera": ChimeraNetwork, "medusa": MedusaNetwork, "eagle": EagleNetwork}
FITS: dict[str, Any] = {"chimera": ChimeraFitConfig, "medusa": MedusaFitConfig, "eagle": EagleFitConfig}
STRATEGIES: dict[str, Any] = {"chimera": Chimera, "medusa": Medusa, "eagle": Eagle}
CONFIGS: dict[str, Any] = {"chimera": ChimeraConfig, "medusa": MedusaConfig, "eagle": EagleConfig}


@dataclass
class Target:
    """What strategies ask of a language model."""

    transformer: Transformer


def fresh(model: Transformer, method: str, seed: int = 0, vocabulary: Tensor | None = None, **settings: Any) -> Any:
    """A network that has learnt nothing; small random numbers stand where zeros would."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        target = FrozenTarget(model, vocabulary, training=True)
        network = NETWORKS[method](target, FITS[method](**settings))
        for parameter in network.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    return network


def adapter_of(network: DraftNetwork, method: str, float32: bool = False) -> Adapter:
    tensors = stored(network)
    if float32:
        tensors |= {name: each.detach() for name, each in network.named_parameters()}
    return Adapter(tensors, Provenance(method, asdict(network.config), "", "", 0))  # type: ignore[call-overload]


def strategy_of(network: DraftNetwork, method: str, **config: Any) -> Any:
    adapter = adapter_of(network, method, float32=True)
    return STRATEGIES[method](CONFIGS[method](**config), Target(network.target.model), adapter=adapter)


def lesson_of(model: Transformer, rows: list[list[int]]) -> Lesson:
    """The target's own words about texts of one length; every place behind the first is scored."""
    tokens = torch.tensor(rows)
    places = torch.arange(tokens.shape[1]).expand(tokens.shape)
    session = new_session(model, len(rows))
    session.cache.reserve(tokens.shape[1])
    output = model.forward(Step(tokens, places, logits="all"), session.cache)
    assert output.logits is not None and output.hidden is not None
    return Lesson(tokens, output.hidden.float().clone(), output.logits.argmax(-1))


def trained(model: Transformer, method: str, rows: list[list[int]], steps: int = 60, **settings: Any) -> Any:
    """A network trained on texts that the model wrote, and its losses."""
    network, lesson = fresh(model, method, **settings), lesson_of(model, rows)
    optimizer = torch.optim.Adam(network.parameters(), 5e-3)
    network.history = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.stack(list(network.losses(lesson).values())).sum()
        loss.backward()
        optimizer.step()
        network.history.append(float(loss.detach()))
    return network
