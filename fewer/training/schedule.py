"""Learning-rate schedules: linear warm-up, then constant, linear or cosine decay, or a plateau between two ramps."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine", "trapezoid"]
SCHEDULES: tuple[Schedule, ...] = ("constant", "linear", "cosine", "trapezoid")


def learning_rate_factor(schedule: Schedule, step: int, steps: int, warmup: int = 0, final: float = 0.0) -> float:
    """What the learning rate is multiplied by in update `step` of 0..steps-1.

    Warm-up: (step + 1) / warmup. Then, with p = (step - warmup) / (steps - warmup) in [0, 1), from 1 down to `final`:
    linear 1 - (1 - final)·p, cosine final + (1 - final)·(1 + cos πp) / 2. A trapezoid is 1 until as many updates are
    left as it warmed up for, then left / warmup; on both ramps it is at least `final`.
    """
    if schedule == "trapezoid":
        return min(1.0, *(max(each / max(1, warmup), final) for each in (step + 1, steps - step)))
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, steps - warmup)
    if schedule == "linear":
        return 1.0 - (1.0 - final) * progress
    return final + (1.0 - final) * (1.0 + math.cos(math.pi * progress)) / 2.0
