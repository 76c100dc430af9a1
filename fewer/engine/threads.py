"""Threads on the CPU. `prepare` runs before torch is imported: OpenMP reads its settings once, when it loads.

A decoding step is a few hundred short parallel regions. A worker that spins between them burns the time slice it
needs later as soon as another process wants its core; a worker that sleeps at once wakes too late. So workers spin
for a short while, then sleep. `OMP_*` and `GOMP_*` variables that are already set win.
"""

from __future__ import annotations

import os
import sys

SPIN_COUNT = "20000"


def prepare(threads: int | None = None) -> None:
    """Set OpenMP's waiting policy and thread count for this process, if torch is not imported yet."""
    if "torch" not in sys.modules:
        if "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
        if threads is not None:
            os.environ["OMP_NUM_THREADS"] = str(threads)
    elif threads is not None:
        sys.modules["torch"].set_num_threads(threads)
