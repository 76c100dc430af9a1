"""Gates of key heads: the quantile that makes them a mask, its noise, and layers that have none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewer.cache.head_gates import (
    GATES,
    gated_layers,
    gates_of,
    inverted_gates,
    random_gates,
    retrieval_heads,
    streaming_share,
)
from fewer.errors import CheckpointError, UsageError
from fewer.training import Adapter, Provenance
from tests.random_model import config_of

CONFIG = config_of(layers=10, kv_heads=4, heads=8)
GRADED = torch.arange(40, dtype=torch.float32).view(10, 4) / 40


def adapter_of(**tensors: Tensor) -> Adapter:
    return Adapter(tensors, Provenance("duo-attention", {}, "a model", "a text", 0))


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
def test_a_share_of_the_lowest_gates_streams_over_all_layers_together(sparsity: float) -> None:
    retrieval = retrieval_heads(GRADED, sparsity, CONFIG)
    assert streaming_share(retrieval, CONFIG) == sparsity
    lowest = int(40 * sparsity)
    assert not retrieval.flatten()[:lowest].any() and retrieval.flatten()[lowest:].all()
    counts = retrieval.sum(1)
    assert counts[0] == 0 and counts[-1] == 4  # layers without any and with nothing but retrieval heads


def test_no_head_streams_at_0_and_every_one_at_1() -> None:
    assert retrieval_heads(torch.zeros(10, 4), 0.0, CONFIG).all()
    assert not retrieval_heads(torch.ones(10, 4), 1.0, CONFIG).any()


def test_noise_breaks_ties_by_its_seed_and_changes_no_other_order() -> None:
    tied = torch.ones(10, 4)
    first, same, other = (retrieval_heads(tied, 0.5, CONFIG, seed) for seed in (0, 0, 1))
    assert streaming_share(first, CONFIG) == streaming_share(other, CONFIG) == 0.5
    assert torch.equal(first, same) and not torch.equal(first, other)
    for seed in range(5):
        assert torch.equal(retrieval_heads(GRADED, 0.5, CONFIG, seed), retrieval_heads(GRADED, 0.5, CONFIG))


def test_layers_with_a_window_of_their_own_are_left_out() -> None:
    sliding = tuple(layer % 2 == 0 for layer in range(10))
    config = config_of(layers=10, kv_heads=4, heads=8, sliding_window=16, sliding_layers=sliding)
    assert gated_layers(config).tolist() == [not each for each in sliding]
    retrieval = retrieval_heads(GRADED, 0.5, config)
    assert retrieval[::2].all() and streaming_share(retrieval, config) == 0.5
    everywhere = config_of(layers=10, kv_heads=4, heads=8, sliding_window=16)
    assert retrieval_heads(GRADED, 1.0, everywhere).all() and streaming_share(GRADED > 2, everywhere) == 0


def test_baselines_choose_by_lot_and_the_other_way_round() -> None:
    assert torch.equal(random_gates(CONFIG, 3), random_gates(CONFIG, 3))
    assert not torch.equal(random_gates(CONFIG, 3), random_gates(CONFIG, 4))
    kept, left = (retrieval_heads(gates, 0.5, CONFIG) for gates in (GRADED, inverted_gates(GRADED)))
    assert torch.equal(kept, ~left)


def test_an_adapter_of_other_shape_or_damaged_gates_is_refused() -> None:
    assert torch.equal(gates_of(adapter_of(**{GATES: GRADED * 2}), CONFIG), (GRADED * 2).clamp(0, 1))
    with pytest.raises(CheckpointError, match=r"10 layers of 4 key heads: found 40 x 1; fit it again"):
        gates_of(adapter_of(gates=GRADED.view(40, 1)), CONFIG)
    with pytest.raises(CheckpointError, match="found none"):
        gates_of(adapter_of(other=GRADED), CONFIG)
    with pytest.raises(CheckpointError, match="not finite"):
        gates_of(adapter_of(gates=GRADED / 0 * 0), CONFIG)


def test_a_sparsity_that_is_no_share_is_refused() -> None:
    with pytest.raises(UsageError, match=r"sparsity=1.5 is out of range: use 0 .* to 1"):
        retrieval_heads(GRADED, 1.5, CONFIG)
