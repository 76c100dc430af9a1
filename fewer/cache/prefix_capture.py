"""A decoding step over shared prefixes on CUDA: what a layer launches, and the tensors that the launches read.

The new token's attention to its row's own text is one part and its attention to each level's prefix another. The parts
of a layer lie side by side, and one kernel merges them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from fewer.cache.prefix_level import LevelKeys, PrefixLevel, Reading
from fewer.kernels import prefix_product
from fewer.kernels.from_host import write_from_host
from fewer.kernels.new_tokens import NewTokens, processors
from fewer.slots import Capture


class OwnText:
    """Where each row's own text ends, as kernels read it. The tensors stay, and steps write into them."""

    def __init__(self, batch: int, device: torch.device):
        with torch.inference_mode(False):  # a step may be prepared outside of a pass
            self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)  # slots, the new token's included
            self.pages = torch.arange(batch, dtype=torch.int32, device=device)[:, None]  # of a contiguous pool
            self.places: Tensor | None = None  # [B, Hk] int64: elements from a layer's first key to the new one

    def count(self, counts: Sequence[int]) -> None:
        """The rows have this many slots, the new token's included."""
        write_from_host(self.lengths, counts)

    def place(self, counts: Sequence[int], pool: Tensor) -> None:
        """Each row's new token goes behind its `counts` slots in `pool` [layers, 2, B, Hk, capacity, D]."""
        self.count([count + 1 for count in counts])
        row, head, slot = pool.stride()[2:5]
        heads = head * torch.arange(pool.shape[3])
        found = (row * torch.arange(len(counts)) + slot * torch.tensor(counts))[:, None] + heads
        if self.places is None:
            with torch.inference_mode(False):
                self.places = torch.zeros_like(found, device=self.lengths.device)
        self.places.copy_(found.pin_memory() if self.places.is_cuda else found, non_blocking=True)


def capture(pool: Tensor, own: OwnText, levels: Sequence[PrefixLevel]) -> Capture:
    """One token a row over `levels` of prefixes and `pool` [layers, 2, B, Hk, capacity, D], the rows' own text. All of
    the model's layers are of one kind, without a window."""
    assert own.places is not None
    read = [(level.keys[0], level.one_each(pool.shape[2])) for level in levels]
    tensors = [pool, own.lengths, own.places]
    for keys, reading in read:
        tensors += [keys.pool, keys.pages, keys.lengths_there, reading.pointers_there]
        tensors += [] if reading.queries is None else [reading.queries]
    key = tuple((tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors)
    return Capture(key, partial(_launch, pool, own, read))


def _launch(pool: Tensor, own: OwnText, read: Sequence[tuple[LevelKeys, Reading]], layer: int, new: NewTokens) -> None:
    from fewer.kernels.triton import attention_decode, shared_prefix  # where there is a GPU, there is Triton
    from fewer.kernels.triton.merge_heads import merge_into
    from fewer.kernels.triton.new_tokens import turn_and_store

    assert own.places is not None
    keys, values = pool[layer]
    batch, kv_heads, capacity, head_dim = keys.shape
    parts = new.workspace.take("parts", (len(read) + 1, batch, new.heads, head_dim))
    sums = new.workspace.take("log-sum-exp of parts", (len(read) + 1, batch, new.heads))
    q = turn_and_store(new, keys, values, own.places)
    tiling = attention_decode.tiling_for(batch, kv_heads, capacity, processors(keys.device))
    scratch = attention_decode.Scratch.take(
        new.workspace, batch, kv_heads, tiling.splits, new.heads // new.kv_heads, head_dim
    )
    attention_decode.launch(
        q, keys, values, own.lengths, parts[0], sums[0], scratch, tiling, new.heads, new.scale, None, new.softcap,
    )  # fmt: skip
    for index, (prefix, reading) in enumerate(read, 1):
        if reading.queries is not None:
            sums[index].fill_(-torch.inf)  # of rows that read no prefix of this level
        keys, values = prefix.pool[layer]
        if reading.queries is None and len(prefix.lengths) == 1 and prefix_product.suits(q, keys[0], new.softcap):
            held = slice(prefix.lengths[0])  # of a level that stays as it is
            prefix_product.attend_all(q, keys[0, :, held], values[0, :, held], new.scale, parts[index], sums[index])
            continue
        shared_prefix.launch(
            q, keys, values, prefix.pages, prefix.lengths_there, reading.pointers_there, parts[index],
            sums[index], new.scale, new.softcap, reading.queries, workspace=new.workspace, pdl=new.pdl,
        )  # fmt: skip
    merge_into(new.out, parts, sums, new.pdl)
