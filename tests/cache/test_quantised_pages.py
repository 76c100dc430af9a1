"""Rows of keys and values in 8 and 4 bits: their bytes, their error, pools of them, and attention over their pages."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from fewer.cache.pages import PagePool
from fewer.cache.quantised_pages import RowLayout, attend_listed_pages, attend_whole_rows
from fewer.errors import UsageError
from fewer.kernels.attention import attend
from tests.random_model import CPU

BATCH, KV_HEADS, GROUP, DIM, SIZE = 3, 2, 3, 16, 8
LENGTHS = [37, 8, 19]
Bits = Literal[16, 8, 4]
every_width = pytest.mark.parametrize("bits", [16, 8, 4])


def layout_of(bits: Bits, head_dim: int = DIM) -> RowLayout:
    return RowLayout(head_dim, bits, torch.float32)


def filled_pool(layout: RowLayout, seed: int = 0) -> tuple[PagePool, list[Tensor]]:
    """A pool that had to grow, with random rows; and what each row holds as a reader sees it [2, Hk, n, D]."""
    generator = torch.Generator().manual_seed(seed)
    pool = PagePool(1, BATCH, KV_HEADS, layout.width, SIZE, 2, layout.stored_dtype, CPU, grows=True)
    texts = []
    pool.prepare([0] * BATCH, LENGTHS)
    for row, length in enumerate(LENGTHS):
        numbers = torch.randn(2, KV_HEADS, length, layout.head_dim, generator=generator)
        pages, places = pool.places(torch.full((length,), row), torch.arange(length))
        pool.storage[0][:, pages, :, places] = layout.pack(numbers).permute(2, 0, 1, 3)
        texts.append(layout.round_trip(numbers))
    return pool, texts


@pytest.mark.parametrize("head_dim", [8, 64, 80])
def test_a_row_takes_the_bytes_of_its_codes_and_four_for_its_scale(head_dim: int) -> None:
    for bits, expected in ((8, head_dim + 4), (4, head_dim // 2 + 4)):
        layout = layout_of(bits, head_dim)  # type: ignore[arg-type]
        packed = layout.pack(torch.randn(2, 5, head_dim))
        assert packed.dtype == torch.uint8 and packed.shape == (2, 5, expected)
    pool = PagePool(1, 1, KV_HEADS, layout.width, 64, 10, layout.stored_dtype, CPU)
    assert pool.storage.nbytes == 2 * 10 * KV_HEADS * 64 * (head_dim // 2 + 4)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_number_comes_back_within_half_a_step(bits: Bits) -> None:
    x = 5 * torch.randn(400, DIM, generator=torch.Generator().manual_seed(1)) + 3
    layout = layout_of(bits)
    rows = layout.pack(x)
    scale = layout.parts(rows)[1].float()
    assert torch.equal(layout.unpack(rows), layout.round_trip(x))
    # The lowest number is rounded to float16 first; the ends of the range may be off by that much more.
    rounding = x.abs().amax(-1, keepdim=True) * 2**-10
    assert ((layout.unpack(rows) - x).abs() <= scale / 2 + rounding + 1e-6).all()
    assert (scale <= (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / (2**bits - 1) * 1.01).all()


@every_width
def test_more_bits_lose_less_and_sixteen_nothing(bits: Bits) -> None:
    x = torch.randn(200, DIM, generator=torch.Generator().manual_seed(2))
    error = (layout_of(bits).round_trip(x) - x).abs().max()
    assert error <= {16: 0.0, 8: 0.02, 4: 0.3}[bits]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("value", [0.0, -7.25, 1e-9, 3e5])
def test_rows_of_one_number_and_numbers_beyond_float16_stay_finite(bits: Bits, value: float) -> None:
    found = layout_of(bits).round_trip(torch.full((2, DIM), value))
    assert torch.allclose(found, torch.full((2, DIM), value), rtol=1e-3, atol=1e-6)
    mixed = torch.tensor([[-3e5, *[0.0] * (DIM - 2), 3e5]])
    assert layout_of(bits).round_trip(mixed).isfinite().all()


def test_codes_are_chosen_for_the_scale_that_is_stored() -> None:
    """Packing what was read gives the same codes: nothing drifts when pages are copied through numbers."""
    layout = layout_of(4)
    rows = layout.pack(torch.randn(50, DIM, generator=torch.Generator().manual_seed(3)))
    codes = layout.parts(layout.pack(layout.unpack(rows)))[0]
    assert torch.equal(codes, layout.parts(rows)[0])


def test_four_bits_need_whole_bytes() -> None:
    with pytest.raises(UsageError, match="4-bit keys and values need a head size that 4 divides, not 6: use 8 bits"):
        layout_of(4, 6)


@every_width
def test_a_pool_grows_and_copies_packed_rows_as_they_are(bits: Bits) -> None:
    layout = layout_of(bits)
    pool, texts = filled_pool(layout)
    pool.fork(0, 1)
    pool.prepare([36, 37, 19], [37, 37, 19])  # row 0 writes where both are: the page is copied
    assert pool.rows[0][-1] != pool.rows[1][-1]
    for row in (0, 1):
        pages, places = pool.places(torch.full((37,), row), torch.arange(37))
        held = layout.unpack(pool.storage[0][:, pages, :, places]).permute(1, 2, 0, 3)
        assert torch.equal(held, texts[0])


@every_width
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("per_query", [True, False])
def test_attention_reads_the_listed_pages_and_no_others(bits: Bits, softcap: float, per_query: bool) -> None:
    layout = layout_of(bits)
    pool, texts = filled_pool(layout)
    heads = KV_HEADS * GROUP
    q = torch.randn(BATCH, heads, DIM, generator=torch.Generator().manual_seed(4))
    lists = torch.full((BATCH, heads if per_query else KV_HEADS, 3), -1, dtype=torch.int32)
    for row, chosen in enumerate(([[0, 2, 4], [3, 1, 4]], [[0], [0]], [[1, 2], [0, 2]])):
        for head in range(lists.shape[1]):
            entry = chosen[head % 2]
            lists[row, head, 3 - len(entry) :] = torch.tensor(entry)
    lengths = torch.tensor(LENGTHS)
    listed = {int(pool.table[row, page]) for row in range(BATCH) for page in lists[row].flatten().unique() if page >= 0}
    for page in set(range(pool.pages)) - listed:
        pool.storage[:, :, page] = 255 if layout.quantised else torch.nan
    found = attend_listed_pages(
        q, layout, pool.storage[0], slice(0, KV_HEADS), pool.table, lists, lengths, DIM**-0.5, softcap=softcap
    )
    for row, text in enumerate(texts):
        for head in range(heads):
            pages = lists[row, head if per_query else head // GROUP].tolist()
            tokens = [
                t for page in pages if page >= 0 for t in range(page * SIZE, min((page + 1) * SIZE, LENGTHS[row]))
            ]
            k, v = text[:, head // GROUP, tokens].double()[:, None, None]
            expected = attend(q[row, head].double().view(1, 1, 1, DIM), k, v, DIM**-0.5, softcap=softcap)[0]
            torch.testing.assert_close(found[row, head], expected.flatten().float(), atol=1e-5, rtol=1e-5)


@every_width
def test_whole_rows_of_unequal_lengths_equal_attention_over_what_they_hold(bits: Bits) -> None:
    layout = layout_of(bits)
    pool, texts = filled_pool(layout)
    q = torch.randn(BATCH, KV_HEADS * GROUP, 2, DIM, generator=torch.Generator().manual_seed(5))
    found = attend_whole_rows(
        q, layout, pool.storage[0], slice(0, KV_HEADS), pool.table, torch.tensor(LENGTHS), DIM**-0.5
    )
    for row, text in enumerate(texts):
        expected = attend(q[row : row + 1], text[0][None], text[1][None], DIM**-0.5)[0]
        torch.testing.assert_close(found[row : row + 1], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_what_lies_behind_the_end_of_a_row_does_not_reach_the_output(bits: Bits) -> None:
    layout = layout_of(bits)
    pool, _ = filled_pool(layout)
    lists = torch.tensor([[[4]], [[0]], [[2]]], dtype=torch.int32).expand(-1, KV_HEADS, -1)
    q = torch.randn(BATCH, KV_HEADS * GROUP, DIM)

    def attended() -> Tensor:
        return attend_listed_pages(
            q, layout, pool.storage[0], slice(0, KV_HEADS), pool.table, lists, torch.tensor(LENGTHS), DIM**-0.5
        )

    before = attended()
    pool.storage[:, :, pool.rows[0][4], :, LENGTHS[0] % SIZE :] = 255  # a scale that is not a number
    pool.storage[:, :, pool.rows[2][2], :, LENGTHS[2] % SIZE :] = 255
    assert torch.equal(before, attended())
