"""CUDA's fast path over scored keys: one token in every row, the same launches each time.

The kernels (`fewer.kernels.triton.scored_attention`) act on a token's attention at the beginning of the next pass, as
the CPU's fast path does: until then it lies in `CapturedSteps`, whose `received` hands it out to whatever comes first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewer.cache.eviction import Eviction
from fewer.cache.scored import ScoredCache, counts_of
from fewer.cache.scored_storage import ScoredStorage
from fewer.kernels.from_host import write_from_host
from fewer.kernels.list_attention import probabilities
from fewer.kernels.new_tokens import NewTokens
from fewer.model.config import ModelConfig
from fewer.model.step import Step
from fewer.slots import Ahead, Capture


class CapturedScoredCache(ScoredCache):
    """Where a row is over its budget, the host need not know which slot each head gives up."""

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        policy: Eviction,
    ):
        super().__init__(config, batch, capacity, dtype, device, policy)
        self.captured: CapturedSteps | None = None  # the tensors of the steps, and the one under way
        ranked = not policy.while_generating or type(self).importance is ScoredStorage.importance
        self.captures = ranked and self.keys_rotated and len(self.maps) == 1  # or the kernels do not know how

    @property
    def nbytes(self) -> int:
        return super().nbytes + (0 if self.captured is None else self.captured.nbytes)

    @torch.inference_mode(False)
    def capture(self, step: Step) -> Capture | None:
        """Place a token in every row: in one over its budget, kernels find the lowest key of every head and give the
        token its slot. The first step behind a prompt ends that."""
        generated = step.role == "generated" or self.policy.mode == "stepwise"
        if not self.captures or not generated or step.lengths is not None:
            return None
        self._catch_up()
        pending = self._is_pending
        if not pending or max(self._stops(pending)) > self.slots.capacity:
            self._prepare(step, 1, whole=False)
            self._drop_tentative()
            pending = False
        captured = self.captured
        if captured is None or not captured.is_current:
            captured = self.captured = CapturedSteps(self)
        elif not pending:
            captured.taken.fill_(-1)  # steps between may have used the slots
        self.placed, self._step, self._tentative = step, None, 0
        captured.stops = self._stops(pending)
        return captured.capture(pending, captured.stops)

    @torch.inference_mode(False)
    def ahead(self) -> Ahead | None:
        """Once a row is over its budget, its steps are all alike."""
        self._catch_up()
        if self.batch > 1 or not self._is_pending or not self._is_full(0):
            return None
        assert self.captured is not None
        self.captured.runs_ahead = True
        return Ahead(self.captured.capture(True, self._stops(True)), None)

    def advance_one(self, position: int) -> int:
        """Commit the token of a pass that ran ahead; the slot is of no use, since every head has its own."""
        self.committed[0] += 1
        return self.slots.counts[0] - 1

    def positions(self, row: int, layer: int = 0, head: int = 0) -> Tensor:
        captured, order = self.captured, layer  # all layers are scored where steps are captured
        if captured is None or captured.stops is None:
            return super().positions(row, layer, head)
        held, gone = self.held[order, row, head, : self.slots.counts[row]], -1  # the step under way stays as it is
        if self._is_full(row) and captured.newest() >= self.committed[0]:
            gone = int(captured.taken[order, row, head])
        elif self._is_full(row):
            before, self.scores = self.scores, self.scores * self.policy.decay + captured.received()
            gone, self.scores = int(self._lowest()[order, row, head]), before
        return torch.cat((held[:gone], held[gone + 1 :]) if gone >= 0 else (held,)).long().sort().values

    @property
    def _is_pending(self) -> bool:
        """Whether the last token's attention lies where the next pass finds it."""
        captured = self.captured
        return captured is not None and captured.stops is None and self.unsettled == captured.received

    def _stops(self, pending: bool) -> list[int]:
        """Slots in use with one more token a row; `pending`: where a row is over its budget, a key goes for it."""
        return [n + (not (pending and self._is_full(row))) for row, n in enumerate(self.slots.counts)]

    @torch.inference_mode(False)
    def commit(self, kept: Sequence[int | Sequence[int]]) -> None:
        captured = self.captured
        if captured is None or captured.stops is None:
            super().commit(kept)
            return
        added = counts_of(kept)
        self._end(captured, added)
        self.placed = None
        self.committed = [tokens + more for tokens, more in zip(self.committed, added, strict=True)]
        if self.policy.while_generating and all(added):
            self.unsettled = captured.received
        elif self.policy.while_generating:
            self.unsettled = None
            self._add_to_scores(captured.received(), added)
            self._evict_one()

    def _end(self, captured: CapturedSteps, added: Sequence[int]) -> None:
        """Keep the token of the rows where `added` is 1; in the others, what lay in the last slot takes its place."""
        stops, captured.stops = captured.stops, None
        assert stops is not None
        displaced = [stop == count for stop, count in zip(stops, self.slots.counts, strict=True)]
        holes = [old and not kept for old, kept in zip(displaced, added, strict=True)]
        if any(holes):
            self._fill(captured.taken.long(), holes)
        for row, (stop, kept) in enumerate(zip(stops, added, strict=True)):
            if kept:
                self.slots.counts[row] = stop
            else:  # what a step leaves that is given up may not be finite
                self._clear(self.slots, row, stop - 1, stop)

    def _catch_up(self) -> None:
        """No more of the passes that were placed, or that ran ahead, is committed. The last one was launched or not."""
        captured = self.captured
        if captured is None or (captured.stops is None and not captured.runs_ahead):
            return
        if captured.newest() >= self.committed[0]:
            captured.stops = captured.stops or list(self.slots.counts)
            self.unsettled = None  # the pass has acted on it
            self._end(captured, [0] * self.batch)
            captured.taken.fill_(-1)
        self.placed, captured.stops, captured.runs_ahead = None, None, False

    def _give_up(self) -> None:
        self._catch_up()
        super()._give_up()

    def _settle(self) -> None:
        self._catch_up()
        super()._settle()

    @torch.inference_mode(False)
    def truncate(self, row: int, length: int) -> None:
        self._catch_up()
        if self.batch > 1:
            self._settle()
        super().truncate(row, length)


class CapturedSteps:
    """The tensors of steps over one pool [L, 2, B, Hk, S, D], and what the host knows of the step under way."""

    def __init__(self, cache: ScoredCache):
        layers, batch, kv_heads, capacity = cache.scores.shape
        device, self.cache = cache.device, cache
        self.pool, self.scores, self.held = cache.pools[cache.kind], cache.scores, cache.held
        seen = capacity if cache.policy.while_generating else 0
        self.logits = torch.zeros(layers, batch, cache.config.heads, seen, device=device)  # of the newest token
        self.lse = torch.zeros(layers, batch, cache.config.heads, device=device)
        self.taken = torch.full((layers, batch, kv_heads), -1, dtype=torch.int32, device=device)  # its slot
        self.rows = torch.zeros(batch, 4, dtype=torch.int32, device=device)  # as `ScoredKeys` has them
        self.told: list[list[int]] = []  # what `rows` holds
        self.stops: list[int] | None = None  # slots in use with the token of the step under way
        self.runs_ahead = False  # passes may have been launched that the host has not asked for one by one

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.logits, self.lse, self.taken, self.rows))

    @property
    def is_current(self) -> bool:
        """Whether these are still the cache's tensors: they are replaced when its room changes."""
        cache = self.cache
        return cache.pools[cache.kind] is self.pool and cache.scores is self.scores and cache.held is self.held

    def capture(self, scored: bool, stops: Sequence[int]) -> Capture:
        """The next step: row b then has `stops[b]` slots in use. `scored`: the token before is still to be acted on."""
        cache = self.cache
        recent = [limit[1] if limit else 0 for limit in cache.limits]
        told = [
            [stop, int(scored), int(stop == count), newest]
            for stop, count, newest in zip(stops, cache.slots.counts, recent, strict=True)
        ]
        if told != self.told:  # rows that are full tell the same at every step
            write_from_host(self.rows, told)
        self.told = told
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

    def newest(self) -> int:
        """Position of the last token that the kernels placed in the first row, -1 where others came since. Waits."""
        slot = int(self.taken[0, 0, 0])
        return int(self.held[0, 0, 0, slot]) if slot >= 0 else -1

    def received(self) -> Tensor:
        """What the newest token gave each slot: [L, B, Hk, S] float32."""
        shares = probabilities(self.logits, self.lse).unflatten(2, (self.taken.shape[2], -1)).sum(3)
        counts = torch.tensor(self.cache.slots.counts, device=shares.device)[:, None, None]
        return shares.masked_fill(torch.arange(shares.shape[3], device=shares.device) >= counts, 0.0)
