"""The two ends of a decoding pass: the embedding of the tokens, and the most likely next ones.

Both are a few kilobytes of work, so what counts is that each is one kernel: as PyTorch operations they are a dozen.
"""
# mypy: allow-untyped-defs
# (the arguments of kernels are of Triton's language, not of Python)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewer.kernels.triton.gemv import wait_for_previous
from fewer.kernels.triton.linear import Stored

CHUNK = 2048  # logits a program


@triton.jit
def embed_rows(
    tokens, codes, scale, zero, out, factor,
    K: tl.constexpr, GROUP: tl.constexpr, FORMAT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (c, b): columns c·BLOCK.. of row tokens[b] of a stored matrix, times `factor`, into out [B, K]."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.load(tokens + tl.program_id(1)).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < K
    if FORMAT == "int4":
        byte = (column // 32) * 16 + column % 16
        packed = tl.load(codes + row * (K // 2) + byte, mask=inside, other=0)
        value = (tl.where(column % 32 < 16, packed & 15, packed >> 4)).to(tl.float32) - 8.0
    else:
        value = tl.load(codes + row * K + column, mask=inside, other=0).to(tl.float32)
    if FORMAT != "dense":
        at = row * (K // GROUP) + column // GROUP
        value *= tl.load(scale + at, mask=inside, other=0.0).to(tl.float32)
        if FORMAT == "int4":
            value += tl.load(zero + at, mask=inside, other=0.0).to(tl.float32)
    at = tl.program_id(1).to(tl.int64) * K + column
    tl.store(out + at, (value * factor).to(out.dtype.element_ty), mask=inside)


def embed(tokens: Tensor, matrix: Stored, out: Tensor, factor: float = 1.0, pdl: bool = False) -> Tensor:
    """Rows `tokens` [B] int32 of `matrix` [V, K], times `factor`, into `out` [B, K].

    `pdl` lets the kernel behind start early; this one starts when all before it has finished, whatever that was.
    """
    columns = matrix.shape[1]
    block = min(512, triton.next_power_of_2(columns))
    scale = matrix.codes if matrix.scale is None else matrix.scale
    zero = scale if matrix.zero is None else matrix.zero
    embed_rows[(-(-columns // block), len(tokens))](
        tokens, matrix.codes, scale, zero, out, factor, columns, matrix.group_size, matrix.kind, block, pdl
    )
    return out


@triton.jit
def top_of(value, index):
    """The largest of value [n], and the smallest `index` that has it."""
    top = tl.max(value, 0)
    return top, tl.min(tl.where(value == top, index, 0x7FFFFFFF), 0)


@triton.jit
def most_likely_tokens(
    logits, inputs, report, part_top, part_index, tickets, V, batch,
    PARTS: tl.constexpr, PARTS_P: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (c, b): the top of BLOCK logits of row b; the last of a row to finish reports the top of all.

    logits [B, V] float32. report [2, B] int64: token, and the bits of its logit in the low half. inputs [2, B] int32:
    tokens and lengths of the next pass. A NaN counts as infinity, so a row with one has a top that is not finite.
    """
    part, row = tl.program_id(0), tl.program_id(1)
    index = part * BLOCK + tl.arange(0, BLOCK)
    wait_for_previous(PDL)
    value = tl.load(logits + row.to(tl.int64) * V + index, mask=index < V, other=float("-inf"))
    value = tl.where(value == value, value, float("inf"))
    top, at = top_of(value, index)
    tl.store(part_top + row * PARTS + part, top)
    tl.store(part_index + row * PARTS + part, at)
    tl.debug_barrier()  # the part is written before the ticket is drawn
    ticket = tl.atomic_add(tickets + row, 1, sem="acq_rel")
    if ticket == PARTS - 1:
        tl.store(tickets + row, 0)
        parts = tl.arange(0, PARTS_P)
        tops = tl.load(part_top + row * PARTS + parts, mask=parts < PARTS, other=float("-inf"), cache_modifier=".cg")
        indices = tl.load(part_index + row * PARTS + parts, mask=parts < PARTS, other=V, cache_modifier=".cg")
        top, at = top_of(tops, indices)
        tl.store(report + row, at.to(tl.int64))
        tl.store(report + batch + row, top.to(tl.int32, bitcast=True).to(tl.int64))
        tl.store(inputs + row, at)
        tl.store(inputs + batch + row, tl.load(inputs + batch + row) + 1)


class TopScratch:
    """Where the parts of `most_likely` meet, for one batch and vocabulary."""

    def __init__(self, batch: int, vocab_size: int, device: torch.device):
        self.parts = -(-vocab_size // CHUNK)
        self.top = torch.empty(batch, self.parts, device=device)
        self.index = torch.empty(batch, self.parts, dtype=torch.int32, device=device)
        self.tickets = torch.zeros(batch, dtype=torch.int32, device=device)  # zero between launches


def most_likely(logits: Tensor, inputs: Tensor, report: Tensor, scratch: TopScratch, pdl: bool = False) -> None:
    """logits [B, V] float32 -> report [2, B] int64 (token; the bits of its logit) and inputs [2, B] int32 for the next
    pass: that token, and lengths one larger."""
    batch, size = logits.shape
    options: dict[str, object] = {"launch_pdl": True} if pdl else {}
    most_likely_tokens[(scratch.parts, batch)](
        logits, inputs, report, scratch.top, scratch.index, scratch.tickets, size, batch, scratch.parts,
        triton.next_power_of_2(scratch.parts), CHUNK, pdl, **options,
    )  # fmt: skip
