"""A decoding step over pages on CUDA: what a layer launches. Pages that rows share are stored once and read by each."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fewer.cache.pages import PagePool
from fewer.kernels.new_tokens import NewTokens
from fewer.slots import Capture


def capture(pool: PagePool, slots: Tensor, places: Tensor) -> Capture:
    """One token a row: in slots [B], whose pages the pool has prepared. Where they lie in a layer's keys is written to
    places [B, Hk] int64."""
    storage, table = pool.storage, pool.table
    page_stride, head_stride, slot_stride = storage.stride()[2:5]
    pages, offsets = pool.places(torch.arange(len(slots), device=slots.device), slots)
    heads = torch.arange(places.shape[1], device=slots.device) * head_stride
    places.copy_((pages * page_stride + offsets * slot_stride)[:, None] + heads)
    key = tuple((tensor.data_ptr(), tensor.shape, tensor.dtype) for tensor in (storage, table, places))
    return Capture(key, partial(_launch, storage, table, places))


def _launch(storage: Tensor, table: Tensor, places: Tensor, layer: int, new: NewTokens) -> None:
    from fewer.kernels.triton.list_attention import attend_new  # where there is a GPU, there is Triton
    from fewer.kernels.triton.new_tokens import turn_and_store

    keys, values = storage[layer]
    attend_new(new, turn_and_store(new, keys, values, places), keys, values, table)
