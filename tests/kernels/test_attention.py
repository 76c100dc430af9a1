"""Attention on the CPU against a plain float64 softmax, and the merge of parts."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewer.kernels.attention import attend, attention, merge

claim = settings(max_examples=25, deadline=None)


def problem(seed: int, batch: int, kv_heads: int, group: int, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    heads = kv_heads * group
    q = torch.randn(batch, heads, queries, 16, generator=generator)
    k, v = torch.randn(2, batch, kv_heads, keys, 16, generator=generator).unbind(0)
    return q, k, v


def reference(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Query head h reads key head h // G; every key head is repeated, everything is float64."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = q.double() @ k.transpose(2, 3) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ v, scores.logsumexp(-1)


sizes = st.tuples(st.integers(1, 3), st.integers(1, 2), st.sampled_from([1, 3, 4]), st.integers(1, 6))


@claim
@given(sizes, st.integers(1, 40), st.sampled_from([0.0, 2.0]), st.booleans(), st.integers(0, 10**6))
def test_attention_equals_float64(
    size: tuple[int, int, int, int], keys: int, softcap: float, masked: bool, seed: int
) -> None:
    q, k, v = problem(seed, *size, keys)
    mask = None
    if masked:  # every query sees its first key at least
        mask = torch.rand(size[0], 1, size[3], keys, generator=torch.Generator().manual_seed(seed)) < 0.5
        mask[..., 0] = True
    wanted, wanted_lse = reference(q, k, v, 0.3, mask, softcap)
    out, lse = attend(q, k, v, 0.3, mask, softcap)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-5, atol=1e-5)
    fast = attention(q, k, v, 0.3, mask, softcap=softcap)
    torch.testing.assert_close(fast.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("group", [1, 3])
def test_causal_attention_sees_nothing_ahead(group: int, softcap: float) -> None:
    q, k, v = problem(0, 2, 2, group, 9, 9)
    triangle = torch.ones(9, 9, dtype=torch.bool).tril()
    out = attention(q, k, v, 0.3, causal=True, softcap=softcap)
    torch.testing.assert_close(out.double(), reference(q, k, v, 0.3, triangle, softcap)[0], rtol=1e-5, atol=1e-5)


def test_a_query_that_sees_nothing_gives_zeros_and_minus_infinity() -> None:
    q, k, v = problem(0, 1, 2, 2, 3, 5)
    mask = torch.ones(1, 1, 3, 5, dtype=torch.bool)
    mask[0, 0, 1] = False
    out, lse = attend(q, k, v, 0.3, mask)
    assert torch.equal(out[:, :, 1], torch.zeros_like(out[:, :, 1]))
    assert (lse[:, :, 1] == -math.inf).all()
    assert torch.isfinite(lse[:, :, [0, 2]]).all()
    fast = attention(q, k, v, 0.3, mask)
    torch.testing.assert_close(fast, out, rtol=1e-5, atol=1e-5)


def test_a_part_of_no_keys_is_empty() -> None:
    q, k, v = problem(0, 1, 2, 2, 3, 5)
    empty = attend(q, k[:, :, :0], v[:, :, :0], 0.3)
    assert torch.equal(empty[0], torch.zeros_like(q)) and (empty[1] == -math.inf).all()
    whole = attend(q, k, v, 0.3)
    for found, wanted in zip(merge([empty, whole]), whole, strict=True):
        torch.testing.assert_close(found, wanted)


def test_gradients_pass_through_the_reference() -> None:
    q, k, v = (x.double().requires_grad_() for x in problem(0, 1, 2, 2, 3, 5))

    def gradients(out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out.double().square().sum() + lse.double().sum(), (q, k, v))

    wanted = gradients(*reference(q, k, v, 0.3))
    for one, other in zip(gradients(*attend(q, k, v, 0.3)), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@claim
@given(st.lists(st.integers(1, 10), min_size=2, max_size=5), st.integers(0, 10**6))
def test_parts_merge_to_the_whole_in_any_order_and_grouping(runs: list[int], seed: int) -> None:
    q, k, v = problem(seed, 2, 2, 3, 2, sum(runs))
    parts = [attend(q, *run, 0.3) for run in zip(k.split(runs, 2), v.split(runs, 2), strict=True)]
    wanted = reference(q, k, v, 0.3)
    random.Random(seed).shuffle(parts)
    nested = parts[0]
    for part in parts[1:]:
        nested = merge([nested, part])
    for out, lse in (merge(parts), nested):
        torch.testing.assert_close(out.double(), wanted[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse.double(), wanted[1], rtol=1e-5, atol=1e-5)


def test_a_part_without_keys_weighs_nothing() -> None:
    q, k, v = problem(0, 1, 1, 2, 1, 4)
    whole = attend(q, k, v, 0.3)
    blind = torch.full_like(whole[0], 5.0), torch.full_like(whole[1], -math.inf)
    for found, wanted in zip(merge([whole, blind]), whole, strict=True):
        torch.testing.assert_close(found, wanted)
    out, lse = merge([blind, blind])
    assert torch.equal(out, torch.zeros_like(out)) and (lse == -math.inf).all()
    unwritten = torch.full_like(whole[0], math.nan), blind[1]
    torch.testing.assert_close(merge([unwritten, whole])[0], whole[0])


@claim
@given(st.integers(2, 6), st.floats(0.1, 30.0), st.integers(0, 10**6))
def test_the_order_of_parts_does_not_matter(count: int, spread: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = [
        (torch.randn(3, 8, generator=generator), spread * torch.randn(3, generator=generator)) for _ in range(count)
    ]
    out, lse = merge(parts)
    near = 1e-6 * max(1.0, float(torch.stack([lse for _, lse in parts]).abs().max()))  # float32 rounds a large lse
    for found in (merge(parts[::-1]), merge([merge(parts[:2]), *parts[2:]]), merge([parts[0], merge(parts[1:])])):
        torch.testing.assert_close(found[0], out, rtol=1e-6, atol=near)
        torch.testing.assert_close(found[1], lse, rtol=1e-6, atol=near)


def test_bfloat16_parts_are_rounded_once() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [
        (torch.randn(4, 64, generator=generator).bfloat16(), torch.randn(4, generator=generator)) for _ in range(9)
    ]
    exact = merge([(out.float(), lse) for out, lse in parts])[0]
    assert torch.equal(merge(parts)[0], exact.bfloat16())


def test_bfloat16_attention_is_summed_in_float32() -> None:
    q, k, v = (x.bfloat16() for x in problem(0, 1, 2, 3, 1, 300))
    out, lse = attend(q, k, v, 0.3)
    wanted = reference(q, k, v, 0.3)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), wanted[0], rtol=2**-8, atol=1e-4)
    torch.testing.assert_close(lse.double(), wanted[1], rtol=1e-5, atol=1e-5)
