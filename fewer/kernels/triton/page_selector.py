"""The choice of pages of LServe in two launches: bounds of logical pages read once, and the best physical pages.

    s_j = q⁺·largest_j + q⁻·smallest_j      for each logical page j      (`fewer.cache.page_statistics`)
    S_p = max s_j over the logical pages of physical page p
    list = the K - 1 best of the whole pages, and the newest page last

Only rows whose choice is `due` are served: the programs of others end at once, and their lists stay. What is scored was
complete before this pass, so it is on its way while the kernel in front still runs. The K - 1 best are found by
their value: the search for the (K - 1)-th largest fixes two bits at a time, with a count of all scores for each.
"""
# mypy: allow-untyped-defs
# (the arguments of kernels are of Triton's language, not of Python)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from fewer.kernels.head_stores import HeadStores
from fewer.kernels.new_tokens import NewTokens
from fewer.kernels.triton.gemv import wait_for_previous
from fewer.kernels.triton.matmul import multiply_tiles

ROWS = 64  # logical pages that a program scores
MOST_PAGES = 32768  # that one program chooses from: it holds the scores of all, and packs two counts in 32 bits


@triton.jit
def score_pages(
    queries, positions, due, homes, table, bounds, scores, stride_table, bounds_page, capacity,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, LISTS: tl.constexpr, SHARED: tl.constexpr, HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr, GROUP_P: tl.constexpr, PAGE_SIZE: tl.constexpr, PARTS: tl.constexpr, PAGES: tl.constexpr,
    ON_CPU: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (runs of PAGES physical pages, KV_HEADS, B). queries [B, HEADS, HEAD_DIM], bounds [pages, retrieval heads,
    PARTS, 2, HEAD_DIM] -> scores [B, LISTS, capacity] float32 of the whole pages of rows that are due. SHARED: the
    queries of a group have one list, and a page is worth its best score among them."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    run, kv_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    home, newest = tl.load(homes + kv_head), tl.load(positions + row) // PAGE_SIZE
    wanted = (tl.load(due + row) != 0) & (home >= 0) & (run * PAGES < newest)
    if wanted:
        logical = tl.arange(0, PAGES * PARTS)
        page = run * PAGES + logical // PARTS
        whole = page < newest
        physical = tl.load(table + row.to(tl.int64) * stride_table + page, mask=whole, other=0)
        place = bounds + physical.to(tl.int64) * bounds_page + (home * PARTS + logical % PARTS) * (2 * HEAD_DIM)
        channel = tl.arange(0, DIM)
        inside = whole[:, None]
        if DIM != HEAD_DIM:
            inside = inside & (channel < HEAD_DIM)[None, :]
        largest = tl.load(place[:, None] + channel[None, :], mask=inside, other=0.0)
        smallest = tl.load(place[:, None] + HEAD_DIM + channel[None, :], mask=inside, other=0.0)
        wait_for_previous(PDL)
        member = tl.arange(0, GROUP_P)
        head = row.to(tl.int64) * HEADS + kv_head * GROUP + member
        there = (member < GROUP)[None, :] & (channel < HEAD_DIM)[:, None]
        q = tl.load(queries + head[None, :] * HEAD_DIM + channel[:, None], mask=there, other=0.0)  # [DIM, GROUP_P]
        high, low = tl.maximum(q, 0.0).to(largest.dtype), tl.minimum(q, 0.0).to(largest.dtype)
        bound = tl.zeros([PAGES * PARTS, GROUP_P], tl.float32)
        bound = multiply_tiles(largest, high, bound, ON_CPU, PRECISION)
        bound = multiply_tiles(smallest, low, bound, ON_CPU, PRECISION)
        best = tl.max(tl.reshape(bound, [PAGES, PARTS, GROUP_P]), 1)  # [PAGES, GROUP_P]
        number = run * PAGES + tl.arange(0, PAGES)
        if SHARED:
            best = tl.max(tl.where((member < GROUP)[None, :], best, float("-inf")), 1)
            at = scores + (row * LISTS + home).to(tl.int64) * capacity + number
            tl.store(at, best, mask=number < newest)
        else:
            of_list = (row * LISTS + home * GROUP + member).to(tl.int64) * capacity
            stored = (number < newest)[:, None] & (member < GROUP)[None, :]
            tl.store(scores + of_list[None, :] + number[:, None], best, mask=stored)
    else:
        wait_for_previous(PDL)


@triton.jit
def choose_best(
    scores, positions, due, lists, capacity, longest, K,
    LISTS: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (LISTS, B): lists [B, LISTS, longest] int32 end with the K - 1 best pages below the newest, in any order,
    and the newest; what is in front of these stays. There are at least K - 1."""
    own, row = tl.program_id(0), tl.program_id(1)
    wanted, newest = tl.load(due + row) != 0, tl.load(positions + row) // PAGE_SIZE
    wait_for_previous(PDL)
    if wanted:
        index = tl.arange(0, BLOCK)
        score = tl.load(scores + (row * LISTS + own).to(tl.int64) * capacity + index, mask=index < newest, other=0.0)
        bits = score.to(tl.int32, bitcast=True)
        order = bits ^ ((bits >> 31) & 0x7FFFFFFF) ^ (-0x7FFFFFFF - 1)  # as unsigned numbers, in the order of floats
        order = tl.where(index < newest, order, 0).to(tl.uint32, bitcast=True)
        count = K - 1
        least = tl.zeros([], tl.uint32)  # the bits of the count-th largest that are known
        for shift in tl.static_range(30, -1, -2):
            tallies = (order >= least + (1 << shift)).to(tl.int64)
            tallies += (order >= least + (2 << shift)).to(tl.int64) << 20
            tallies += (order >= least + (3 << shift)).to(tl.int64) << 40
            reached = tl.sum(tallies, 0)
            digit = ((reached & 0xFFFFF) >= count).to(tl.uint32)
            digit += (((reached >> 20) & 0xFFFFF) >= count).to(tl.uint32)
            digit += ((reached >> 40) >= count).to(tl.uint32)
            least += digit << shift
        better, equal = order > least, (order == least) & (index < newest)
        ranks = tl.cumsum((better.to(tl.int32) << 16) + equal.to(tl.int32), 0)
        place = tl.where(better, (ranks >> 16) - 1, tl.sum(better.to(tl.int32), 0) + (ranks & 0xFFFF) - 1)
        ends = lists + (row * LISTS + own).to(tl.int64) * longest + longest
        tl.store(ends - K + place, index, mask=(better | equal) & (place < count))
        tl.store(ends - 1, newest)


def choose(new: NewTokens, queries: Tensor, stores: HeadStores, due: Tensor, lists: Tensor, count: int) -> None:
    """queries [B, H, D], turned -> lists [B, retrieval heads or their query heads, n] int32, whose last `count` entries
    become the choice of rows that are `due` [B] int32. These have more than `count` pages, of at most MOST_PAGES."""
    capacity, retrieval = stores.table.shape[1], stores.pages.shape[2]
    own, parts, head_dim = lists.shape[1], stores.bounds.shape[2], new.head_dim
    group = new.heads // new.kv_heads
    scores = new.workspace.take("page scores", (new.batch, own, capacity))
    pages, on_cpu = max(1, ROWS // parts), queries.device.type == "cpu"
    options: dict[str, object] = {"launch_pdl": True} if new.pdl else {}
    score_pages[(-(-capacity // pages), new.kv_heads, new.batch)](
        queries, new.positions, due, stores.homes, stores.table, stores.bounds, scores, stores.table.stride(0),
        stores.bounds.stride(0), capacity, new.heads, new.kv_heads, own, own == retrieval and group > 1, head_dim,
        max(16, next_power_of_2(head_dim)), max(16, next_power_of_2(group)), stores.page_size, parts, pages, on_cpu,
        "ieee" if stores.bounds.element_size() == 4 else "tf32", new.pdl, num_warps=4, **options,
    )  # fmt: skip
    block = max(128, next_power_of_2(capacity))
    choose_best[(own, new.batch)](
        scores, new.positions, due, lists, capacity, lists.shape[2], count, own, stores.page_size, block, new.pdl,
        num_warps=max(4, min(32, block // 512)), **options,
    )  # fmt: skip
