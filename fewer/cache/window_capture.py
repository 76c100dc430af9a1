"""Steps of CUDA's fast path over sinks and a window, once tokens have been dropped and slots are no positions."""

from __future__ import annotations

import torch
from torch import Tensor

from fewer.cache.slot_map import SlotMap
from fewer.kernels.from_host import write_from_host
from fewer.slots import Capture


class WindowPlaces:
    """Where each row's new token goes, and what it sees: `places` [1, B, 4] int32, as the kernel's `Share` has them."""

    def __init__(self, slots: SlotMap):
        self.slots = slots
        with torch.inference_mode(False):
            self.places = torch.zeros(1, len(slots.counts), 4, dtype=torch.int32, device=slots.device)

    def capture(self, pool: Tensor) -> Capture:
        """For the next token of every row, behind its sinks and an unbroken run; pool [L, 2, B, Hk, capacity, D]."""
        from fewer.kernels.triton.attention_decode import Share, attend_new  # where there is a GPU

        sinks, window = self.slots.sinks, self.slots.window
        assert window is not None
        told = [[count, count, max(0, count + 1 - window), sinks] for count in self.slots.counts]
        write_from_host(self.places, [told])
        key = pool.data_ptr(), pool.shape, pool.dtype, self.places.data_ptr()
        share = Share(self.places)
        return Capture(key, lambda layer, new: attend_new(new, pool[layer, 0], pool[layer, 1], share))
