"""Where kernels find heads of different rules: one table for all layers, and each step's places.

On CUDA a layer whose heads lie in several pools is one kernel (`fewer.kernels.triton.attention`): heads that keep
everything share the multiprocessors, those with a window have a program each beside them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewer.cache.head_pool import HeadPool
from fewer.kernels.from_host import write_from_host
from fewer.kernels.new_tokens import NewTokens
from fewer.slots import Capture


class HeadHomes:
    """`homes` [layers, Hk, 5] int64 and `places` [pools, B, 4] int32, as the kernel's `Share` has them."""

    def __init__(self, pools: Sequence[HeadPool], heads: Tensor):
        """`heads` [layers, Hk, 2] int64: the pool of each key head, and its place there."""
        self.storages = [pool.storage for pool in pools]
        whole = torch.tensor([pool.slots.window is None for pool in pools])
        self.base = self.storages[int(whole.int().argmax())]  # of heads that keep everything, if there are any
        device, size = self.base.device, self.base.element_size()
        pool, place = heads.unbind(-1)
        order = whole[pool].int().argsort(dim=1, descending=True, stable=True)
        self.long = whole[pool].sum(1).tolist()
        offsets = [[(part.data_ptr() - half.data_ptr()) // size for half, part in zip(self.base, storage, strict=True)]
                   for storage in self.storages]  # fmt: skip
        to_keys, to_values = torch.tensor(offsets)[pool].unbind(-1)
        row, head = torch.tensor([storage.stride()[1:3] for storage in self.storages])[pool].unbind(-1)
        key_head, within = torch.arange(pool.shape[1]).expand_as(pool), place * head
        table = torch.stack((key_head, to_keys + within, to_values + within, row, pool), dim=-1)
        with torch.inference_mode(False):
            self.homes = table.gather(1, order[..., None].expand_as(table)).to(device)
            self.places = torch.zeros(len(pools), self.base.shape[1], 4, dtype=torch.int32, device=device)

    def look_into(self, pools: Sequence[HeadPool]) -> bool:
        """Whether the pools are still where they were."""
        return all(pool.storage is storage for pool, storage in zip(pools, self.storages, strict=True))

    def capture(self, places: list[list[list[int]]]) -> Capture:
        """`places` of each pool and row: slots in use, the new token's, the first seen behind the sinks, and these."""
        write_from_host(self.places, places)
        addresses = [(each.data_ptr(), each.shape) for each in (*self.storages, self.homes, self.places)]
        return Capture((*addresses, self.base.dtype), self._launch)

    def _launch(self, layer: int, new: NewTokens) -> None:
        from fewer.kernels.triton.attention_decode import Share, attend_new  # where there is a GPU, there is Triton

        attend_new(new, self.base[0], self.base[1], Share(self.places, self.homes[layer], self.long[layer]))
