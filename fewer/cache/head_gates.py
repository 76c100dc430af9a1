"""Gates of key heads, and which heads they make retrieval heads: what every method that splits heads starts from.

A gate alpha in [0, 1] says how much a key head needs the whole past. A *retrieval head* keeps it; a *streaming head*
does with the first tokens (sinks) and a window of the most recent ones. Gates are learnt once a model, by
`fit_gates` of `fewer.cache.gate_training`, and cut into a mask when a cache is made.

Source: DuoAttention, arXiv 2410.10819, section 2.3 and its code; LServe, arXiv 2502.14866, takes the same gates by the
same rule.

The layout of an adapter: one tensor `gates` [layers, Hk] float32 in [0, 1], 1 in layers that have no gates. Its
provenance names the sinks and the window that they were learnt with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fewer.errors import CheckpointError, UsageError
from fewer.model.config import ModelConfig

if TYPE_CHECKING:
    from fewer.training import Adapter

GATES = "gates"  # the adapter's tensor
NOISE = 1e-6  # breaks ties between gates that are equal, as many are that stay at 1


def gated_layers(config: ModelConfig) -> Tensor:
    """[layers] bool: layers whose heads may be split. Those with a sliding window of the model's own never hold the
    whole past, so they keep what they have."""
    return torch.tensor([not config.is_sliding(layer) for layer in range(config.layers)])


def gates_of(adapter: Adapter, config: ModelConfig) -> Tensor:
    """The adapter's gates [layers, Hk] float32, on the CPU. Raises CheckpointError where they are not this model's."""
    gates, shape = adapter.tensors.get(GATES), (config.layers, config.kv_heads)
    if gates is None or tuple(gates.shape) != shape:
        found = "none" if gates is None else " x ".join(map(str, gates.shape))
        raise CheckpointError(
            f"the adapter's gates do not fit the model, which has {shape[0]} layers of {shape[1]} key heads: found "
            f"{found}; fit it again"
        )
    gates = gates.detach().to("cpu", torch.float32)
    if not torch.isfinite(gates).all():
        raise CheckpointError("the adapter has gates that are not finite: fit it again")
    return gates.clamp(0, 1)


def retrieval_heads(gates: Tensor, sparsity: float, config: ModelConfig, seed: int = 0) -> Tensor:
    """gates [layers, Hk] -> [layers, Hk] bool: the heads that keep the whole past. All do in layers without gates.

    alpha' = alpha + U(0, 1e-6), tau = quantile of alpha' over all gated layers at `sparsity`, retrieval where
    alpha' >= tau: about a share `sparsity` of the heads streams, and some layers come to have none or all of them.
    The noise depends on `seed` alone. At 0 no head streams, at 1 every one.
    """
    check_sparsity("sparsity", sparsity)
    split = gated_layers(config)
    if sparsity == 0 or not split.any():
        return torch.ones_like(gates, dtype=torch.bool)
    noise = torch.rand(gates.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ranked = gates.double().clamp(0, 1) + NOISE * noise
    threshold = ranked[split].quantile(sparsity)
    retrieval = ranked >= threshold if sparsity < 1 else torch.zeros_like(gates, dtype=torch.bool)
    return retrieval | ~split[:, None]


def streaming_share(retrieval: Tensor, config: ModelConfig) -> float:
    """The share of streaming heads among those that may be: what `sparsity` came to."""
    split = gated_layers(config)
    return float((~retrieval[split]).double().mean()) if split.any() else 0.0


def random_gates(config: ModelConfig, seed: int = 0) -> Tensor:
    """Gates [layers, Hk] that choose heads by lot: a baseline."""
    return torch.rand(config.layers, config.kv_heads, generator=torch.Generator().manual_seed(seed))


def inverted_gates(gates: Tensor) -> Tensor:
    """Gates that keep the heads which `gates` would let stream: the baseline that any others must beat."""
    return 1 - gates.clamp(0, 1)


def check_sparsity(name: str, sparsity: float) -> None:
    """Raises UsageError unless it is a share."""
    if not 0 <= sparsity <= 1:
        raise UsageError(f"{name}={sparsity} is out of range: use 0 (all heads keep everything) to 1 (none does)")
