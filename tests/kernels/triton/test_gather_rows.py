"""Whole rows out of pages of 16, 8 and 4 bits in Triton, against indexing and unpacking."""

from __future__ import annotations

import pytest
import torch

from fewer.cache.quantised_pages import Bits, RowLayout
from fewer.kernels.triton.gather_rows import gather_rows


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize(("head_dim", "page_size"), [(16, 16), (80, 32), (128, 64)])
def test_rows_lie_side_by_side_with_zeros_behind_them(
    bits: Bits, head_dim: int, page_size: int, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(0)
    layout = RowLayout(head_dim, bits, torch.float32)
    table = torch.tensor([[4, 0, 2], [1, 3, -1]], dtype=torch.int32)
    lengths = torch.tensor([2 * page_size + 5, page_size + 1])
    numbers = torch.randn(2, 6, 3, page_size, head_dim, generator=generator)
    numbers[:, 2, :, 5:] = torch.inf  # behind the first row's end
    storage, longest = layout.pack(numbers), int(lengths.max())
    found = gather_rows(
        storage.to(device), slice(1, 3), table.to(device), lengths.to(device), longest, head_dim, bits, torch.float32
    )
    assert found[0].shape == (2, 2, longest, head_dim)
    read = layout.unpack(storage)
    for row, length in enumerate(lengths.tolist()):
        held = torch.cat([read[:, page, 1:] for page in table[row].tolist() if page >= 0], dim=2)[:, :, :length]
        for one, other in zip(found, held, strict=True):
            torch.testing.assert_close(one[row, :, :length].cpu(), other, rtol=1e-6, atol=1e-6)
            assert not one[row, :, length:].any()


def test_numbers_come_in_the_type_asked_for(device: torch.device) -> None:
    layout = RowLayout(64, 4, torch.bfloat16)
    storage = layout.pack(torch.randn(2, 1, 1, 16, 64))
    table, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([16])
    keys, _ = gather_rows(
        storage.to(device), slice(0, 1), table.to(device), lengths.to(device), 16, 64, 4, torch.bfloat16
    )
    assert keys.dtype == torch.bfloat16
    wanted = layout.unpack(storage[0])[0].float()
    torch.testing.assert_close(keys[0].cpu().float(), wanted, rtol=2**-7, atol=1e-6)  # the interpreter cuts bits off
