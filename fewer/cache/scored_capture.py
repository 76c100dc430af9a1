"""Steps of CUDA's fast path over scored keys: one token in every row, the same launches each time.

The kernels (`fewer.kernels.triton.scored_attention`) act on a token's attention at the beginning of the next pass, as
the CPU's fast path does: until then it lies here, and `received` hands it out to any other step that comes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fewer.kernels.list_attention import probabilities
from fewer.kernels.new_tokens import NewTokens
from fewer.slots import Capture

if TYPE_CHECKING:
    from fewer.cache.scored import ScoredCache


class CapturedSteps:
    """The tensors of steps over one pool [L, 2, B, Hk, S, D], and what the host knows of the step under way."""

    def __init__(self, cache: ScoredCache):
        layers, batch, kv_heads, capacity = cache.scores.shape
        device, self.cache = cache.device, cache
        self.pool, self.scores, self.held = cache.pools[cache.kind], cache.scores, cache.held
        seen = capacity if cache.policy.while_generating else 0
        self.logits = torch.zeros(layers, batch, cache.config.heads, seen, device=device)  # of the newest token
        self.lse = torch.zeros(layers, batch, cache.config.heads, device=device)
        self.taken = torch.zeros(layers, batch, kv_heads, dtype=torch.int32, device=device)  # its slot
        self.rows = torch.zeros(batch, 4, dtype=torch.int32, device=device)  # as `ScoredKeys` has them
        self.told: list[list[int]] = []  # what `rows` holds
        self.stops: list[int] | None = None  # slots in use with the token of the step under way

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.logits, self.lse, self.taken, self.rows))

    @property
    def is_current(self) -> bool:
        """Whether these are still the cache's tensors: they are replaced when its room changes."""
        cache = self.cache
        return cache.pools[cache.kind] is self.pool and cache.scores is self.scores and cache.held is self.held

    def place(self, scored: bool, stops: Sequence[int]) -> Capture:
        """The next step: row b then has `stops[b]` slots in use. `scored`: the token before is still to be acted on."""
        cache = self.cache
        recent = [limit[1] if limit else 0 for limit in cache.limits]
        told = [
            [stop, int(scored), int(stop == count), newest]
            for stop, count, newest in zip(stops, cache.slots.counts, recent, strict=True)
        ]
        if told != self.told:  # rows that are full tell the same at every step
            self.rows.copy_(torch.tensor(told, dtype=torch.int32), non_blocking=True)
        self.told, self.stops = told, list(stops)
        tensors = self.pool, self.scores, self.held, self.logits, self.lse, self.taken, self.rows
        together, decay = cache.policy.together, cache.policy.decay
        key = *(tensor.data_ptr() for tensor in tensors), self.pool.shape, self.pool.dtype, together, decay
        return Capture(key, self.launch)

    def launch(self, layer: int, new: NewTokens) -> None:
        from fewer.kernels.triton.scored_attention import (  # Triton is imported only where there is a GPU
            ScoredKeys,
            attend_scored,
            place_new,
        )

        scored = ScoredKeys(self.scores, self.held, self.logits, self.lse, self.taken, self.rows)
        if layer == 0:
            place_new(new, scored, self.cache.policy.decay, self.cache.policy.together)
        keys, values = self.pool[layer]
        attend_scored(new, keys, values, scored, layer)

    def received(self) -> Tensor:
        """What the newest token gave each slot: [L, B, Hk, S] float32."""
        shares = probabilities(self.logits, self.lse).unflatten(2, (self.taken.shape[2], -1)).sum(3)
        counts = torch.tensor(self.cache.slots.counts, device=shares.device)[:, None, None]
        return shares.masked_fill(torch.arange(shares.shape[3], device=shares.device) >= counts, 0.0)
