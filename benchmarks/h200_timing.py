"""Timing on a GPU: many launches in one CUDA graph, median over replays. On the CPU each call runs once."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], object], repeats: int = 5) -> float:
    """Median wall seconds of `work`, from an idle device to an idle device, after one run to warm up."""
    work()
    times = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        work()
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def seconds_in_graph(launches: Sequence[Callable[[], object]], repeats: int = 7) -> float:
    """Seconds a launch, with all of them in one graph, so that the host's time does not count."""
    if not torch.cuda.is_available():
        return seconds_of(lambda: [launch() for launch in launches], 1) / len(launches)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        launches[0]()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times) / len(launches)


def median_rate(work: Callable[[], object], amount: float, repeats: int = 5) -> float:
    """`amount` a second."""
    return amount / seconds_of(work, repeats)
