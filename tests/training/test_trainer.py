"""The training loop: exact resume, freezing, groups, schedule, clipping, accumulation, Ctrl-C."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewer.errors import CheckpointError, NumericalError, UsageError
from fewer.training.data import TokenBlocks
from fewer.training.schedule import learning_rate_factor
from fewer.training.trainer import ParameterGroup, StepRecord, Trainer, TrainerConfig

CONFIG = TrainerConfig(steps=10, learning_rate=0.05, warmup=2, accumulate=2, seed=3)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(16, 8)
        self.head = nn.Linear(8, 16)

    def loss(self, tokens: Tensor) -> Tensor:
        hidden = nn.functional.dropout(self.embed(tokens[:, :-1]), 0.2)  # draws random numbers in every update
        return nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), tokens[:, 1:].flatten())


def blocks(seed: int = 0) -> TokenBlocks:
    tokens = torch.randint(0, 16, (120,), generator=torch.Generator().manual_seed(1))
    return TokenBlocks.from_tokens(tokens, 12, 3, seed)


def trainer(net: Net, config: TrainerConfig = CONFIG, checkpoint: Path | None = None, **options: Any) -> Trainer:
    return Trainer(net, net.loss, blocks(), config, checkpoint, **options)


def test_a_resumed_run_is_bit_identical_to_one_that_was_not_interrupted(tmp_path: Path) -> None:
    whole = Net()
    history = trainer(whole).run()

    def stop(record: StepRecord) -> None:
        if record.step == 4:
            raise KeyboardInterrupt

    first = trainer(Net(), checkpoint=tmp_path / "state", progress=stop)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    torch.manual_seed(99)  # the caller's random numbers do not matter
    net = Net()
    second = trainer(net, checkpoint=tmp_path / "state")
    assert second.resume()
    assert second.step == 4
    assert second.run() == history
    for name, value in whole.state_dict().items():
        assert torch.equal(value, net.state_dict()[name]), name


def test_interrupting_the_backward_pass_saves_the_last_whole_update(tmp_path: Path) -> None:
    net, calls = Net(), 0

    def loss(tokens: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 6:  # the second half of update 3
            raise KeyboardInterrupt
        return net.loss(tokens)

    with pytest.raises(KeyboardInterrupt):
        Trainer(net, loss, blocks(), CONFIG, tmp_path / "state").run()
    resumed = Net()
    again = trainer(resumed, checkpoint=tmp_path / "state")
    assert again.resume() and again.step == 2
    whole = Net()
    trainer(whole).run()
    again.run()
    assert torch.equal(whole.head.weight, resumed.head.weight)


def test_a_state_of_other_settings_or_other_data_is_refused(tmp_path: Path) -> None:
    trainer(Net(), checkpoint=tmp_path / "state").run()
    with pytest.raises(CheckpointError, match="learning_rate=0.05, this one has 0.01"):
        other = TrainerConfig(steps=10, learning_rate=0.01, warmup=2, accumulate=2, seed=3)
        trainer(Net(), other, tmp_path / "state").resume()
    net = Net()
    with pytest.raises(CheckpointError, match="other data"):
        Trainer(net, net.loss, blocks(seed=1), CONFIG, tmp_path / "state").resume()


def test_a_damaged_state_is_refused_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "state"
    trainer(Net(), checkpoint=path).run()
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="damaged"):
        trainer(Net(), checkpoint=path).resume()


def test_training_lowers_the_loss() -> None:
    net = Net()
    history = trainer(net, TrainerConfig(steps=60, learning_rate=0.05)).run()
    assert history[-1].loss < 0.8 * history[0].loss


def test_frozen_parameters_keep_every_bit() -> None:
    net = Net()
    before = net.embed.weight.detach().clone()
    trainer(net, TrainerConfig(steps=3, frozen=("embed.*",))).run()
    assert torch.equal(net.embed.weight, before)
    assert not torch.equal(net.head.weight, Net().head.weight)


def test_groups_have_their_own_learning_rates() -> None:
    net = Net()
    config = TrainerConfig(steps=1, learning_rate=0.01, schedule="constant", groups=(ParameterGroup("*.bias", 0.5),))
    trainer(net, config).run()
    # The first update of AdamW moves every parameter with a gradient by the learning rate.
    assert torch.allclose((net.head.bias - Net().head.bias).abs(), torch.full((16,), 0.5), rtol=1e-3)
    assert torch.allclose((net.head.weight - Net().head.weight).abs().max(), torch.tensor(0.01), rtol=1e-3)


def test_accumulated_gradients_equal_those_of_one_large_batch() -> None:
    """Without dropout two batches of 3 blocks are one batch of 6."""
    weights = []
    for size, accumulate in ((3, 2), (6, 1)):
        net = Net()
        data = TokenBlocks(blocks().blocks, size)

        def loss(tokens: Tensor, net: Net = net) -> Tensor:
            logits = net.head(net.embed(tokens[:, :-1]))
            return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

        Trainer(net, loss, data, TrainerConfig(steps=5, accumulate=accumulate)).run()
        weights.append(net.head.weight.detach())
    assert torch.allclose(weights[0], weights[1], atol=1e-6)


def test_terms_are_added_and_recorded() -> None:
    net = Net()

    def loss(tokens: Tensor) -> dict[str, Tensor]:
        return {"fit": net.loss(tokens), "size": 0.1 * net.head.weight.square().sum()}

    record = Trainer(net, loss, blocks(), TrainerConfig(steps=1)).run()[0]
    assert record.loss == pytest.approx(record.terms["fit"] + record.terms["size"])


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_parameters() -> None:
    net = Net()
    with pytest.raises(NumericalError, match="step 1: the loss is nan"):
        Trainer(net, lambda tokens: net.loss(tokens) * float("nan"), blocks(), CONFIG).run()
    assert torch.equal(net.head.weight, Net().head.weight)


def test_patterns_and_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UsageError, match="'decoder.\\*' matches no parameter"):
        trainer(Net(), TrainerConfig(steps=1, frozen=("decoder.*",)))
    with pytest.raises(UsageError, match="nothing is left to train"):
        trainer(Net(), TrainerConfig(steps=1, frozen=("*",)))
    with pytest.raises(UsageError, match="steps=0"):
        TrainerConfig(steps=0)
    with pytest.raises(UsageError, match="warmup=5"):
        TrainerConfig(steps=4, warmup=5)


def test_schedules_warm_up_linearly_and_decay_to_the_final_share() -> None:
    assert [learning_rate_factor("cosine", step, 10, 4) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert learning_rate_factor("cosine", 5, 10) == pytest.approx(0.5)
    assert learning_rate_factor("linear", 5, 10, final=0.2) == pytest.approx(0.6)
    assert learning_rate_factor("cosine", 10, 10, final=0.1) == pytest.approx(0.1)
    assert learning_rate_factor("constant", 9, 10) == 1.0
    ramps = [learning_rate_factor("trapezoid", step, 12, 4, 0.3) for step in range(12)]
    assert ramps == [0.3, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.3]
