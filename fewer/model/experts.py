"""A mixture of experts: the router picks k of E feed-forward blocks for each token and weighs their outputs.

These are the plain router and the resident store; a method of the `experts` slot may build others in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fewer.formats.base import WeightFormat
from fewer.model.config import ExpertsConfig
from fewer.model.feed_forward import FeedForward
from fewer.model.linear import Linear
from fewer.model.step import Step


class Router(Protocol):
    @property
    def matrix(self) -> WeightFormat:
        """The stored router matrix [E, d]."""
        ...

    def route(self, x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """x [n, d], the step's B rows of T tokens one after the other (n = B T, padding included) -> experts [n, k]
        int64, weights [n, k]. k is the router's choice, one for all tokens of a step."""
        ...


class ExpertStore(Protocol):
    @property
    def experts(self) -> Sequence[FeedForward]:
        """The blocks that are held, whose bytes count as the model's."""
        ...

    def run(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """x [n, d], experts and weights [n, k] -> [n, d] float32."""
        ...


@dataclass(slots=True)
class TopKRouter:
    """Softmax over all experts, then the k largest; Mixtral and some Qwens divide by their sum."""

    matrix: WeightFormat  # [E, d]
    settings: ExpertsConfig

    def route(self, x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """x [n, d] -> experts [n, k] int64, weights [n, k] float32."""
        probabilities = self.matrix.matmul(x).float().softmax(-1)
        weights, experts = probabilities.topk(self.settings.per_token, dim=-1)
        if self.settings.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return experts, weights


@dataclass(slots=True)
class ResidentStore:
    """Every expert in memory; tokens are sorted by expert and each expert runs once."""

    experts: list[FeedForward]

    def run(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """x [n, d], experts and weights [n, k] -> [n, d] float32."""
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        flat = experts.flatten()
        order = flat.argsort(stable=True)
        used, counts = flat[order].unique_consecutive(return_counts=True)
        tokens = order // experts.shape[1]
        each_weight = weights.flatten()[order]
        start = 0
        for expert, count in zip(used.tolist(), counts.tolist(), strict=True):
            rows = tokens[start : start + count]
            result = self.experts[expert](x[rows]).float() * each_weight[start : start + count, None]
            out.index_add_(0, rows, result)
            start += count
        return out


MakeRouter = Callable[[WeightFormat, ExpertsConfig], Router]  # from a layer's router matrix [E, d]
MakeStore = Callable[[list[FeedForward]], ExpertStore]  # from a layer's E blocks


@dataclass(slots=True)
class Experts:
    router: Router
    store: ExpertStore
    shared: FeedForward | None = None
    shared_gate: Linear | None = None  # [1, d], sigmoid

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        """x [..., d] -> [..., d]."""
        flat = x.reshape(-1, x.shape[-1])
        out = self.store.run(flat, *self.router.route(flat, step))
        if self.shared is not None:
            shared = self.shared(flat).float()
            out = out + (shared if self.shared_gate is None else shared * self.shared_gate(flat).float().sigmoid())
        return out.to(x.dtype).view(x.shape)
