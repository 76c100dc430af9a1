"""Attention of one new token a row over listed keys: pages or single tokens, a list of its own for every head.

Storage is [pages, Hk, page_size, D] for keys and the same for values; `table` says which physical page holds a logical
page of a row. A contiguous cache [B, Hk, capacity, D] is the case of one page a row: page_size = capacity and
table = arange(B)[:, None]. Here keys that are not listed are not read; CUDA tensors go to
`fewer.kernels.triton.list_attention`.

What rests on it: heads of unequal reach (DuoAttention, arXiv 2410.10819), chosen pages (LServe, arXiv 2502.14866,
section 3.5), chosen tokens (TidalDecode, arXiv 2410.05076).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fewer.kernels.attention import exponentials

Unit = Literal["page", "token"]
INFINITY = float("inf")


class ListAttention(NamedTuple):
    """What `attend_list` returns, a part for `fewer.kernels.attention.merge`."""

    out: Tensor  # [B, H, D] float32, zeros where nothing was seen
    lse: Tensor  # [B, H] float32, natural logarithm; -inf where nothing was seen
    scores: Tensor | None  # [B, H, n·page_size], [B, H, n] or [B, H, P·page_size] float32; -inf where unseen


def attend_list(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    lists: Tensor | None,
    counts: Tensor | None,
    unit: Unit,
    lengths: Tensor,
    scale: float,
    softcap: float | None = None,
    want_scores: bool = False,
) -> ListAttention:
    """q [B, H, D] -> output, log-sum-exp and, with `want_scores`, the scaled and capped logits in the list's order.

    keys, values [pages, Hk, page_size, D], table [B, P] int32. lists [B, Hk, n] (shared by the H / Hk query heads of a
    key head) or [B, H, n] int32: logical pages or token positions, as `unit` says, none twice. Of them the first
    counts[b, h] are attended (all without `counts`), and those that are not negative. Without lists: all tokens.
    Tokens at or beyond lengths[b] (int32) are never seen.
    """
    if q.is_cuda:
        from fewer.kernels.triton import list_attention as fused

        return fused.attend_list(q, keys, values, table, lists, counts, unit, lengths, scale, softcap, want_scores)
    batch, heads, head_dim = q.shape
    kv_heads, page_size = keys.shape[1:3]
    width = table.shape[1] * page_size if lists is None else lists.shape[2] * (page_size if unit == "page" else 1)
    out = torch.zeros(batch, heads, head_dim)
    lse = torch.full((batch, heads), -INFINITY)
    scores = torch.full((batch, heads, width), -INFINITY) if want_scores else None
    list_heads = kv_heads if lists is None else lists.shape[1]
    shape = batch, list_heads, heads // list_heads  # the queries that share a list
    grouped, outs, lses = q.float().view(*shape, head_dim), out.view(*shape, head_dim), lse.view(shape)
    if lists is None:
        gathered = _everything(keys, values, table, lengths.tolist())
    else:
        gathered = _listed(keys, values, table, lists, counts, unit, lengths)
    for at, k, v, seen in gathered:
        logits = grouped[at] @ k.float().transpose(1, 2) * scale  # [M, G, S]
        if softcap:
            logits = torch.tanh(logits / softcap) * softcap
        if seen is not None:
            logits = logits.masked_fill(~seen[:, None], -INFINITY)
        if scores is not None:
            scores.view(*shape, width)[at[0], at[1], :, : logits.shape[2]] = logits
        weights, total, lses[at] = exponentials(logits)
        outs[at] = weights @ v.float() / total[..., None]
    return ListAttention(out, lse, scores)


def probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """Scores [.., S] and their log-sum-exp [..] -> softmax weights [.., S]; zeros where nothing was seen.

    With the log-sum-exp of a `merge`, these are one part's weights in the softmax over all parts.
    """
    return (scores - lse.nan_to_num(neginf=0.0)[..., None]).exp()


Indices = tuple[Tensor, Tensor]  # rows and list heads, M pairs
Gathered = Iterator[tuple[Indices, Tensor, Tensor, Tensor | None]]  # pairs, k and v [M, S, D], seen [M, S] bool


def stretch(storage: Tensor, pages: Tensor, length: int) -> Tensor:
    """The first `length` tokens in pages [P] of storage [pages, Hk, page_size, D] -> [Hk, length, D]; of one page, a
    view."""
    kv_heads, page_size = storage.shape[1:3]
    if length <= page_size:
        return storage[int(pages[0]), :, :length]
    reached = pages[: -(-length // page_size)]
    return storage[reached, torch.arange(kv_heads)[:, None]].flatten(1, 2)[:, :length]


def _everything(keys: Tensor, values: Tensor, table: Tensor, lengths: list[int]) -> Gathered:
    """All tokens of one row after the other."""
    head = torch.arange(keys.shape[1])
    for row, length in enumerate(lengths):
        if length:
            k, v = (stretch(part, table[row], length) for part in (keys, values))
            yield (torch.full_like(head, row), head), k, v, None


def _listed(
    keys: Tensor, values: Tensor, table: Tensor, lists: Tensor, counts: Tensor | None, unit: Unit, lengths: Tensor
) -> Gathered:
    """Heads whose lists are of like length (up to the same power of two) together, so none reads twice its need."""
    kv_heads, page_size, head_dim = keys.shape[1:]
    batch, list_heads, longest = lists.shape
    alike: dict[int, list[int]] = defaultdict(list)
    flat = [longest] * (batch * list_heads) if counts is None else counts.flatten().tolist()
    for pair, count in enumerate(flat):
        if count:
            alike[(count - 1).bit_length()].append(pair)
    for pairs in alike.values():
        most = max(flat[pair] for pair in pairs)
        row, list_head = torch.tensor(pairs).div(list_heads, rounding_mode="floor"), torch.tensor(pairs) % list_heads
        entry = lists[row, list_head, :most].long()  # [M, n]
        live = (entry >= 0) & (torch.arange(most) < torch.tensor([flat[pair] for pair in pairs])[:, None])
        head = (list_head // (list_heads // kv_heads))[:, None]
        if unit == "page":
            position = entry[..., None] * page_size + torch.arange(page_size)  # [M, n, page_size]
            seen = live[..., None] & (position < lengths[row, None, None])
            page = table[row[:, None], torch.where(seen[..., 0], entry, 0)]
            k, v = (_rows(part.flatten(0, 1), page * kv_heads + head).flatten(1, 2) for part in (keys, values))
            seen = seen.flatten(1)
        else:
            seen = live & (entry < lengths[row, None])
            entry = torch.where(seen, entry, 0)
            page = table[row[:, None], entry // page_size]
            place = (page * kv_heads + head) * page_size + entry % page_size
            k, v = (_rows(part.flatten(0, 2), place) for part in (keys, values))
        if seen.all():
            yield (row, list_head), k, v, None
        else:
            yield (row, list_head), k, v.masked_fill(~seen[..., None], 0), seen  # a weight of 0 keeps no NaN out


def _rows(storage: Tensor, index: Tensor) -> Tensor:
    """storage [N, ..] at index [M, n] -> [M, n, ..]; whole rows are copied, several times faster than by indexing."""
    return storage.index_select(0, index.flatten()).view(*index.shape, *storage.shape[1:])
