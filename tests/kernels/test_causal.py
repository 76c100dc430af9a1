"""Triangles behind cached keys, every way against float64; on the CPU the ways' kernels are played by the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewer.kernels import causal
from fewer.kernels.attention import attend, attention, with_causal
from fewer.kernels.attention_part import attention_part
from fewer.kernels.causal import Way, causal_attention, fast_ways, in_runs, is_sound, run_lengths
from tests.kernels.test_attention import problem, reference


def triangle(queries: int, keys: int) -> Tensor:
    """Query t sees keys 0..keys-queries+t, by the definition."""
    return torch.arange(keys) <= keys - queries + torch.arange(queries)[:, None]


def assert_close(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], tolerance: float = 1e-5) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double().cpu(), other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("keys", [7, 8, 40])
@pytest.mark.parametrize("group", [1, 3])
def test_new_tokens_see_all_up_to_themselves(group: int, keys: int, softcap: float) -> None:
    q, k, v = problem(0, 2, 2, group, 7, keys)
    wanted = reference(q, k, v, 0.3, triangle(7, keys), softcap)
    assert_close(causal_attention(q, k, v, 0.3, softcap), wanted)
    assert_close(attention_part(q, k, v, 0.3, causal=True, softcap=softcap), wanted)
    out = attention(q, k, v, 0.3, causal=True, softcap=softcap)
    torch.testing.assert_close(out.double(), wanted[0], rtol=1e-5, atol=1e-5)


def square_only(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """A kernel whose triangles begin at the top left."""
    assert not causal or q.shape[2] == k.shape[2]
    return attend(q, k, v, scale, with_causal(None, causal, q.shape[2], k.shape[2], q.device))


def rectangle(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    return attend(q, k, v, scale, with_causal(None, causal, q.shape[2], k.shape[2], q.device))


@pytest.mark.parametrize("keys", [4, 5, 8, 23, 32, 61])
def test_runs_before_the_chunk_and_its_triangle_merge_to_one_pass(keys: int) -> None:
    q, k, v = problem(0, 2, 2, 2, 4, keys)
    assert_close(in_runs(q, k, v, 0.3, square_only, rectangle), reference(q, k, v, 0.3, triangle(4, keys)))


def test_runs_have_few_lengths_and_leave_less_than_one() -> None:
    for keys in range(0, 400):
        runs = run_lengths(keys, 8)
        assert 0 <= keys - sum(runs) < 8
        assert set(runs) <= {8, 16, 32, 64, 128, 256} and runs == sorted(set(runs), reverse=True)


def test_the_cpu_has_no_fast_way_and_refuses_to_cap_scores_in_one() -> None:
    q, k, v = (x.bfloat16() for x in problem(0, 1, 2, 2, 4, 9))
    assert fast_ways(q, k) == []
    with pytest.raises(ValueError, match="cannot cap scores"):
        causal_attention(q, k, v, 0.3, 2.0, way="flash")


def test_a_way_that_raises_leaves_the_work_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> tuple[Tensor, Tensor]:
        raise RuntimeError("no plan")

    q, k, v = problem(0, 1, 2, 2, 4, 9)
    monkeypatch.setattr(causal, "fast_ways", lambda *_: ["cudnn", "flash"])
    monkeypatch.setattr(causal, "_cudnn", broken)
    monkeypatch.setattr(causal, "_flash", broken)
    with pytest.warns(UserWarning, match="no plan"):
        found = causal_attention(q, k, v, 0.3)
    assert_close(found, reference(q, k, v, 0.3, triangle(4, 9)))


def test_a_way_of_other_numbers_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal, "_flash", square_and_ahead)
    is_sound.cache_clear()
    assert not is_sound("flash", torch.device("cpu"), torch.bfloat16, 64, 2)
    monkeypatch.setattr(causal, "_flash", rectangle)
    is_sound.cache_clear()
    assert is_sound("flash", torch.device("cpu"), torch.bfloat16, 64, 2)
    is_sound.cache_clear()


def square_and_ahead(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """A triangle that begins at the top left of a rectangle."""
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    return attend(q, k, v, scale, seen[None, None] if causal else None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keys", [128, 136, 1024])
@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (4, 128)])
@pytest.mark.parametrize("way", ["cudnn", "flash", "triton"])
@pytest.mark.gpu
def test_the_ways_of_a_gpu(way: Way, group: int, head_dim: int, keys: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 128, 2 * group, head_dim).to(dtype).transpose(1, 2)  # as projections lie in memory
    k, v = torch.randn(2, 2, 2, keys, head_dim).to(dtype).unbind(0)
    scale = head_dim**-0.5
    wanted = reference(q, k, v, scale, triangle(128, keys))
    assert_close(causal_attention(q.cuda(), k.cuda(), v.cuda(), scale, way=way), wanted, 0.02)


@pytest.mark.gpu
def test_a_gpu_takes_a_fast_way_for_sixteen_bits() -> None:
    q = torch.zeros(1, 8, 1024, 128, dtype=torch.bfloat16, device="cuda")
    k = torch.zeros(1, 2, 32_768, 128, dtype=torch.bfloat16, device="cuda")
    assert "flash" in fast_ways(q, k)
    if torch.cuda.get_device_capability() == (9, 0):
        assert fast_ways(q, k)[0] == "cudnn"
    assert fast_ways(q.float(), k.float()) == []
