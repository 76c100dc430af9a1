"""Greedy decoding of one row on CUDA: the GPU does not wait for the host.

A pass leaves its most likely token and the next position where the next pass reads them. Over a cache whose launches
stay the same (`Ahead`) a pass is launched before the token of the one in front has arrived. Over others (`Capture`) the
host commits and places while a pass runs, and launches the next one when the token is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fewer.kernels.from_host import from_host
from fewer.model.step import Step
from fewer.slots import Ahead, Capture, ContiguousCache, KVCache

if TYPE_CHECKING:
    from fewer.engine.cuda import CudaDecoder


class NotFinite(Exception):
    """A pass over `step` gave logits that are not finite; the cache holds its token."""

    def __init__(self, step: Step):
        super().__init__("logits are not finite")
        self.step = step


def is_finite(report: Tensor) -> bool:
    """Whether the logits in a report [2, B] are; waits for it."""
    return bool(report[1].cpu().to(torch.int32).view(torch.float32).isfinite().all())


class Arrivals:
    """Most likely tokens on their way to the host, two at most."""

    def __init__(self, report: Tensor):
        """`report` [2, 1] int64: what a pass leaves, the token and the bits of its logit."""
        self.report, self.on_gpu = report, report.is_cuda
        self.copies = [torch.empty_like(report, device="cpu", pin_memory=self.on_gpu) for _ in range(2)]
        self.events = [torch.cuda.Event() if self.on_gpu else None for _ in range(2)]

    def send(self, index: int) -> None:
        """Behind pass number `index`."""
        self.copies[index % 2].copy_(self.report, non_blocking=True)
        event = self.events[index % 2]
        if event is not None:
            event.record()

    def wait(self, index: int) -> int | None:
        """The token of pass number `index`, or None where its logits are not finite."""
        event = self.events[index % 2]
        if event is not None:
            event.synchronize()
        report = self.copies[index % 2]
        return int(report[0, 0]) if is_finite(report) else None


def run_ahead(
    decoder: CudaDecoder, token: int, position: int, cache: ContiguousCache, ahead: Ahead, count: int
) -> Iterator[int]:
    """Feed `token` at `position`, then each most likely token: yields `count` of them, the last one not fed. `ahead`
    has room for them. Only what is yielded is committed. Ends early when logits are not finite."""
    work = decoder.feed([token], [position])
    arrivals = Arrivals(work.report)

    def launch(index: int) -> None:
        decoder.launch(work, ahead.capture, position + count)
        arrivals.send(index)

    launch(0)
    for index in range(count):
        if index + 1 < count:
            launch(index + 1)
        found = arrivals.wait(index)
        if found is None:
            return
        cache.advance_one(position + index)
        yield found


def run_along(decoder: CudaDecoder, token: int, position: int, cache: KVCache, count: int) -> Iterator[int]:
    """The same for a cache that is asked for every step, until it has no `Capture` for one. Raises NotFinite."""
    step = _step(token, position, decoder.model.device)
    capture: Capture | None = decoder.capture(step, cache)
    if capture is None:
        return
    work = decoder.feed([token], [position])
    arrivals = Arrivals(work.report)
    for index in range(count):
        assert capture is not None
        decoder.launch(work, capture, position + index + 1)
        arrivals.send(index)
        cache.commit([1])
        following = None
        if index + 1 < count:  # the token is not known yet, and the cache does not ask for it
            following = _step(token, position + index + 1, decoder.model.device)
            capture = decoder.capture(following, cache)
        found = arrivals.wait(index)
        if found is None:
            raise NotFinite(step)
        yield found
        if following is None or capture is None:
            return
        assert following.tokens is not None
        following.tokens[0, 0] = token = found  # in the host's memory: a captured pass has its token already
        step = following


def _step(token: int, position: int, device: torch.device) -> Step:
    return Step(
        tokens=torch.tensor([[token]]),
        positions=from_host([[position]], torch.int64, device),
        role="generated",
    )
