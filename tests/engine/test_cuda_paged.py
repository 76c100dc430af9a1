"""Steps over pages that a graph replays give the general path's logits: as pages fill, are shared, copied and cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fewer.cache import PagedCache, PagedConfig
from fewer.engine.session import Session
from fewer.errors import PoolExhausted
from fewer.model.step import Step
from fewer.slots import Capture
from tests.engine.test_cuda import CPU, SMALL, build, fast_runner, general_runner
from tests.random_model import config_of, random_tokens

CONFIG = config_of(**SMALL | {"heads": 6, "kv_heads": 2, "qk_norm": "head"})
SETTINGS = PagedConfig(page_size=16)


class Counted(PagedCache):
    """Keeps the keys of its captures."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.keys: list[Any] = []

    def capture(self, step: Step) -> Capture | None:
        found = super().capture(step)
        self.keys += [] if found is None else [found.key]
        return found


def pair(
    batch: int, device: torch.device, dtype: torch.dtype = torch.float32, settings: PagedConfig = SETTINGS
) -> tuple[Session, Session]:
    runners = fast_runner(build(CONFIG, "dense", device, dtype)), general_runner(build(CONFIG, "dense", CPU))
    ours, theirs = (
        Session(runner, Counted(CONFIG, batch, 64, runner.dtype, runner.device, settings)) for runner in runners
    )
    return ours, theirs


def assert_close(found: Tensor, wanted: Tensor, tolerance: float = 1e-4) -> None:
    assert (found.cpu().float() - wanted).norm() <= tolerance * wanted.norm()


def cache_of(session: Session) -> Counted:
    assert isinstance(session.cache, Counted)
    return session.cache


@pytest.mark.parametrize("lengths", [[14], [30, 3]])
def test_steps_equal_the_general_paths_over_the_ends_of_pages(lengths: list[int], device: torch.device) -> None:
    ours, theirs = pair(len(lengths), device)
    prompts = [random_tokens(length, row, 40) for row, length in enumerate(lengths)]
    assert_close(ours.prefill(prompts), theirs.prefill(prompts))
    for step in range(4):
        tokens = random_tokens(len(lengths), step, 40)
        assert_close(ours.decode(tokens), theirs.decode(tokens))
    assert len(cache_of(ours).keys) == 4
    assert ours.lengths == theirs.lengths == [length + 4 for length in lengths]


def test_rows_that_share_pages_read_them_from_one_place(device: torch.device) -> None:
    ours, theirs = pair(3, device)
    for each in (ours, theirs):
        each.prefill([[*random_tokens(40, 1, 40), row] for row in range(3)])
    assert cache_of(ours).pool.owned == 2 + 3  # two whole pages of all, and one of each row's own
    assert_close(ours.decode([1, 2, 3]), theirs.decode([1, 2, 3]))
    ours.rollback([20, 41, 41])  # into a shared page
    theirs.rollback([20, 41, 41])
    for step in range(2):
        assert_close(ours.decode([step, 4, 5]), theirs.decode([step, 4, 5]))
    assert len(cache_of(ours).keys) == 3


def test_a_row_that_waits_takes_the_general_path(device: torch.device) -> None:
    ours, theirs = pair(2, device)
    for each in (ours, theirs):
        each.prefill([[1, 2, 3], [4, 5]])
    assert_close(ours.decode([6, 7], [True, False])[:1], theirs.decode([6, 7], [True, False])[:1])
    assert not cache_of(ours).keys
    assert_close(ours.decode([8, 9]), theirs.decode([8, 9]))
    assert len(cache_of(ours).keys) == 1


def test_a_step_that_finds_no_page_changes_nothing(device: torch.device) -> None:
    ours, _ = pair(2, device, settings=PagedConfig(16, pages=2))
    ours.prefill([random_tokens(16, 1, 40), [2]])
    for _ in range(2):
        with pytest.raises(PoolExhausted):
            ours.decode([1, 2])
    assert ours.lengths == [16, 1]
    assert cache_of(ours).pool.owned == 2


@pytest.mark.gpu
def test_replays_in_bfloat16_stay_near_the_cpus_float32() -> None:
    ours, theirs = pair(70, torch.device("cuda"), torch.bfloat16)
    prompts = [random_tokens(20, 0, 40) + random_tokens(1 + row, row, 40) for row in range(70)]
    assert_close(ours.prefill(prompts), theirs.prefill(prompts), 0.05)
    for step in range(40):
        tokens = random_tokens(70, step, 40)
        assert_close(ours.decode(tokens), theirs.decode(tokens), 0.05)
    keys = cache_of(ours).keys
    assert len(keys) == 40 > len(set(keys))
