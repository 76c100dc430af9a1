"""Attention of one new token a row over the cache, against float64: groups, lengths, windows, splits, the new token."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fewer.kernels.attention import attend, merge
from fewer.kernels.triton.attention_decode import Fusion, Scratch, Tiling, attention_decode, launch, tiling_for
from fewer.model.norm import rms_norm
from fewer.model.rope import Rotary

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # the interpreter's log2 of 0
CAPACITY = 80
TILING = Tiling(splits=3, programs=8, slots=16)  # small enough that the lengths below have one to three parts
SHORT = TILING._replace(stages=1, heads=8)  # the first block is requested before the kernel in front has ended


@dataclass(frozen=True)
class Problem:
    q: Tensor  # [B, H, D]
    keys: Tensor  # [B, Hk, S, D]
    values: Tensor
    lengths: Tensor  # [B] int32


def problem(lengths: list[int], group: int, head_dim: int, device: torch.device, kv_heads: int = 2) -> Problem:
    torch.manual_seed(0)
    batch = len(lengths)
    q = torch.randn(batch, kv_heads * group, head_dim)
    keys, values = torch.randn(2, batch, kv_heads, CAPACITY, head_dim).unbind(0)
    for row, length in enumerate(lengths):  # what lies beyond a row's length must not be seen
        keys[row, :, length:], values[row, :, length:] = 1e4, 1e4
    counts = torch.tensor(lengths, dtype=torch.int32)
    return Problem(q.to(device), keys.to(device), values.to(device), counts.to(device))


def reference(
    case: Problem, scale: float, window: int | None = None, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """out [B, H, D] and log-sum-exp [B, H] in float64, one row and head at a time."""
    outs, lses = [], []
    group = case.q.shape[1] // case.keys.shape[1]
    for row, length in enumerate(case.lengths.tolist()):
        live = slice(0 if window is None else max(0, length - window), length)
        keys, values = (x[row, :, live].double().cpu().repeat_interleave(group, 0) for x in (case.keys, case.values))
        scores = scale * torch.einsum("hd,hsd->hs", case.q[row].double().cpu(), keys)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        lses.append(scores.logsumexp(-1))
        outs.append(torch.einsum("hs,hsd->hd", scores.softmax(-1), values))
    return torch.stack(outs), torch.stack(lses)


def assert_equal(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], tolerance: float = 2e-5) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double().cpu(), other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize("head_dim", [32, 80, 128])
def test_attention_equals_float64_for_groups_and_widths(group: int, head_dim: int, device: torch.device) -> None:
    case = problem([37], group, head_dim, device)
    found = attention_decode(case.q, case.keys, case.values, case.lengths, 0.3, tiling=TILING)
    assert_equal(found, reference(case, 0.3))


@pytest.mark.parametrize("tiling", [TILING, SHORT])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 48, 49, CAPACITY])
def test_lengths_at_the_edges_of_blocks_and_splits(length: int, tiling: Tiling, device: torch.device) -> None:
    case = problem([length], 3, 32, device)
    found = attention_decode(case.q, case.keys, case.values, case.lengths, 0.2, tiling=tiling)
    assert_equal(found, reference(case, 0.2))


@pytest.mark.parametrize("window", [None, 1, 16, 40])
def test_a_batch_of_unequal_lengths_equals_each_row(window: int | None, device: torch.device) -> None:
    case = problem([1, 80, 17, 33, 2], 2, 32, device)
    found = attention_decode(case.q, case.keys, case.values, case.lengths, 0.2, window, tiling=TILING)
    assert_equal(found, reference(case, 0.2, window))


def test_a_row_without_keys_gives_zeros_and_minus_infinity(device: torch.device) -> None:
    case = problem([0, 20], 2, 32, device)
    out, lse = attention_decode(case.q, case.keys, case.values, case.lengths, 0.2, tiling=TILING)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert (lse[0] == -math.inf).all()
    rest = Problem(case.q[1:], case.keys[1:], case.values[1:], case.lengths[1:])
    assert_equal((out[1:], lse[1:]), reference(rest, 0.2))


@pytest.mark.parametrize("softcap", [0.5, 20.0])
def test_scores_are_capped_before_the_softmax(softcap: float, device: torch.device) -> None:
    case = problem([45, 3], 2, 32, device)
    found = attention_decode(case.q, case.keys, case.values, case.lengths, 1.0, softcap=softcap, tiling=TILING)
    assert_equal(found, reference(case, 1.0, softcap=softcap))


@pytest.mark.parametrize("splits", [1, 2, 5, 11])
def test_any_number_of_splits_gives_the_same(splits: int, device: torch.device) -> None:
    case = problem([80], 4, 32, device)
    tiling = Tiling(splits, 100, 16)
    found = attention_decode(case.q, case.keys, case.values, case.lengths, 0.3, tiling=tiling)
    assert_equal(found, reference(case, 0.3))


def test_the_chosen_tiling_covers_the_longest_row(device: torch.device) -> None:
    case = problem([80, 9], 2, 32, device)
    found = attention_decode(case.q, case.keys, case.values, case.lengths, 0.3)
    assert_equal(found, reference(case, 0.3))
    assert tiling_for(1, 8, 32768, 132).splits == 16  # 128 parts over 8 heads, for 132 multiprocessors
    assert tiling_for(1, 8, 100, 132).splits == 2  # none shorter than 64 keys
    assert tiling_for(8, 8, 32768, 132).splits == 66  # one row may have all the length
    assert tiling_for(1024, 8, 32768, 132).splits == 1  # rows enough


def test_bfloat16_caches_and_strided_ones(device: torch.device) -> None:
    case = problem([50], 2, 64, device)
    half = Problem(*(x.bfloat16() for x in (case.q, case.keys[:, :, :60], case.values[:, :, :60])), case.lengths)
    found = attention_decode(half.q, half.keys, half.values, half.lengths, 0.2, tiling=TILING)
    assert_equal(found, reference(half, 0.2), tolerance=2**-6)
    views = Problem(case.q, case.keys[:, :, :60], case.values[:, :, :60], case.lengths)
    assert not views.keys.is_contiguous()
    assert_equal(attention_decode(*vars(views).values(), 0.2, tiling=TILING), reference(views, 0.2))


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[1], [700], [3000], [32768], [300, 5, 600], [9000, 64, 4097]])
def test_caches_of_real_sizes_in_bfloat16(lengths: list[int]) -> None:
    """The tilings that serve models: other instructions than small blocks use, and compilers have erred in them."""
    torch.manual_seed(0)
    batch, longest, device = len(lengths), max(lengths), torch.device("cuda")
    q = torch.randn(batch, 32, 128, device=device).bfloat16()
    keys, values = (torch.randn(batch, 8, longest, 128, device=device).bfloat16() for _ in "kv")
    counts = torch.tensor(lengths, dtype=torch.int32, device=device)
    out, lse = attention_decode(q, keys, values, counts, 128**-0.5)
    wanted, wanted_lse = reference(Problem(q, keys, values, counts), 128**-0.5)
    assert (out.double().cpu() - wanted).norm() <= 2**-7 * wanted.norm()
    torch.testing.assert_close(lse.double().cpu(), wanted_lse, rtol=1e-4, atol=1e-4)


def test_log_sum_exps_join_disjoint_keys(device: torch.device) -> None:
    case = problem([60], 2, 32, device)
    lengths = case.lengths // 2
    parts = [
        attention_decode(case.q, case.keys[:, :, cut], case.values[:, :, cut], lengths, 0.3, tiling=TILING)
        for cut in (slice(0, 30), slice(30, 60))
    ]
    assert_equal(merge(parts), reference(case, 0.3))


# ── with the new token: norm and rotation of q and k, the cache's new entry, attention to it ─────────────────────────


@dataclass(frozen=True)
class Layer:
    """What precedes attention in a layer."""

    rotary: Rotary | None
    q_gain: Tensor | None = None
    k_gain: Tensor | None = None

    def fusion(self, device: torch.device) -> Fusion:
        table = None if self.rotary is None else torch.view_as_real(self.rotary.table(CAPACITY, device))
        gains = [None if gain is None else gain.to(device) for gain in (self.q_gain, self.k_gain)]
        return Fusion(table, 0 if self.rotary is None else self.rotary.rotary_dim, *gains, eps=0.01)

    def prepare(self, heads: Tensor, gain: Tensor | None, positions: Tensor) -> Tensor:
        """heads [B, n, D] as projected -> normalised and turned to positions [B]."""
        if gain is not None:
            heads = rms_norm(heads, gain, 0.01, torch.float32)
        if self.rotary is None:
            return heads
        return self.rotary.apply(heads[:, :, None], positions[:, None])[:, :, 0]


def layer(kind: str, head_dim: int) -> Layer:
    rotary = Rotary(head_dim // 2 if kind == "partial" else head_dim, head_dim, 1e4, 4096)
    if kind == "norm":
        return Layer(rotary, 1 + 0.3 * torch.randn(head_dim), 1 + 0.3 * torch.randn(head_dim))
    if kind == "norm without positions":
        return Layer(None, 1 + 0.3 * torch.randn(head_dim), 1 + 0.3 * torch.randn(head_dim))
    return Layer(None if kind == "no positions" else rotary)


@pytest.mark.parametrize("kind", ["rotation", "partial", "norm", "no positions", "norm without positions"])
@pytest.mark.parametrize("lengths", [[0], [33], [5, 79, 0, 16]])
@pytest.mark.parametrize("tiling", [TILING, SHORT])
def test_the_new_token_is_rotated_stored_and_attended(
    kind: str, lengths: list[int], tiling: Tiling, device: torch.device
) -> None:
    check_new_token(kind, lengths, 3, 32, device, tiling=tiling)


@pytest.mark.parametrize("head_dim", [48, 64, 128])  # 48 fills no power of two
def test_the_new_token_for_other_widths(head_dim: int, device: torch.device) -> None:
    check_new_token("norm", [20, 3], 4, head_dim, device)


@pytest.mark.parametrize("window", [1, 8, 40])
def test_the_window_counts_the_new_token(window: int, device: torch.device) -> None:
    check_new_token("rotation", [60, 7], 2, 32, device, window=window)


def test_the_new_tokens_score_is_capped_too(device: torch.device) -> None:
    check_new_token("norm", [0, 30], 2, 32, device, softcap=1.5)


def check_new_token(
    kind: str, lengths: list[int], group: int, head_dim: int, device: torch.device, window: int | None = None,
    softcap: float | None = None, tiling: Tiling = TILING,
) -> None:  # fmt: skip
    """Attention, both caches and the tickets after a fused launch, against the separate steps."""
    case = problem(lengths, group, head_dim, device)
    kv_heads, batch, heads = 2, len(lengths), 2 * group
    made = layer(kind, head_dim)
    projected = torch.randn(batch, heads + 2 * kv_heads, head_dim)
    q, k, v = projected.split((heads, kv_heads, kv_heads), dim=1)
    positions = torch.tensor(lengths)
    q, k = made.prepare(q, made.q_gain, positions), made.prepare(k, made.k_gain, positions)
    keys, values = case.keys.cpu().clone(), case.values.cpu().clone()
    keys[range(batch), :, lengths], values[range(batch), :, lengths] = k, v
    wanted = reference(Problem(q, keys, values, positions + 1), 0.4, window, softcap)

    out = torch.empty(batch, heads, head_dim, device=device)
    lse = torch.empty(batch, heads, device=device)
    scratch = Scratch.allocate(batch, heads, kv_heads, head_dim, tiling.splits, device)
    launch(
        projected.to(device), case.keys, case.values, case.lengths, out, lse, scratch, tiling, heads, 0.4,
        window, softcap, made.fusion(device),
    )  # fmt: skip
    assert_equal((out, lse), wanted)
    torch.testing.assert_close(case.keys.cpu(), keys, rtol=1e-5, atol=1e-5)  # the new slot, and no other
    assert torch.equal(case.values.cpu(), values)
    assert not scratch.tickets.any()  # ready for the next launch


def test_the_reference_attention_is_this_kernels(device: torch.device) -> None:
    case = problem([80], 3, 32, device)
    out, lse = attend(case.q[:, :, None], case.keys, case.values, 0.3)
    found = attention_decode(case.q, case.keys, case.values, case.lengths, 0.3, tiling=TILING)
    assert_equal(found, (out[:, :, 0].double().cpu(), lse[:, :, 0].double().cpu()))
