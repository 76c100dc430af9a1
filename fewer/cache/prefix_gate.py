"""Whether a shared prefix is worth a read of its own: measured once for a shape of attention, on this machine.

The paper always splits. Here, g branches that each read P tokens take g·P times the seconds of a token in one row's
attention. One read for all takes P times the larger of that (memory) and g times a token's and row's share of a matrix
product (arithmetic), and one more call and merge.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fewer.kernels.attention import merge
from fewer.kernels.attention_part import attention_part
from fewer.kernels.list_attention import attend_list
from fewer.kernels.shared_prefix import attend_prefix

ROWS, REPEATS = 16, 3
BYTES = 1 << 24  # of keys and values that the rows of the measurement read: more than a core's caches hold


@dataclass(frozen=True)
class SplitCost:
    """Seconds of one layer's attention in a decoding step."""

    row_token: float  # a token that one row reads for itself
    prefix_token: float  # a token and row of a prefix that all rows read together
    level: float  # one more level: its calls, and one more part to merge

    def pays(self, branches: int, tokens: int, nodes: int = 1) -> bool:
        """Whether a prefix that `branches` rows or nodes would read is better read once. The `nodes` of its level share
        the level's cost."""
        saved = branches * self.row_token - max(self.row_token, branches * self.prefix_token)
        return branches > 1 and tokens * saved > self.level / nodes


@functools.cache
def split_cost(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> SplitCost:
    """Time the three things on random numbers, as decoding steps do them: some hundredths of a second. Who asks does so
    before prompts are fed, so never while a graph is recorded."""
    tokens = max(1, BYTES // (2 * ROWS * kv_heads * head_dim * dtype.itemsize))
    q = torch.randn(ROWS, heads, head_dim, device=device).to(dtype)
    k, v = torch.randn(2, ROWS, kv_heads, tokens, head_dim, device=device).to(dtype)
    table, length = (torch.tensor(part, dtype=torch.int32, device=device) for part in ([[0]], [tokens]))
    pointers = torch.tensor([0, ROWS], dtype=torch.int32, device=device)
    scale = head_dim**-0.5

    def prefix(length: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return attend_prefix(q, k, v, table, length, pointers, scale)

    others = torch.zeros(BYTES // 4, device=device)

    def taken(call: Callable[[], object]) -> float:
        return seconds(call, lambda: others.add_(1.0), device)

    if device.type == "cuda":
        from fewer.kernels.triton.merge_heads import merge_into  # where there is a GPU, there is Triton

        pages = torch.arange(ROWS, dtype=torch.int32, device=device)[:, None]
        lengths, short = length.expand(ROWS).contiguous(), torch.ones_like(length)
        out, parts = torch.empty_like(q), torch.zeros(2, *q.shape, device=device)
        rows = taken(lambda: attend_list(q, k, v, pages, None, None, "token", lengths, scale))
        sums = parts[..., 0].contiguous()

        def one_level() -> None:
            prefix(short)
            merge_into(out, parts, sums)

        level = taken(one_level)
    else:
        rows = taken(lambda: attention_part(q[:, :, None], k, v, scale))
        level = taken(lambda: merge([prefix(torch.ones_like(length))] * 2))
    whole = taken(lambda: prefix(length))
    return SplitCost(rows / (ROWS * tokens), max(0.0, whole - level) / (ROWS * tokens), level)


def seconds(call: Callable[[], object], evict: Callable[[], object], device: torch.device) -> float:
    """The fastest of a few calls, after one that warms up. In between the caches fill with something else, as they do
    from one layer's attention to the next's."""
    times = []
    for _ in range(REPEATS + 1):
        evict()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])
