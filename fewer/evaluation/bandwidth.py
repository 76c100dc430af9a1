"""Memory read bandwidth as this process reaches it: the limit that decoding rates are held against."""

from __future__ import annotations

import time

import torch

SIZE = {"cpu": 256 << 20, "cuda": 2 << 30}  # bytes: several times the last-level cache


class BandwidthProbe:
    """Reads one large tensor again and again; `measure` may be called between other work. Bytes a second."""

    def __init__(self, device: torch.device, size: int | None = None):
        self.device = device
        count = (size or SIZE[device.type]) // 4
        self.data = torch.ones(count, dtype=torch.float32, device=device)
        self.best = 0.0

    @torch.inference_mode()
    def measure(self, repeats: int = 3) -> float:
        """The fastest of `repeats` sums in this call; `best` keeps the fastest of all calls."""
        fastest = 0.0
        self.data.sum()
        for _ in range(repeats):
            self._wait()
            start = time.perf_counter()
            self.data.sum()
            self._wait()
            fastest = max(fastest, self.data.nbytes / (time.perf_counter() - start))
        self.best = max(self.best, fastest)
        return fastest

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def read_bandwidth(device: torch.device, size: int | None = None, repeats: int = 5) -> float:
    """Bytes a second that `device` reads from memory with the threads in use."""
    return BandwidthProbe(device, size).measure(repeats)
