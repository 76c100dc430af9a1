"""Attention over pages equals attention over whole rows, wherever the pages lie and whatever the other slots hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewer.kernels.attention import attend, merge
from fewer.kernels.paged_attention import attend_paged, paged_attention

PAGES, HK, H, D = 40, 2, 6, 8


class Scattered:
    """Rows of the given lengths in a pool whose other slots hold NaN."""

    def __init__(self, lengths: list[int], page_size: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.lengths = torch.tensor(lengths)
        self.rows = [torch.randn(2, HK, n, D, generator=generator) for n in lengths]
        storage = torch.full((2, PAGES, HK, page_size, D), torch.nan)
        numbers = torch.randperm(PAGES, generator=generator).tolist()
        self.table = torch.full((len(lengths), 1 + max(lengths) // page_size), -1, dtype=torch.int32)
        for row, stored in enumerate(self.rows):
            for index, part in enumerate(stored.split(page_size, dim=2) if stored.shape[2] else ()):
                self.table[row, index] = page = numbers.pop()
                storage[:, page, :, : part.shape[2]] = part
        self.keys, self.values = storage

    def query(self, width: int) -> Tensor:
        return torch.randn(len(self.rows), H, width, D, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("page_size", [16, 32, 64])
@pytest.mark.parametrize("lengths", [[70], [33, 1, 64, 100], [48, 48], [5, 0, 17]])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_one_token_a_row_sees_exactly_its_row(lengths: list[int], page_size: int, softcap: float) -> None:
    text = Scattered(lengths, page_size)
    q = text.query(1)
    pool = (text.keys, text.values, text.table, text.lengths, 0.3)
    out, lse = attend_paged(q, *pool, softcap=softcap)
    fast = paged_attention(q, *pool, softcap=softcap)
    for row, (k, v) in enumerate(text.rows):
        if lengths[row] == 0:
            assert not out[row].any() and lse[row].isneginf().all()
            continue
        expected, total = attend(q[row : row + 1], k[None], v[None], 0.3, softcap=softcap)
        torch.testing.assert_close(out[row], expected[0])
        torch.testing.assert_close(lse[row], total[0])
        torch.testing.assert_close(fast[row], expected[0])


def test_a_mask_by_slot_holds_for_every_query() -> None:
    text, width = Scattered([33, 60], 16), 5
    q = text.query(width)
    mask = torch.rand(2, 1, width, 70, generator=torch.Generator().manual_seed(1)) < 0.5
    out, _ = attend_paged(q, text.keys, text.values, text.table, text.lengths, 0.3, mask)
    fast = paged_attention(q, text.keys, text.values, text.table, text.lengths, 0.3, mask)
    for row, (k, v) in enumerate(text.rows):
        expected = attend(q[row : row + 1], k[None], v[None], 0.3, mask[row : row + 1, ..., : k.shape[1]])[0][0]
        torch.testing.assert_close(out[row], expected)
        torch.testing.assert_close(fast[row], expected)


def test_a_first_step_is_causal_in_rows_of_unequal_lengths() -> None:
    text = Scattered([20, 7], 16)
    q = text.query(20)
    out = paged_attention(q, text.keys, text.values, text.table, text.lengths, 0.3, causal=True)
    for row, (k, v) in enumerate(text.rows):
        length = k.shape[1]
        triangle = torch.ones(length, length, dtype=torch.bool).tril()
        expected = attend(q[row : row + 1, :, :length], k[None], v[None], 0.3, triangle[None, None])[0][0]
        torch.testing.assert_close(out[row, :, :length], expected)


def test_parts_of_a_table_merge_to_the_whole() -> None:
    """As where a shared beginning is attended once for all rows, and each row's own pages by itself."""
    text = Scattered([70, 90], 16)
    q, length = text.query(3), text.lengths
    whole = attend_paged(q, text.keys, text.values, text.table, length, 0.3)
    first = attend_paged(q, text.keys, text.values, text.table[:, :2], length.clamp(max=32), 0.3)
    rest = attend_paged(q, text.keys, text.values, text.table[:, 2:], length - 32, 0.3)
    joined = merge([first, rest])
    torch.testing.assert_close(joined[0], whole[0])
    torch.testing.assert_close(joined[1], whole[1])


def test_a_contiguous_cache_is_one_page_a_row() -> None:
    keys, values = torch.randn(2, 3, HK, 50, D)
    lengths, q = torch.tensor([50, 12, 30]), torch.randn(3, H, 1, D)
    out = paged_attention(q, keys, values, torch.arange(3, dtype=torch.int32)[:, None], lengths, 0.3)
    live = torch.arange(50) < lengths[:, None, None, None]
    torch.testing.assert_close(out, attend(q, keys, values, 0.3, live)[0])
