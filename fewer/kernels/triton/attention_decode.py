"""The calls around `decode_attention`: scratch, splits and launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fewer.kernels.new_tokens import Fusion, NewTokens, Workspace, processors
from fewer.kernels.triton.attention import decode_attention

LONG = 8192  # keys from which larger steps are faster (benchmarks/results/h200.json)
SHORT = 2048  # keys up to which a program has a step or two, and nothing to gain from fetching ahead


class Tiling(NamedTuple):
    splits: int  # the most parts of one row
    programs: int  # parts to aim for over all rows and key heads
    slots: int  # keys a step of the loop
    warps: int = 4
    stages: int = 3
    heads: int = 16  # query heads a tile; from 16 on Hopper multiplies straight from shared memory


@dataclass(frozen=True)
class Scratch:
    """Where splits leave their parts, for one batch size."""

    out: Tensor  # [B, Hk, splits, G, D'] float32
    lse: Tensor  # [B, Hk, splits, G] float32
    tickets: Tensor  # [B, Hk] int32, zero between launches

    @classmethod
    def allocate(
        cls, batch: int, heads: int, kv_heads: int, head_dim: int, splits: int, device: torch.device
    ) -> Scratch:
        shape = (batch, kv_heads, splits, heads // kv_heads)
        return cls(
            torch.empty(*shape, _width(head_dim), device=device),
            torch.empty(shape, device=device),
            torch.zeros(batch, kv_heads, dtype=torch.int32, device=device),
        )

    @classmethod
    def take(cls, workspace: Workspace, batch: int, kv_heads: int, splits: int, group: int, head_dim: int) -> Scratch:
        """The same of a workspace, whose launches share it one behind another."""
        shape = (batch, kv_heads, splits, group)
        return cls(
            workspace.take("part out", (*shape, _width(head_dim))),
            workspace.take("part lse", shape),
            workspace.take("tickets", (batch, kv_heads), torch.int32),
        )


def tiling_for(batch: int, kv_heads: int, longest: int, multiprocessors: int) -> Tiling:
    """One part for each of the GPU's multiprocessors, none shorter than one block of keys.

    Rows may differ in length, so a batch gets four times as many, shorter parts: they even out, with room for a row of
    eight times the average length (a program without a part still has to find that out). Short caches use no
    buffers to fetch ahead: a kernel with less shared memory than 48 KB starts while a product is still running, one
    with more waits until the multiprocessor is empty and has its first-level cache split anew.
    """
    programs = multiprocessors * (1 if batch == 1 else 4)
    splits = max(1, min(programs // kv_heads, 8 * programs // (batch * kv_heads), -(-longest // 64)))
    if longest <= SHORT:
        return Tiling(splits, programs, 64, warps=2, stages=1, heads=8)
    if batch == 1 and longest >= LONG:
        return Tiling(splits, programs, 128, stages=3)
    return Tiling(splits, programs, 64, stages=3)


class Share(NamedTuple):
    """Heads whose slots are no positions, or that lie in several stores: `places` and `homes` of `decode_attention`."""

    places: Tensor  # [kinds, B, 4] int32
    homes: Tensor | None = None  # [Hk, 5] int64; None: one kind, all in `keys` and `values`
    long: int = 0  # of the heads with a home, how many are long: these come first


def launch(
    query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, out: Tensor, lse: Tensor | None, scratch: Scratch,
    tiling: Tiling, heads: int, scale: float, window: int | None = None, softcap: float | None = None,
    fusion: Fusion | None = None, pdl: bool = False, share: Share | None = None,
) -> None:  # fmt: skip
    """Attention of one query a row (with `fusion`: rotation, the cache's new entry, and attention to it) -> out.

    With homes in `share`, keys and values [B, .., capacity, D] are where offsets count from.
    """
    batch, kv_heads, _, head_dim = keys.shape
    places = homes = None
    if share is not None:
        places, homes = share.places, share.homes
        kv_heads = kv_heads if homes is None else len(homes)
    table = None if fusion is None else fusion.table
    q_gain = None if fusion is None else fusion.q_gain
    k_gain = None if fusion is None else fusion.k_gain
    rotary_dim = 0 if fusion is None or table is None else fusion.rotary_dim
    on_cpu = query.device.type == "cpu"
    options: dict[str, object] = {"launch_pdl": True} if pdl else {}
    decode_attention[(tiling.splits, kv_heads, batch)](
        query, keys, values, lengths, lengths if places is None else places, lengths if homes is None else homes,
        out, out if lse is None else lse, scratch.out, scratch.lse, scratch.tickets,
        scratch.lse if table is None else table, scratch.lse if q_gain is None else q_gain,
        scratch.lse if k_gain is None else k_gain, scale, softcap or 0.0, window or 0,
        0.0 if fusion is None else fusion.eps, keys.stride(0), keys.stride(1), keys.stride(2), batch, tiling.programs,
        kv_heads if share is None or homes is None else share.long,
        heads, kv_heads, head_dim, rotary_dim, _width(head_dim), _power(heads // kv_heads), tiling.heads,
        tiling.splits, _power(batch) if tiling.splits > 1 else 1, tiling.slots, tiling.stages,
        max(1, 8192 // (_width(head_dim) * _power(heads // kv_heads))), fusion is not None,
        places is not None, homes is not None, q_gain is not None,
        bool(softcap), lse is not None, on_cpu, "ieee" if keys.dtype == torch.float32 else "tf32", pdl,
        num_warps=tiling.warps, **options,
    )  # fmt: skip


def attend_new(new: NewTokens, keys: Tensor, values: Tensor, share: Share | None = None) -> None:
    """Store and attend: keys, values [B, Hk, capacity, D] of a layer; with homes, of the store whose heads are long."""
    batch, kv_heads, capacity, head_dim = keys.shape
    multiprocessors = processors(keys.device)
    if share is not None and share.homes is not None:
        kv_heads = new.kv_heads
        tiling = tiling_beside(batch, share.long, kv_heads - share.long, capacity, multiprocessors)
    else:
        tiling = tiling_for(batch, kv_heads, capacity, multiprocessors)
    scratch = Scratch.take(new.workspace, batch, kv_heads, tiling.splits, new.heads // new.kv_heads, head_dim)
    launch(
        new.projected, keys, values, new.positions, new.out, None, scratch, tiling, new.heads, new.scale, None,
        new.softcap, new.fusion, new.pdl, share,
    )  # fmt: skip


def tiling_beside(batch: int, long: int, short: int, longest: int, multiprocessors: int) -> Tiling:
    """For `long` heads beside `short` ones that one program each can do: together they are one wave."""
    if not long:
        return tiling_for(batch, short, longest, multiprocessors)
    return tiling_for(batch, long, longest, max(long, multiprocessors - (short if batch == 1 else 0)))


def attention_decode(
    q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scale: float, window: int | None = None,
    softcap: float | None = None, tiling: Tiling | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q [B, H, D], keys and values [B, Hk, S, D], lengths [B] int32 <= S -> (out [B, H, D], lse [B, H] float32).

    Query head h reads key head h // (H / Hk) at slots 0..lengths[b]-1, of them the last `window`. A row of length 0
    gives zeros and lse = -inf. keys and values share their strides; D is contiguous.
    """
    batch, heads, head_dim = q.shape
    if keys.stride() != values.stride() or keys.stride(3) != 1:
        keys, values = keys.contiguous(), values.contiguous()
    tiling = tiling or tiling_for(batch, keys.shape[1], keys.shape[2], processors(q.device))
    scratch = Scratch.allocate(batch, heads, keys.shape[1], head_dim, tiling.splits, q.device)
    out = torch.empty(batch, heads, head_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, dtype=torch.float32, device=q.device)
    launch(q.contiguous(), keys, values, lengths, out, lse, scratch, tiling, heads, scale, window, softcap)
    return out, lse


def _width(head_dim: int) -> int:
    """Channels of a tile: a power of two, and no fewer than a tensor core takes."""
    return max(16, _power(head_dim))


def _power(count: int) -> int:
    return 1 << (count - 1).bit_length()
