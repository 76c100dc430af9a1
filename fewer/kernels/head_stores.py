"""Where the heads of one layer keep their keys and values when some keep everything and others a ring: what the kernels
of a replayed pass are told of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class HeadStores:
    """Retrieval heads lie in pages, streaming heads in a ring of sinks and the last tokens, both as rows of `width`
    stored numbers (`fewer.cache.quantised_pages.RowLayout`): D numbers with 16 bits, else D·bits/8 bytes of codes, and
    scale and lowest number in float16."""

    homes: Tensor  # [Hk] int32: i for the i-th retrieval head, -1 - i for the i-th streaming one
    pages: Tensor  # [2 (keys, values), pages, retrieval heads, page_size, width]
    table: Tensor  # [B, P] int32: physical page of each logical one
    bounds: Tensor  # [pages, retrieval heads, g, 2 (largest, smallest), D] of logical pages
    ring: Tensor  # [2, B, streaming heads, sinks + window, width]
    sinks: int
    window: int
    bits: int  # 16, 8 or 4
    logical_size: int  # tokens a logical page

    @property
    def page_size(self) -> int:
        return self.pages.shape[3]

    @property
    def width(self) -> int:
        return self.pages.shape[4]
