"""Caches that drop keys, on CUDA's fast path: the general path's logits, and the same keys, token by token."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
import torch

from fewer.cache import (
    A2sfCache,
    A2sfConfig,
    H2OCache,
    H2OConfig,
    SinkWindowCache,
    SinkWindowConfig,
    SnapKVCache,
    SnapKVConfig,
    TovaCache,
    TovaConfig,
)
from fewer.cache.scored import ScoredCache
from fewer.engine.runner import Runner
from fewer.engine.session import Session
from fewer.errors import FewerError, NumericalError
from fewer.model.step import Step
from fewer.slots import CapturedCache, KVCache
from tests.engine.test_cuda import SMALL, build, fast_runner, general_runner
from tests.random_model import config_of, random_tokens

CPU = torch.device("cpu")
CONFIG = config_of(
    **SMALL | {"heads": 4, "kv_heads": 2, "head_dim": 8, "hidden_size": 16, "intermediate_size": 16},
    context_length=512,
)  # one row's products are slow in the interpreter, so most tests have two rows
BUDGET = 8
KINDS: dict[str, tuple[type[Any], Any]] = {
    "a2sf": (A2sfCache, A2sfConfig(budget=BUDGET)),
    "a2sf-slow-with-recent": (A2sfCache, A2sfConfig(budget=BUDGET, alpha=0.9, recent=3)),
    "a2sf-share": (A2sfCache, A2sfConfig(budget=0, share=0.1)),
    "h2o": (H2OCache, H2OConfig(budget=BUDGET)),
    "tova": (TovaCache, TovaConfig(budget=BUDGET)),
    "snapkv": (SnapKVCache, SnapKVConfig(budget=17, window=16)),
}
every_kind = pytest.mark.parametrize("kind", list(KINDS))


def session_of(runner: Runner, kind: str, batch: int = 1) -> Session:
    make, settings = KINDS[kind]
    model = runner.model
    return Session(runner, make(model.config, batch, 8, model.dtype, model.device, settings))


def pair_of(kind: str, device: torch.device, batch: int = 1, config: Any = CONFIG) -> tuple[Session, Session]:
    """One on the fast path, one on the CPU's general path."""
    fast, exact = fast_runner(build(config, "dense", device)), general_runner(build(config, "dense", CPU))
    return session_of(fast, kind, batch), session_of(exact, kind, batch)


def scored(session: Session) -> ScoredCache:
    assert isinstance(session.cache, ScoredCache)
    return session.cache


def assert_same_step(ours: Session, theirs: Session, tokens: list[int], active: list[bool] | None = None) -> None:
    found, wanted = ours.decode(tokens, active).cpu(), theirs.decode(tokens, active)
    rows = active or [True] * len(tokens)
    torch.testing.assert_close(found[rows], wanted[rows], rtol=1e-4, atol=1e-4)
    assert ours.cache.physical_lengths == theirs.cache.physical_lengths


def assert_same_keys(ours: Session, theirs: Session) -> None:
    for row in range(len(ours.lengths)):
        for layer in range(CONFIG.layers):
            for head in range(CONFIG.kv_heads):
                held = scored(theirs).positions(row, layer, head).tolist()
                assert scored(ours).positions(row, layer, head).tolist() == held


def takes_fast_steps(session: Session) -> bool:
    """Whether the next step, which is then given up, would be captured."""
    cache, device = session.cache, session.runner.device
    positions = torch.tensor(session.lengths, device=device)[:, None]
    assert isinstance(cache, CapturedCache)
    return cache.capture(Step(torch.zeros_like(positions), positions, role="generated")) is not None


def count_captures(session: Session, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by one with every captured pass."""
    decoder, passes = session.runner.cuda, []
    assert decoder is not None
    run = decoder.run

    def counted(*args: Any) -> Any:
        passes.append(1)
        return run(*args)

    monkeypatch.setattr(decoder, "run", counted)
    return passes


@every_kind
def test_steps_equal_the_general_paths(kind: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row is over its budget, one comes to be; a step in which one row rests is for the general path."""
    ours, theirs = pair_of(kind, device, batch=2)
    passes = count_captures(ours, monkeypatch)
    prompts = [random_tokens(26, 1, 40), random_tokens(6, 2, 40)]
    torch.testing.assert_close(ours.prefill(prompts).cpu(), theirs.prefill(prompts), rtol=1e-4, atol=1e-4)
    for turn in range(6):
        active = [True, turn != 4]
        assert_same_step(ours, theirs, random_tokens(2, turn, 40), None if all(active) else active)
    assert len(passes) == 5
    assert_same_keys(ours, theirs)


def test_steps_of_a_single_row(device: torch.device) -> None:
    ours, theirs = pair_of("a2sf", device)
    for session in (ours, theirs):
        session.prefill([random_tokens(7, 1, 40)])
    for token in random_tokens(3, 2, 40):
        assert_same_step(ours, theirs, [token])
    assert_same_keys(ours, theirs)


@pytest.mark.parametrize("kind", ["a2sf-slow-with-recent", "snapkv"])
def test_captured_and_general_steps_take_turns(kind: str, device: torch.device) -> None:
    ours, theirs = pair_of(kind, device, batch=2)
    decoder = ours.runner.cuda
    for session in (ours, theirs):
        session.prefill([random_tokens(20, row, 40) for row in range(2)])
    for turn in range(5):
        ours.runner.cuda = None if turn == 2 else decoder
        assert_same_step(ours, theirs, random_tokens(2, turn, 40))
    assert_same_keys(ours, theirs)
    prompts = [random_tokens(6, 3, 40), random_tokens(3, 4, 40)]  # a second turn
    torch.testing.assert_close(ours.prefill(prompts).cpu(), theirs.prefill(prompts), rtol=1e-4, atol=1e-4)
    for turn in range(2):
        assert_same_step(ours, theirs, random_tokens(2, turn, 40))
    assert_same_keys(ours, theirs)


@pytest.mark.parametrize("kind", ["h2o", "snapkv"])
def test_a_step_that_is_given_up_leaves_no_trace(kind: str, device: torch.device) -> None:
    ours, theirs = pair_of(kind, device, batch=2)
    prompts = [random_tokens(n, n, 40) for n in (20, 6)]
    for session in (ours, theirs):
        session.prefill(prompts)
    for turn in range(2):
        assert_same_step(ours, theirs, random_tokens(2, turn, 40))
        positions = torch.tensor(ours.lengths, device=device)[:, None]
        ours.runner.step(Step(positions * 0 + 7, positions, role="generated"), ours.cache)  # never committed
    assert_same_step(ours, theirs, [5, 6])
    assert_same_keys(ours, theirs)


def test_a_row_whose_token_is_not_kept_goes_on_as_before(device: torch.device) -> None:
    ours, theirs = pair_of("a2sf", device, 2)
    for session in (ours, theirs):
        session.prefill([random_tokens(n, n, 40) for n in (20, 6)])
    assert_same_step(ours, theirs, [1, 2])
    assert_same_step(ours, theirs, [3, 4])
    for session in (ours, theirs):
        positions = torch.tensor(session.lengths, device=session.runner.device)[:, None]
        tokens = torch.tensor([[5], [6]], device=session.runner.device)
        session.runner.step(Step(tokens, positions, role="generated"), session.cache)
        session.cache.commit([0, 1])
    assert_same_step(ours, theirs, [7, 8])
    assert_same_keys(ours, theirs)


def test_rows_start_anew_behind_captured_steps(device: torch.device) -> None:
    ours, theirs = pair_of("a2sf", device, batch=2)
    for session in (ours, theirs):
        session.prefill([random_tokens(12, row, 40) for row in range(2)])
        for token in range(2):
            session.decode([token] * 2)
        with pytest.raises(FewerError, match="cache=a2sf cannot go back to 5 tokens"):
            session.rollback([5, 5])
        session.rollback([0, 99])
        session.prefill([random_tokens(12, 7, 40), random_tokens(2, 8, 40)])
    for token in range(2):
        assert_same_step(ours, theirs, [token] * 2)
    assert_same_keys(ours, theirs)


def test_running_ahead_keeps_only_what_was_taken(device: torch.device) -> None:
    """A pass is launched before the token of the one in front is taken; a caller that stops leaves it uncommitted."""
    ours, theirs = pair_of("a2sf", device)
    texts = []
    for session in (ours, theirs):
        session.prefill([random_tokens(12, 1, 40)])
        text = list(islice(session.greedy(3, 10), 2))  # the first one shrinks the prompt
        assert session.lengths == [14]
        for count in (4, 2):  # the row is over its budget now: launches are alike
            text += islice(session.greedy(text[-1], count), 2)
        assert session.lengths == [18]
        texts.append(text)
    assert texts[0] == texts[1]
    assert_same_keys(ours, theirs)


@pytest.mark.parametrize("launched", [False, True])
def test_a_step_under_way_hides_in_positions_and_may_not_be_launched(launched: bool, device: torch.device) -> None:
    """The next step is placed while a pass runs; a caller that stops leaves it so."""
    ours, theirs = pair_of("h2o", device, batch=2)
    for session in (ours, theirs):
        session.prefill([random_tokens(12, 1, 40), random_tokens(5, 2, 40)])
    for turn in range(3):
        assert_same_step(ours, theirs, random_tokens(2, turn, 40))
        positions = torch.tensor(ours.lengths, device=device)[:, None]
        step = Step(positions * 0 + 7, positions, role="generated")
        assert takes_fast_steps(ours)
        if launched:
            ours.runner.step(step, ours.cache)
        assert_same_keys(ours, theirs)


def test_the_last_token_of_a_single_row_can_be_taken_back_before_it_evicts(device: torch.device) -> None:
    """As on the CPU's fast path, where the runner does so when logits are not finite."""
    ours, theirs = pair_of("a2sf", device)
    for session in (ours, theirs):
        session.prefill([random_tokens(12, 1, 40)])
        session.decode([2])
    ours.decode([3])
    ours.rollback([13])
    assert ours.cache.physical_lengths == [BUDGET]
    assert_same_step(ours, theirs, [4])
    assert_same_keys(ours, theirs)


def test_generated_tokens_of_snapkv_can_be_taken_back(device: torch.device) -> None:
    ours, theirs = pair_of("snapkv", device, batch=2)
    for session in (ours, theirs):
        session.prefill([random_tokens(30, row, 40) for row in range(2)])
        for token in range(3):
            session.decode([token] * 2)
        session.rollback([31, 33])
    for token in range(2):
        assert_same_step(ours, theirs, [token] * 2)
    assert_same_keys(ours, theirs)


def test_logits_that_are_not_finite_name_their_layer(device: torch.device) -> None:
    model = build(CONFIG, "dense", device)
    session = session_of(fast_runner(model), "a2sf", 2)
    session.prefill([random_tokens(20, row, 40) for row in range(2)])
    session.decode([1, 2])
    damaged = model.layers[1].feed_forward_norm
    assert damaged is not None
    damaged[0] = float("nan")
    with pytest.raises(NumericalError, match="first in layer 1"):
        session.decode([1, 2])


def test_what_the_kernels_do_not_compute_is_left_to_the_general_path(device: torch.device) -> None:
    runner = fast_runner(build(CONFIG, "dense", device))
    model = runner.model
    make = A2sfCache
    inside = Session(runner, make(CONFIG, 1, 8, model.dtype, device, A2sfConfig(budget=9, positions="cache")))
    inside.prefill([[1, 2, 3]])
    assert not takes_fast_steps(inside)
    session = session_of(runner, "a2sf")
    session.prefill([[1, 2, 3]])
    assert takes_fast_steps(session)
    assert session.cache.lengths == [3]


def test_stepwise_prompts_evict_as_the_general_path_does(device: torch.device) -> None:
    settings = A2sfConfig(budget=6, mode="stepwise")
    sessions = []
    for runner in (fast_runner(build(CONFIG, "dense", device)), general_runner(build(CONFIG, "dense", CPU))):
        model = runner.model
        sessions.append(Session(runner, A2sfCache(CONFIG, 2, 8, model.dtype, model.device, settings)))
    for session in sessions:
        session.prefill([random_tokens(9, 1, 40), random_tokens(9, 2, 40)])
    for token in range(2):
        assert_same_step(*sessions, [token] * 2)
    assert_same_keys(*sessions)


# ── sinks and a window ───────────────────────────────────────────────────────────────────────────────────────────────


def windowed(device: torch.device, batch: int, settings: SinkWindowConfig) -> tuple[Session, Session]:
    make: Callable[..., KVCache] = SinkWindowCache
    runners = fast_runner(build(CONFIG, "dense", device)), general_runner(build(CONFIG, "dense", CPU))
    ours, theirs = (
        Session(runner, make(CONFIG, batch, 8, runner.model.dtype, runner.model.device, settings)) for runner in runners
    )
    return ours, theirs


@pytest.mark.parametrize("sinks", [0, 2])
def test_steps_behind_a_window(sinks: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = windowed(device, 2, SinkWindowConfig(sinks, 6))
    passes = count_captures(ours, monkeypatch)
    for session in (ours, theirs):
        session.prefill([random_tokens(n, n, 40) for n in (9, 4)])
    for turn in range(4):
        assert_same_step(ours, theirs, random_tokens(2, turn, 40))
    assert len(passes) == 4
    for session in (ours, theirs):
        session.rollback([11, 7])
    assert_same_step(ours, theirs, [1, 2])
    assert ours.cache.positions(0).tolist() == theirs.cache.positions(0).tolist()


def test_a_window_drops_tokens_in_front_of_a_captured_step(device: torch.device) -> None:
    """Slots are compacted when the slack is used up."""
    ours, theirs = windowed(device, 2, SinkWindowConfig(2, 6))
    prompts = [random_tokens(262, 1, 40), random_tokens(250, 2, 40)]  # room for 2 + 6 and the slack, twice 128
    for session in (ours, theirs):
        session.prefill(prompts)
    for turn in range(4):
        assert_same_step(ours, theirs, random_tokens(2, turn, 40))
    assert ours.cache.positions(0).tolist() == theirs.cache.positions(0).tolist()


def test_renumbered_positions_take_the_general_path(device: torch.device) -> None:
    ours, _ = windowed(device, 1, SinkWindowConfig(2, 6, renumber=True))
    ours.prefill([random_tokens(12, 1, 40)])
    assert not takes_fast_steps(ours)
