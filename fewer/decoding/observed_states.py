"""What a drafter has been told of the target's hidden states and has not used yet."""

from __future__ import annotations

import torch
from torch import Tensor


class ObservedStates:
    def __init__(self) -> None:
        self.rows: list[Tensor] = []  # pieces [n, d]
        self.last: Tensor | None = None  # [1, d] of the last token that the target was fed

    def observe(self, hidden: Tensor) -> None:
        self.rows.append(hidden)

    def take(self, length: int) -> tuple[Tensor, int] | None:
        """The rows [n, d] that are new, and the position of the first, given the length of a text whose last token the
        target has not been fed; None where it was told nothing yet."""
        if self.rows:
            new = self.rows[0] if len(self.rows) == 1 else torch.cat(self.rows)
            self.rows, self.last = [], new[-1:]
            return new, length - 1 - len(new)
        return None if self.last is None else (self.last[:0], length - 1)
