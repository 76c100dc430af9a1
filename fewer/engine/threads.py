"""Threads on the CPU: how OpenMP waits, and how many threads a decoding step is worth right now.

A decoding step is a few hundred parallel regions of some microseconds. When another process wants one of the cores,
the worker on it is descheduled for milliseconds in the middle of a region and everybody waits for it; a worker that
spins between regions makes it worse, because it burns the time slice that it needs later. So

- `prepare` tells OpenMP to spin briefly and then sleep (read once, before torch loads);
- `Governor` compares the steps' times with all threads and with one, and uses what is faster at the moment.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from types import TracebackType

SPIN_COUNT = "2000"  # iterations a worker spins before it sleeps: enough to bridge the gap between two operations


def prepare(threads: int | None = None) -> None:
    """Set OpenMP's waiting and thread count for this process; variables that are already set win."""
    if "torch" not in sys.modules:
        if "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
        if threads is not None:
            os.environ["OMP_NUM_THREADS"] = str(threads)
    elif threads is not None:
        sys.modules["torch"].set_num_threads(threads)


class Governor:
    """Chooses between all threads and one for short steps: `with governor: step`.

    It measures PROBE steps of each at the start, then again every PERIOD steps, and at once when PROBE steps in a row
    take SLOW times what this choice last took. One thread must win clearly, and is soon doubted: after RETRY steps,
    then twice as many, and after a pause, because whoever took the core may have gone. The work of one step must not
    depend on the thread count.
    """

    PROBE = 4
    PERIOD = 256
    RETRY = 32
    SLOW = 1.5
    CLEARLY = 0.9  # of the time with all threads
    PAUSE = 0.5  # seconds without a step

    def __init__(self, threads: int):
        self.all = threads
        self.choice = threads
        self.usual = 0.0  # seconds a step, when the choice was made
        self._probing = threads
        self._times: list[float] = []
        self._first = 0.0  # seconds a step in the probe before this one
        self._recent: list[float] = []
        self._since = 0
        self._until = self.PERIOD  # steps until the next doubt
        self._start = self._end = 0.0
        # 0: probe the choice; 1: probe the other; 2: settled; -1: nothing to choose
        self._phase = 0 if threads > 1 else -1

    def __enter__(self) -> None:
        if self._phase >= 0:
            now = time.perf_counter()
            if self._phase == 2 and self.choice < self.all and now - self._end > self.PAUSE:
                self._phase, self._probing = 0, self.choice
                self._until = self.RETRY
            _use(self._probing if self._phase < 2 else self.choice)
            self._start = now

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._phase < 0:
            return
        self._end = time.perf_counter()
        took = self._end - self._start
        if self._phase == 2:
            self._watch(took)
        else:
            self._probe(took)
        _use(self.all)  # whatever runs between steps (a prefill) has all threads

    def _watch(self, took: float) -> None:
        self._since += 1
        self._recent.append(took)
        if len(self._recent) == self.PROBE:
            slow = min(self._recent) > self.SLOW * self.usual
            self._recent.clear()
            if slow or self._since >= self._until:
                self._phase, self._probing = 0, self.choice

    def _probe(self, took: float) -> None:
        self._times.append(took)
        if len(self._times) < self.PROBE:
            return
        typical = statistics.median(self._times[1:])  # the first step after a switch wakes threads
        self._times.clear()
        if self._phase == 0:
            self._first, self._phase = typical, 1
            self._probing = 1 if self.choice > 1 else self.all
            return
        if typical < self._first * (self.CLEARLY if self._probing < self.all else 1.0):
            self.choice, self.usual, self._until = self._probing, typical, self.RETRY
        else:
            self.usual, self._until = self._first, 2 * self._until
        if self.choice == self.all or self._until > self.PERIOD:
            self._until = self.PERIOD
        self._phase, self._since = 2, 0


def _use(threads: int) -> None:
    torch = sys.modules["torch"]
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)
