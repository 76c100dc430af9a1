"""Which slot of a row holds which token: the bookkeeping that all layers of one kind share.

A row's live slots are 0..count-1, in ascending position. New tokens go behind them and are tentative until `commit`.
With a window, tokens that no later query may see are evicted when room runs out: the sinks and the last
`window + slack` tokens stay, so that speculation can still roll back. Exactness never rests on eviction: visibility is
decided by position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewer.errors import FewerError
from fewer.kernels.causal import needs_no_mask
from fewer.kernels.from_host import from_host
from fewer.model.step import Step

SLACK = 128  # tokens beyond the window that stay: the largest step, and how far a rollback reaches


@dataclass(slots=True)
class StepPlan:
    """What every layer of one kind does in one step."""

    step: Step
    start: int | None  # first slot written when all rows agree, else None
    slots: Tensor | None  # [B, T] slots written, when rows differ
    stop: int  # slots 0..stop-1 are read
    first: int  # … from this one on
    causal: bool  # query t sees slots 0..stop-T+t: the plain triangle, which attention draws itself
    make_mask: Callable[[], Tensor] | None  # None: it is made, or every slot is visible
    made: Tensor | None = None  # the mask, once there is one

    @property
    def mask(self) -> Tensor | None:
        """[B or 1, 1, T, stop - first] bool; None: every slot is visible, or `causal` says which."""
        return None if self.causal else self.visible

    @property
    def visible(self) -> Tensor | None:
        """The mask, of a triangle, too; None: every slot. Layers share it, and it is made when the first one asks."""
        if self.made is None and self.make_mask is not None:
            self.made = self.make_mask()
        return self.made


class SlotMap:
    """Slots of B rows in layers that keep `sinks` first tokens and a `window` of the last ones (None: all)."""

    by_chunk = False  # all of a prompt's step sees what its first query does: `_mask` of a subclass says so

    def __init__(
        self,
        batch: int,
        capacity: int,
        device: torch.device,
        window: int | None = None,
        sinks: int = 0,
        slack: int = SLACK,
    ) -> None:
        self.window, self.sinks, self.slack = window, sinks, slack
        self.capacity = capacity = self.bounded(capacity)
        self.device = device
        self.counts = [0] * batch  # committed slots
        self.starts = [0] * batch  # position at which each row's text begins here: what is before lies elsewhere
        self.pending: list[int] = [0] * batch  # slots of the step under way
        self.table = torch.zeros(batch, capacity, dtype=torch.int64, device=device)  # position of each slot

    def bounded(self, tokens: int) -> int:
        """Slots needed for a text of this many tokens."""
        return tokens if self.window is None else min(tokens, self.sinks + self.window + 2 * self.slack)

    @property
    def budget(self) -> int:
        """The most tokens that a query sees, itself included, where there is a window."""
        return self.sinks + (self.window or 0)

    def has_gap(self, plan: StepPlan) -> bool:
        """Some query of the step may see sinks, a gap and its window."""
        return self.window is not None and self.sinks > 0 and plan.stop > self.budget

    @property
    def evicts(self) -> bool:
        return self.window is not None and self.capacity == self.sinks + self.window + 2 * self.slack

    def plan(self, step: Step, new: list[int], width: int) -> tuple[StepPlan, Tensor | None]:
        """Place a step of `new[b]` tokens a row, padded to `width`. Also returns the eviction [B, n]: old slots that
        move to slots 0..n-1 first, or None."""
        moves = self.make_room(width)
        self.pending = new
        counts = self.counts
        batch, same = len(counts), min(counts) == max(counts)
        stop = max(counts) + width
        if stop > self.capacity:
            raise FewerError(
                f"the cache holds {self.capacity} tokens but this step needs {stop}: ask for a larger capacity"
            )
        if same:
            slots = None
            self.table[:, counts[0] : stop] = step.positions
        else:
            slots = torch.tensor(counts, device=self.device)[:, None] + torch.arange(width, device=self.device)
            self.table.scatter_(1, slots, step.positions)
        start = counts[0] if same else None
        ragged = not same or min(new) < width
        if width == 1 and same and batch >= 1 and not ragged:
            return self._plan_one(step, start or 0, stop), moves
        simple = self.window is None and step.mask == "causal" and same and step.layer_plan is None
        unmasked = step.role == "prompt" and max(new) == width and needs_no_mask(self.device)
        causal = simple and (counts[0] == 0 or unmasked)
        # Padding sits behind every real token, so a triangle hides it.
        return StepPlan(step, start, slots, stop, 0, causal, lambda: self._mask(step, new, width, stop)), moves

    def _plan_one(self, step: Step, start: int, stop: int) -> StepPlan:
        """One new token in every row: no mask unless a window leaves a gap behind the sinks."""
        first, mask = 0, None
        if self.window is not None and stop > self.window:
            visible = self._in_window(step.positions, stop)
            if self.sinks == 0 and len(self.counts) == 1:
                first = stop - int(visible.sum())
            else:
                mask = visible[:, None]
        return StepPlan(step, start, None, stop, first, causal=False, make_mask=None, made=mask)

    def _mask(self, step: Step, new: list[int], width: int, stop: int) -> Tensor:
        """[B or 1, 1, T, stop] bool: slots that hold a token, that the mask kind shows, inside the window."""
        counts = torch.tensor(self.counts, device=self.device)[:, None, None]
        slot = torch.arange(stop, device=self.device)  # [S]
        query = torch.arange(width, device=self.device)[:, None]  # [T, 1]
        offset = slot - counts  # [B, 1, S]: index among the new tokens, negative = committed
        real = offset < torch.tensor(new, device=self.device)[:, None, None]
        if step.mask == "tree":
            assert step.ancestors is not None
            ancestors = step.ancestors.to(self.device).expand(len(self.counts), width, width)
            index = offset.clamp(0, width - 1).expand(-1, width, -1)
            among_new = ancestors.gather(2, index)
        elif step.mask == "causal":
            among_new = offset <= query
        else:
            among_new = torch.ones(1, width, 1, dtype=torch.bool, device=self.device)
        visible = (offset < 0) | (among_new & real)  # [B, T, S]
        if self.window is not None:
            visible = visible & self._in_window(step.positions, stop)
        return visible[:, None]

    def _in_window(self, positions: Tensor, stop: int) -> Tensor:
        """[B, T, S]: keys of the sinks, and those less than `window` positions before the query (or after it)."""
        assert self.window is not None
        keys = self.table[:, None, :stop]
        return (positions[:, :, None] - keys < self.window) | (keys < self.sinks)

    def reserve_row(self, positions: Tensor) -> int:
        """Place a step [1, T] of the only row -> the first of its slots, for which there is room."""
        slot, width = self.counts[0], positions.shape[1]
        self.pending = [width]
        self.table[:, slot : slot + width] = positions
        return slot

    def place_each(self, positions: Tensor) -> None:
        """Place one token [B, 1] behind each row's slots, where there is room."""
        self.pending = [1] * len(self.counts)
        slots = from_host(self.counts, torch.int64, self.device)[:, None]
        self.table.scatter_(1, slots, positions)

    def make_room(self, width: int) -> Tensor | None:
        """Evict where `width` more tokens would not fit: old slots [B, n] that move to slots 0..n-1, or None."""
        if self.window is None or max(self.counts) + width <= self.capacity:
            return None
        keep = self.sinks + self.window + self.slack
        moves = []
        for row, count in enumerate(self.counts):
            dropped = max(0, count - keep)
            first = min(self.sinks, count)
            stays = (
                torch.arange(first, device=self.device),
                torch.arange(first + dropped, count, device=self.device),
            )
            moves.append(torch.cat(stays))
            self.counts[row] = count - dropped
        return self._move(moves)

    def commit(self, kept: Sequence[int | Sequence[int]]) -> Tensor | None:
        """Keep a prefix (int) or a choice (ascending list) of each row's pending slots. Returns moves or None."""
        chosen = [list(range(choice)) if isinstance(choice, int) else list(choice) for choice in kept]
        for row, choice in enumerate(chosen):
            if any(index >= self.pending[row] for index in choice):
                raise ValueError(f"row {row}: cannot keep {choice} of {self.pending[row]} new tokens")
        before, self.pending = self.counts, [0] * len(self.counts)
        self.counts = [count + len(choice) for count, choice in zip(before, chosen, strict=True)]
        if all(choice == list(range(len(choice))) for choice in chosen):
            return None
        return self._move(
            [
                torch.tensor([*range(count), *(count + index for index in choice)], device=self.device)
                for count, choice in zip(before, chosen, strict=True)
            ]
        )

    def count_before(self, row: int, position: int) -> int:
        """Slots of `row` whose tokens stand before `position`. Raises FewerError where a query at `position` would miss
        some that it may see, because they were evicted."""
        live = self.table[row, : self.counts[row]]
        count = int((live < position).sum())
        if self.window is not None and count < position - self.starts[row]:
            visible = position - max(self.sinks, self.starts[row], position - self.window + 1)
            if count - self.sinks < visible:
                raise FewerError(
                    f"cannot go back to {position} tokens: the window's tokens before that are no longer stored; go "
                    f"back less far (at least {self.slack} tokens are possible) or start again at 0"
                )
        return count

    def _move(self, sources: list[Tensor]) -> Tensor:
        """Pad the rows' source slots to one width, move the position table, and return [B, n] for the layers."""
        width = max(len(source) for source in sources)
        padded = [torch.nn.functional.pad(source, (0, width - len(source))) for source in sources]
        moves = torch.stack(padded)
        self.table[:, :width] = self.table.gather(1, moves)
        return moves
