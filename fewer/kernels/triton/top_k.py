"""Indices of the k largest of many scores, by radix selection: exact, in four launches of fixed shapes.

A score becomes a rank of 32 bits, the smaller the better. `narrow`, twice, counts the next 7 bits of the ranks that
agree with the k-th one so far, and finds that one's bits. `split_off` then writes the indices of what is better, and
sets aside what agrees in all 14 bits: a few hundred scores of a quarter million, or every one, where all are equal.
`settle` chooses among these by the other 18 bits; of equal ones the first are taken. Nothing depends on the order in
which programs run: each writes behind what those before it are known to write.
"""
# mypy: allow-untyped-defs
# (the arguments of kernels are of Triton's language, not of Python)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from fewer.kernels.new_tokens import Workspace
from fewer.kernels.triton.gemv import wait_for_previous

# Bits of a rank that are counted at once. Where the compiler counts by votes, one bit more costs nearly twice as much.
BITS = tl.constexpr(7)  # over all scores
BINS = tl.constexpr(1 << 7)
FINE = tl.constexpr(6)  # among those set aside
FINE_BINS = tl.constexpr(1 << 6)
BLOCK = 4096  # scores that a program holds
MOST_PARTS = 64  # of a row, for whose counts the last of its programs has room


@triton.jit
def ranks_of(scores, index, newest, n, GROUP: tl.constexpr):
    """Of a list's scores `index`, the best of the GROUP rows: uint32, the order of floats turned round; 0: `newest`."""
    score = tl.load(scores + index, mask=index < n, other=float("-inf"))
    for member in tl.static_range(1, GROUP):
        other = tl.load(scores + member * n + index, mask=index < n, other=float("-inf"))
        score = tl.maximum(score, other)
    bits = score.to(tl.int32, bitcast=True)
    rank = bits ^ ((bits >> 31) & 0x7FFFFFFF) ^ 0x7FFFFFFF
    return tl.where(index == newest, 0, rank).to(tl.uint32, bitcast=True)


@triton.jit
def narrow(
    scores, newest, tallies, better, tied, kth, tickets, k, n,
    LISTS: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr, PARTS_P: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr, FIRST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (PARTS, rows): counts of the 7 first bits of a rank (FIRST), or of the next 7. scores [rows, GROUP, n].

    The last program of a row finds those bits of the k-th rank: kth [rows, 2] int32 has its bits so far, and its place
    among the ranks that agree with them; better, tied [rows, PARTS] int32, how many ranks of each part are smaller, and
    how many agree. tallies [rows, PARTS, 128] int32; tickets [rows] int32, zero before and after.
    """
    part, row = tl.program_id(0), tl.program_id(1)
    scores += row.to(tl.int64) * GROUP * n
    pinned = tl.load(newest + row // LISTS)
    wait_for_previous(PDL)
    place, bits = k, 0
    if not FIRST:
        bits, place = tl.load(kth + 2 * row), tl.load(kth + 2 * row + 1)
    counts = tl.zeros([BINS], tl.int32)
    for block in tl.range(0, BLOCKS):
        index = (part * BLOCKS + block) * BLOCK + tl.arange(0, BLOCK)
        rank = ranks_of(scores, index, pinned, n, GROUP)
        counted = index < n
        if not FIRST:
            counted = counted & ((rank >> (32 - BITS)).to(tl.int32) == bits)
        digits = (rank >> (32 - BITS if FIRST else 32 - 2 * BITS)).to(tl.int32) & (BINS - 1)
        counts += tl.histogram(digits, BINS, mask=counted)
    bin = tl.arange(0, BINS)
    tl.store(tallies + (row * PARTS + part) * BINS + bin, counts)
    tl.debug_barrier()  # the counts are written before the ticket is drawn
    ticket = tl.atomic_add(tickets + row, 1, sem="acq_rel")
    if ticket == PARTS - 1:
        tl.store(tickets + row, 0)
        parts = tl.arange(0, PARTS_P)
        at = row * PARTS + parts
        held = parts < PARTS
        whole = tallies + at[:, None] * BINS + bin[None, :]
        of_parts = tl.load(whole, mask=held[:, None], other=0, cache_modifier=".cg")
        total = tl.sum(of_parts, 0)
        digit = tl.sum((tl.cumsum(total, 0) < place).to(tl.int32), 0)
        ahead = tl.sum(tl.where(bin[None, :] < digit, of_parts, 0), 1)
        agree = tl.sum(tl.where(bin[None, :] == digit, of_parts, 0), 1)
        tl.store(kth + 2 * row + 1, place - tl.sum(tl.where(bin < digit, total, 0), 0))
        if not FIRST:
            digit += bits * BINS
            ahead += tl.load(better + at, mask=held, other=0)
        tl.store(kth + 2 * row, digit)
        tl.store(better + at, ahead, mask=held)
        tl.store(tied + at, agree, mask=held)


@triton.jit
def split_off(
    scores, newest, better, tied, kth, indices, aside, k, n,
    LISTS: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr, PARTS_P: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (PARTS, rows): indices [rows, k] int32 of the ranks whose first 14 bits are smaller than the k-th one's, and
    aside [2, rows, n] int32, indices and ranks of those that agree."""
    part, row = tl.program_id(0), tl.program_id(1)
    rows = tl.num_programs(1)
    scores += row.to(tl.int64) * GROUP * n
    pinned = tl.load(newest + row // LISTS)
    parts = tl.arange(0, PARTS_P)
    wait_for_previous(PDL)
    bits = tl.load(kth + 2 * row)
    indices += row * k + tl.sum(tl.load(better + row * PARTS + parts, mask=parts < part, other=0), 0)
    aside += row.to(tl.int64) * n + tl.sum(tl.load(tied + row * PARTS + parts, mask=parts < part, other=0), 0)
    for block in tl.range(0, BLOCKS):
        index = (part * BLOCKS + block) * BLOCK + tl.arange(0, BLOCK)
        rank = ranks_of(scores, index, pinned, n, GROUP)
        first = (rank >> (32 - 2 * BITS)).to(tl.int32)
        ahead, agrees = (index < n) & (first < bits), (index < n) & (first == bits)
        both = ahead.to(tl.int32) + (agrees.to(tl.int32) << 16)  # a block's counts need 13 bits: one sum serves both
        before = tl.cumsum(both, 0) - both
        tl.store(indices + (before & 0xFFFF), index, mask=ahead)
        tl.store(aside + (before >> 16), index, mask=agrees)
        tl.store(aside + rows.to(tl.int64) * n + (before >> 16), rank.to(tl.int32, bitcast=True), mask=agrees)
        in_all = tl.sum(both, 0)
        indices += in_all & 0xFFFF
        aside += in_all >> 16


@triton.jit
def ranks_aside(aside, start, count, rows, n, BLOCK: tl.constexpr):
    """Indices and ranks of those set aside, from `start` on, and which of them there are: [BLOCK] each."""
    at = start + tl.arange(0, BLOCK)
    index = tl.load(aside + at, mask=at < count, other=0)
    rank = tl.load(aside + rows.to(tl.int64) * n + at, mask=at < count, other=0)
    return index, rank.to(tl.uint32, bitcast=True), at < count


@triton.jit
def settle(
    better, tied, kth, indices, aside, k, n,
    PARTS: tl.constexpr, PARTS_P: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (rows): the rest of indices [rows, k], from what `split_off` set aside."""
    row, rows = tl.program_id(0), tl.num_programs(0)
    parts, bin = tl.arange(0, PARTS_P), tl.arange(0, FINE_BINS)
    aside += row.to(tl.int64) * n
    wait_for_previous(PDL)
    bits, place = tl.load(kth + 2 * row).to(tl.uint32), tl.load(kth + 2 * row + 1)
    written = tl.sum(tl.load(better + row * PARTS + parts, mask=parts < PARTS, other=0), 0)
    count = tl.sum(tl.load(tied + row * PARTS + parts, mask=parts < PARTS, other=0), 0)
    for shift in tl.static_range(32 - 2 * BITS - FINE, -1, -FINE):
        total = tl.zeros([FINE_BINS], tl.int32)
        for start in tl.range(0, count, BLOCK):
            index, rank, there = ranks_aside(aside, start, count, rows, n, BLOCK)
            fine = (rank >> shift).to(tl.int32) & (FINE_BINS - 1)
            total += tl.histogram(fine, FINE_BINS, mask=there & ((rank >> shift) >> FINE == bits))
        digit = tl.sum((tl.cumsum(total, 0) < place).to(tl.int32), 0)
        place -= tl.sum(tl.where(bin < digit, total, 0), 0)
        bits = bits * FINE_BINS + digit.to(tl.uint32)
    indices += row * k
    equal = 0  # to the k-th rank, so far; `place` of them are taken
    for start in tl.range(0, count, BLOCK):
        index, rank, there = ranks_aside(aside, start, count, rows, n, BLOCK)
        same = there & (rank == bits)
        nth = equal + tl.cumsum(same.to(tl.int32), 0)
        chosen = there & ((rank < bits) | (same & (nth <= place)))
        at = written + tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(indices + at, index, mask=chosen)
        written += tl.sum(chosen.to(tl.int32), 0)
        equal += tl.sum(same.to(tl.int32), 0)


def top_k(
    scores: Tensor, k: int, newest: Tensor, lists: int, indices: Tensor, workspace: Workspace, pdl: bool = False,
    block: int = BLOCK,
) -> None:  # fmt: skip
    """scores [B, H, n] float32 -> indices [B, lists, k] int32 of the k <= n largest in each row. Always among them is
    newest [B] int32, which no kernel of the pass may write. With fewer lists than heads, a list serves H / lists heads
    that follow one another, and an index is worth its best score among them."""
    batch, heads, n = scores.shape
    rows, group = batch * lists, heads // lists
    blocks = -(-n // (block * MOST_PARTS))
    parts = -(-n // (block * blocks))
    counted = rows, parts
    tallies = workspace.take("top-k tallies", (*counted, BINS.value), torch.int32)
    better, tied = (workspace.take(f"top-k {name}", counted, torch.int32) for name in ("better", "tied"))
    kth = workspace.take("top-k bits and place", (rows, 2), torch.int32)
    tickets = workspace.take("top-k tickets", (rows,), torch.int32)
    aside = torch.empty(2, rows, n, dtype=torch.int32, device=scores.device)
    options: dict[str, object] = {"launch_pdl": True} if pdl else {}
    tiles = parts, next_power_of_2(parts), blocks, block
    for first in (True, False):
        narrow[(parts, rows)](
            scores, newest, tallies, better, tied, kth, tickets, k, n, lists, group, *tiles, first, pdl,
            num_warps=8, **options,
        )  # fmt: skip
    split_off[(parts, rows)](
        scores, newest, better, tied, kth, indices, aside, k, n, lists, group, *tiles, pdl, num_warps=8, **options
    )
    short = min(1024, block)
    settle[(rows,)](better, tied, kth, indices, aside, k, n, *tiles[:2], short, pdl, num_warps=4, **options)
