"""Parts of the attention equal the float64 reference, with every mask, and merge to the whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewer.kernels import attention_part as module
from fewer.kernels.attention import attend, merge
from fewer.kernels.attention_part import attention_part

SHAPE = (3, 6, 5, 8)  # B, H, T, D


def problem(keys: int, kv_heads: int = 2, queries: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(keys)
    batch, heads, _, head_dim = SHAPE
    k, v = torch.randn(2, batch, kv_heads, keys, head_dim, generator=generator)
    return torch.randn(batch, heads, queries, head_dim, generator=generator), k, v


def close(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("kind", ["all", "causal", "rows", "one for all queries", "one for all rows"])
def test_every_mask_equals_the_reference(kind: str, kv_heads: int, softcap: float) -> None:
    q, k, v = problem(5 if kind == "causal" else 700, kv_heads)
    shapes = {"rows": (3, 1, 5, 700), "one for all queries": (3, 1, 1, 700), "one for all rows": (1, 1, 5, 700)}
    shape = shapes.get(kind)
    mask = None if shape is None else torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    if mask is not None:
        mask[0, :, -1] = False  # a query that sees nothing
    found = attention_part(q, k, v, 0.3, mask, kind == "causal", softcap)
    triangle = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    close(found, attend(q, k, v, 0.3, triangle if kind == "causal" else mask, softcap))
    if mask is not None:
        assert (found[1][0, :, -1] == -torch.inf).all() and not found[0][0, :, -1].any()


def test_no_keys_are_an_empty_part() -> None:
    out, lse = attention_part(*problem(0), 0.3)
    assert not out.any() and (lse == -torch.inf).all()


def test_parts_merge_to_the_whole_in_any_order_and_any_tree() -> None:
    q, k, v = problem(90)
    ends = [0, 1, 40, 40, 90]
    parts = [attention_part(q, k[:, :, a:b], v[:, :, a:b], 0.3) for a, b in zip(ends, ends[1:], strict=False)]
    whole = attend(q, k, v, 0.3)
    close(merge(parts), whole)
    close(merge(parts[::-1]), whole)
    close(merge([merge(parts[:2]), merge(parts[2:])]), whole)
    close(merge([parts[3], merge([parts[0], merge([parts[2], parts[1]])])]), whole)


def test_the_reference_takes_some_queries_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = problem(30)
    mask = torch.rand(3, 1, 5, 30, generator=torch.Generator().manual_seed(2)) < 0.5
    whole = attention_part(q, k, v, 0.3, mask, softcap=2.0)
    monkeypatch.setattr(module, "MOST_SCORES", 3 * 6 * 30 * 2)
    close(attention_part(q, k, v, 0.3, mask, softcap=2.0), whole)


def test_bfloat16_rounds_the_output_only() -> None:
    q, k, v = (part.bfloat16() for part in problem(50))
    out, lse = attention_part(q, k, v, 0.3)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    wanted, total = attend(q.float(), k.float(), v.float(), 0.3)
    torch.testing.assert_close(out.float(), wanted, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(lse, total, atol=1e-3, rtol=1e-3)
