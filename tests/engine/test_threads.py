"""The governor settles on what is faster now, and notices when that changes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fewer.engine import threads
from fewer.engine.threads import Governor


class Machine:
    """A clock that a step advances by what it costs at the thread count in use."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.threads, self.cost = 0.0, 2, {1: 1.6, 2: 1.0}
        monkeypatch.setattr(threads, "_use", lambda count: setattr(self, "threads", count))
        monkeypatch.setattr(threads.time, "perf_counter", lambda: self.now)

    def run(self, governor: Governor, steps: int) -> list[int]:
        used = []
        for _ in range(steps):
            with governor:
                used.append(self.threads)
                self.now += self.cost[self.threads]
        return used


def test_all_threads_are_kept_on_an_idle_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, governor = Machine(monkeypatch), Governor(2)
    used = machine.run(governor, 200)
    assert used[2 * Governor.PROBE :] == [2] * (200 - 2 * Governor.PROBE)


def test_a_taken_core_is_noticed_within_a_dozen_steps_and_its_return_too(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, governor = Machine(monkeypatch), Governor(2)
    machine.run(governor, 50)
    machine.cost = {1: 1.7, 2: 5.0}
    machine.run(governor, 4 * Governor.PROBE)
    assert machine.run(governor, 200).count(2) <= 3 * Governor.PROBE  # now and then it asks whether the core is back
    machine.cost = {1: 1.6, 2: 1.0}
    machine.run(governor, Governor.PERIOD + 2 * Governor.PROBE)
    assert machine.run(governor, 20) == [2] * 20


def test_a_narrow_win_of_one_thread_is_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, governor = Machine(monkeypatch), Governor(2)
    machine.cost = {1: 0.95, 2: 1.0}
    assert machine.run(governor, 100).count(1) == Governor.PROBE


def test_after_a_pause_all_threads_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, governor = Machine(monkeypatch), Governor(2)
    machine.cost = {1: 1.7, 2: 5.0}
    machine.run(governor, 500)
    assert governor.choice == 1
    machine.cost = {1: 1.6, 2: 1.0}
    machine.now += 2 * Governor.PAUSE
    assert machine.run(governor, 20)[2 * Governor.PROBE :] == [2] * (20 - 2 * Governor.PROBE)


def test_between_steps_all_threads_are_back(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, governor = Machine(monkeypatch), Governor(2)
    machine.cost = {1: 1.0, 2: 9.0}
    machine.run(governor, 40)
    assert governor.choice == 1 and machine.threads == 2


def test_openmp_is_told_to_spin_briefly_before_torch_loads_unless_the_user_said_otherwise() -> None:
    code = "import os, fewer.engine.threads as t; t.prepare(); print(os.environ.get('GOMP_SPINCOUNT'))"
    for setting, expected in (
        ({}, threads.SPIN_COUNT),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "active"}, "None"),
    ):
        done = subprocess.run([sys.executable, "-c", code], env=setting, capture_output=True, text=True, cwd=".")
        assert done.stdout.strip() == expected, done.stderr
