"""Hydragen gives the numbers of `full`, for any tree of shared prefixes, and computes, stores and reads them once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fewer.cache import FullCache, HydragenCache, HydragenConfig
from fewer.cache.prefix_gate import SplitCost, split_cost
from fewer.cache.prefix_level import LevelKeys, PrefixLevel
from fewer.decoding.generate import generate
from fewer.decoding.prompt_lookup import PromptLookup
from fewer.decoding.sampling import SamplingConfig
from fewer.engine.session import Session
from fewer.errors import FewerError, NumericalError, UsageError
from fewer.formats import DenseFormat, Int4Format, WeightFormat
from fewer.kernels.attention import attend, merge
from fewer.kernels.attention_part import attention_part
from fewer.language_model import load
from fewer.model.step import Step
from fewer.model.transformer import Transformer
from fewer.registry import parse_spec
from fewer.slots import DraftTree
from tests.random_model import CONFIG, CPU, config_of, new_session, random_tokens, random_transformer
from tests.tiny_model import write_model

GEMMA = config_of(
    sliding_window=20, sliding_layers=(True, False, True), local_rope_theta=500.0, qk_norm="head", context_length=2048
)
CONFIGS = {
    "gqa": CONFIG,
    "biases": config_of(attention_bias=True, heads=7, kv_heads=1, tied_embeddings=True),
    "softcap": config_of(attention_softcap=8.0, rope_layers=(True, False, True)),
    "windows": config_of(sliding_window=20),
    "local-and-global": GEMMA,
}
MODELS = {name: random_transformer(config) for name, config in CONFIGS.items()}
every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
TREE = DraftTree([5, 6, 7, 8, 9, 10], [-1, 0, 0, 2, 1, 3])
ALWAYS = HydragenConfig(shortest=4, split="always")

ROOT, LEFT, RIGHT = random_tokens(40, seed=1), random_tokens(20, seed=2), random_tokens(30, seed=3)
THREE_LEVELS = [ROOT + LEFT + [1] * 9 + [0], ROOT + LEFT + [1] * 9 + [2, 3], ROOT + LEFT + [4], ROOT + RIGHT + [5]]
THREE_LEVELS += [ROOT + [6, 7], ROOT + RIGHT + [8] * 5, [9, 9]]  # rows of every depth, and one that shares nothing
LAYOUTS: dict[str, list[list[int]]] = {
    "one level": [ROOT + random_tokens(3 + row, seed=row) for row in range(4)],
    "one prompt": [ROOT] * 5,
    "two levels": [ROOT + (LEFT, RIGHT)[row % 2] + random_tokens(2 + row, seed=row) for row in range(5)],
    "two trees": [(LEFT, RIGHT)[row % 2] + random_tokens(1 + row, seed=row) for row in range(4)],
    "three ragged levels": THREE_LEVELS,
}


def pair(
    model: Transformer, batch: int, settings: HydragenConfig = ALWAYS, chunk: int = 512
) -> tuple[Session, Session]:
    """The same empty batch with hydragen and with the full cache."""
    sessions = new_session(model, batch, HydragenCache, settings), new_session(model, batch, FullCache)
    for session in sessions:
        session.runner.chunk = chunk
    return sessions


def close(ours: torch.Tensor, full: torch.Tensor) -> None:
    torch.testing.assert_close(ours, full, atol=1e-4, rtol=1e-4)


def cache_of(session: Session) -> HydragenCache:
    assert isinstance(session.cache, HydragenCache)
    return session.cache


def count_fed(session: Session) -> list[tuple[int, ...]]:
    """Tokens of each row in each pass, from now on."""
    fed: list[tuple[int, ...]] = []
    run = session.runner.step

    def counting(step: Step, cache: Any) -> Any:
        batch, width = step.positions.shape
        fed.append(tuple(step.lengths or [width] * batch))
        return run(step, cache)

    session.runner.step = counting  # type: ignore[method-assign]
    return fed


# ── the same numbers ─────────────────────────────────────────────────────────────────────────────────────────────────


@every_model
@pytest.mark.parametrize("prompts", LAYOUTS.values(), ids=LAYOUTS)
def test_prefill_and_decoding_equal_full_while_rows_finish(model: Transformer, prompts: list[list[int]]) -> None:
    ours, full = pair(model, len(prompts), chunk=16)
    close(ours.prefill(prompts), full.prefill(prompts))
    assert cache_of(ours).levels and ours.lengths == full.lengths
    for step in range(24):
        tokens, active = random_tokens(len(prompts), seed=step), [step < 6 * row + 6 for row in range(len(prompts))]
        on = [row for row, flag in enumerate(active) if flag]
        found = ours.decode(tokens, active)
        close(found[on], full.decode(tokens, active)[on])
        assert found.isfinite().all()
    close(ours.prefill(prompts), full.prefill(prompts))  # a second turn


def test_rows_read_their_own_text_by_its_length_as_on_cuda() -> None:
    ours, full = pair(MODELS["softcap"], len(THREE_LEVELS))
    cache_of(ours).by_lengths = True
    close(ours.prefill(THREE_LEVELS), full.prefill(THREE_LEVELS))
    for step in range(9):
        tokens, active = random_tokens(7, seed=step), [step % 2 == row % 2 or step < 4 for row in range(7)]
        on = [row for row, flag in enumerate(active) if flag]
        close(ours.decode(tokens, active)[on], full.decode(tokens, active)[on])


@every_model
def test_a_chunk_is_as_good_as_the_whole(model: Transformer) -> None:
    logits = [pair(model, len(THREE_LEVELS), chunk=chunk)[0].prefill(THREE_LEVELS) for chunk in (7, 512)]
    close(logits[0], logits[1])


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("split", ["always", "measured"])
def test_greedy_text_is_the_same_with_one_two_and_three_levels(levels: int, split: str) -> None:
    settings = HydragenConfig(levels, 4, split)  # type: ignore[arg-type]
    texts = []
    for session in pair(MODELS["local-and-global"], len(THREE_LEVELS), settings):
        rows: list[list[int]] = [[] for _ in THREE_LEVELS]
        for event in generate(session, THREE_LEVELS, SamplingConfig(), max_tokens=40, stop_tokens=(3, 4)):
            rows[event.row] += event.tokens
        texts.append(rows)
    assert texts[0] == texts[1]


def test_a_prefix_longer_than_the_window_is_stored_and_read_by_its_end_only() -> None:
    """Windowed layers keep what a row may still see; where the window has left the prefix, it is not read at all."""
    prefix = random_tokens(700, seed=5)
    prompts = [prefix + random_tokens(n, seed=n) for n in (3, 9, 40)]
    ours, full = pair(MODELS["local-and-global"], 3)
    close(ours.prefill(prompts), full.prefill(prompts))
    level = cache_of(ours).levels[0]
    windowed, whole = sorted(level.keys, key=lambda keys: keys.lengths)
    assert windowed.window == 20 and windowed.lengths[0] < 300 and windowed.firsts[0] == 700 - windowed.lengths[0]
    assert whole.lengths == [700] and ours.cache.positions(0, 1).tolist() == list(range(703))
    for step in range(25):
        tokens = random_tokens(3, seed=step)
        close(ours.decode(tokens), full.decode(tokens))
    kind, reading = level.keys.index(windowed), level.reading([1, 1, 1], 1)
    positions = torch.tensor(ours.lengths)[:, None]
    assert level.sights(kind, reading, positions) == []
    sights = level.sights(kind, reading, torch.tensor([[705], [715], [740]]))
    assert sights is not None and [(sight.first, sight.queries) for sight in sights] == [
        (686 - windowed.firsts[0], slice(0, 3))
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int4_weights_and_bfloat16_follow_full_when_text_is_forced(dtype: torch.dtype) -> None:
    config = config_of(hidden_size=64, intermediate_size=64)
    model = random_transformer(config, dtype=dtype, quantize=quantised)
    ours, full = pair(model, len(THREE_LEVELS))
    found = [(ours.prefill(THREE_LEVELS), full.prefill(THREE_LEVELS))]
    found += [(ours.decode(tokens), full.decode(tokens)) for tokens in ([1] * 7, [2] * 7, [3] * 7)]
    for mine, theirs in found:
        assert float((mine - theirs).norm() / theirs.norm()) < 0.1  # 4-bit products take bfloat16


def test_without_anything_in_common_it_is_full_to_the_bit() -> None:
    prompts = [random_tokens(9, seed=row) for row in range(3)]
    ours, full = pair(MODELS["gqa"], 3)
    assert torch.equal(ours.prefill(prompts), full.prefill(prompts))
    assert torch.equal(ours.decode([1, 2, 3]), full.decode([1, 2, 3]))
    assert cache_of(ours).is_plain and not cache_of(ours).levels  # fast paths of the engine take it
    one = new_session(MODELS["gqa"], 1, HydragenCache)
    assert list(one.greedy(5, 9)) == list(new_session(MODELS["gqa"], 1).greedy(5, 9))


def quantised(name: str, weight: torch.Tensor) -> WeightFormat:
    return DenseFormat(weight.bfloat16()) if name == "embed.weight" else Int4Format.from_dense(weight)


# ── a level by itself, in every layout ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("lengths", [[30, 30], [30, 7, 19]])
@pytest.mark.parametrize("own", [[5, 0, 3, 9, 1], [0] * 5])
def test_levels_and_suffixes_merge_to_the_concatenation(lengths: list[int], own: list[int]) -> None:
    """float32, to 1e-5: ragged groups, rows without a prefix, rows without a suffix (those give zeros, not NaN)."""
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(2, 2, len(lengths), 2, 30, 8, generator=generator)
    stops = [100 + length for length in lengths]
    keys = LevelKeys.take(pool, list(range(len(lengths))), lengths, stops, None)
    groups = [[0, 3], [2]] if len(lengths) == 2 else [[3], [0, 4], [2]]
    level = PrefixLevel([keys], [100] * len(lengths), stops, groups)
    q, suffix = torch.randn(5, 6, 1, 8, generator=generator), torch.randn(2, 5, 2, 9, 8, generator=generator)
    seen = (torch.arange(9) < torch.tensor(own)[:, None])[:, None, None]
    part = level.attend(q, 0, 1, level.reading([1] * 5, 1), None, 0.3, 0.0)
    assert part is not None
    out, lse = merge([attention_part(q, suffix[0], suffix[1], 0.3, seen), part])
    for row in range(5):
        prefix = level.prefix_of(row)
        shared = [] if prefix is None else [pool[1, :, prefix, :, : lengths[prefix]]]
        k, v = torch.cat([*shared, suffix[:, row, :, : own[row]]], 2)
        wanted, total = attend(q[row, None], k[None], v[None], 0.3)
        torch.testing.assert_close(out[row], wanted[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(lse[row], total[0], atol=1e-5, rtol=0)


def test_prefixes_of_unequal_lengths_lie_without_padding() -> None:
    pool = torch.randn(3, 2, 4, 2, 50, 8)
    keys = LevelKeys.take(pool, [3, 0, 2], [50, 1, 20], [50, 1, 20], None)
    assert keys.nbytes == 3 * 2 * 2 * 8 * (50 + 1 + 20) * 4
    for prefix, (row, length) in enumerate([(3, 50), (0, 1), (2, 20)]):
        assert torch.equal(keys.span(prefix, 0, length), pool[:, :, row, :, :length])
    assert LevelKeys.take(pool, [0, 1, 2, 3], [50] * 4, [50] * 4, None).pool is pool  # equal ones are not copied


# ── what is computed, stored and read ────────────────────────────────────────────────────────────────────────────────


def test_a_prefix_is_computed_once_and_the_suffixes_after_it() -> None:
    ours, full = pair(MODELS["gqa"], len(THREE_LEVELS))
    fed = count_fed(ours)
    close(ours.prefill(THREE_LEVELS), full.prefill(THREE_LEVELS))
    assert fed == [(40,), (20, 30), (9,), (1, 2, 1, 1, 2, 5, 2)]


def test_one_prompt_for_many_completions_feeds_each_row_one_token() -> None:
    ours, _ = pair(MODELS["gqa"], 6)
    fed = count_fed(ours)
    logits = ours.prefill([ROOT] * 6)
    assert fed == [(39,), (1,) * 6]
    assert torch.equal(logits, logits[:1].expand(6, -1))


@pytest.mark.parametrize("shared", [64, 100])
def test_memory_is_the_prefix_once_and_each_row_s_own(shared: int) -> None:
    """P + B·S tokens, where `full` takes B·(P + S)."""
    batch, own, answer = 8, 12, 5
    prefix = random_tokens(shared, seed=1)
    prompts = [prefix + random_tokens(own, seed=2 + row) for row in range(batch)]
    capacity = shared + own + answer
    caches = [kind(CONFIG, batch, capacity, torch.float32, CPU) for kind in (HydragenCache, FullCache)]
    cache, full = HydragenCache(CONFIG, batch, capacity, torch.float32, CPU, ALWAYS), caches[1]
    model = MODELS["gqa"]
    for each in (cache, full):
        session = new_session(model, batch)
        session.cache = each
        session.prefill(prompts)
        for _ in range(answer):
            session.decode([1] * batch)
    token = CONFIG.kv_bytes_per_token(4)
    assert cache.nbytes == (shared + batch * (own + answer)) * token
    assert full.nbytes == batch * capacity * token


def test_three_levels_hold_each_token_once() -> None:
    ours, _ = pair(MODELS["gqa"], len(THREE_LEVELS))
    ours.prefill(THREE_LEVELS)
    levels = cache_of(ours).levels
    assert sum(level.nbytes for level in levels) == (40 + 20 + 30 + 9) * CONFIG.kv_bytes_per_token(4)
    assert [level.members for level in levels] == [[[0, 1, 2, 3, 4, 5]], [[0, 1, 2], [3, 5]], [[0, 1]]]
    assert ours.cache.positions(1).tolist() == list(range(71)) and ours.cache.physical_lengths[1] == 2


@pytest.mark.parametrize("levels", [1, 2])
def test_no_more_levels_than_asked_for(levels: int) -> None:
    ours, full = pair(MODELS["gqa"], len(THREE_LEVELS), HydragenConfig(levels, 4, "always"))
    close(ours.prefill(THREE_LEVELS), full.prefill(THREE_LEVELS))
    assert len(cache_of(ours).levels) == levels


# ── the gate ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def fixed_cost(pays: Callable[[int, int], bool]) -> Callable[..., Any]:
    class Cost:
        @staticmethod
        def pays(branches: int, tokens: int, nodes: int) -> bool:
            return pays(branches, tokens)

    return lambda *shape: Cost


@every_model
@pytest.mark.parametrize(
    ("pays", "levels", "starts"),
    [
        (lambda branches, tokens: False, 0, [0] * 7),
        (lambda branches, tokens: tokens == 40, 1, [40, 40, 40, 40, 40, 40, 0]),
        (lambda branches, tokens: tokens in (20, 30), 1, [60, 60, 60, 70, 0, 70, 0]),
        (lambda branches, tokens: tokens in (40, 9), 2, [69, 69, 40, 40, 40, 40, 0]),
    ],
)
def test_levels_that_do_not_pay_are_computed_once_and_copied(
    monkeypatch: pytest.MonkeyPatch, model: Transformer, pays: Any, levels: int, starts: list[int]
) -> None:
    monkeypatch.setattr("fewer.cache.hydragen.split_cost", fixed_cost(pays))
    ours, full = pair(model, len(THREE_LEVELS), HydragenConfig(shortest=4), chunk=16)
    fed = count_fed(ours)
    close(ours.prefill(THREE_LEVELS), full.prefill(THREE_LEVELS))
    assert sum(map(sum, fed)) == 40 + 20 + 30 + 9 + 14
    assert len(cache_of(ours).levels) == levels and cache_of(ours).starts == starts
    for step in range(24):
        tokens = random_tokens(7, seed=step)
        close(ours.decode(tokens), full.decode(tokens))


def test_the_gate_weighs_what_is_saved_against_a_level() -> None:
    cost = SplitCost(row_token=1.0, prefix_token=0.1, level=100.0)
    assert not cost.pays(1, 10**6)
    assert cost.pays(2, 101) and not cost.pays(2, 100)  # one of two reads is saved
    assert cost.pays(50, 3) and not cost.pays(50, 2)  # arithmetic is the bound: 45 of 50
    assert cost.pays(2, 26, nodes=4)
    measured = split_cost(4, 2, 8, torch.float32, CPU)
    assert measured is split_cost(4, 2, 8, torch.float32, CPU)
    assert measured.level > 0 and measured.row_token > 0 and measured.prefix_token >= 0


# ── going back ───────────────────────────────────────────────────────────────────────────────────────────────────────


@every_model
def test_trees_commits_and_rollbacks_equal_full(model: Transformer) -> None:
    ours, full = pair(model, len(THREE_LEVELS))
    close(ours.prefill(THREE_LEVELS), full.prefill(THREE_LEVELS))
    for path in ([0, 2, 3, 5], [0, 1, 4], [0], []):
        trees: list[DraftTree | None] = [TREE, None, TREE, None, None, TREE, None]
        found, wanted = ours.verify(trees), full.verify(trees)
        for mine, theirs in zip(found, wanted, strict=True):
            if mine is not None and theirs is not None:
                close(mine, theirs)
        for session in (ours, full):
            session.commit([path if tree else [] for tree in trees])
        close(ours.decode([3] * 7), full.decode([3] * 7))
    for session in (ours, full):
        session.rollback([75, 70, 62, 71, 42, 76, 1])
    close(ours.decode([7] * 7), full.decode([7] * 7))
    assert ours.lengths == full.lengths


@every_model
def test_a_row_that_goes_back_into_a_prefix_leaves_it(model: Transformer) -> None:
    ours, full = pair(model, len(THREE_LEVELS))
    cuts = [[65, 71, 61, 71, 42, 75, 2], [65, 45, 61, 70, 42, 60, 2], [41, 45, 40, 0, 42, 39, 0]]
    for session in (ours, full):
        session.prefill(THREE_LEVELS)
    for cut in cuts:
        for session in (ours, full):
            session.rollback(cut)
            assert session.lengths == cut
        for step in range(3):
            tokens = random_tokens(7, seed=step)
            close(ours.decode(tokens), full.decode(tokens))
        for session in (ours, full):
            session.rollback(cut)
    members = [level.members for level in cache_of(ours).levels]
    assert members == [[[0, 1, 2, 4]]] and cache_of(ours).starts == [40, 40, 40, 0, 40, 0, 0]
    for session in (ours, full):
        session.rollback([0] * 7)
    assert cache_of(ours).is_plain and not cache_of(ours).levels
    close(ours.prefill(THREE_LEVELS), full.prefill(THREE_LEVELS))
    assert len(cache_of(ours).levels) == 3


def test_going_back_to_what_a_window_has_dropped_is_refused() -> None:
    prompts = [random_tokens(700, seed=5) + [row] for row in range(2)]
    ours, _ = pair(MODELS["local-and-global"], 2)
    ours.prefill(prompts)
    with pytest.raises(FewerError, match="cannot go back to 300 tokens, into a shared prefix"):
        ours.rollback([300, 701])
    assert ours.lengths == [701, 701] and cache_of(ours).levels[0].members == [[0, 1]]
    ours.rollback([680, 0])
    assert ours.lengths == [680, 0]


@pytest.mark.parametrize("model", [MODELS["gqa"], MODELS["local-and-global"]], ids=["gqa", "local-and-global"])
def test_guesses_are_verified_over_shared_prefixes(model: Transformer) -> None:
    prompts = [ROOT[:30] * 2 + [row, 3] for row in range(3)]
    texts = []
    for session in pair(model, 3):
        rows: list[list[int]] = [[], [], []]
        for event in generate(session, prompts, SamplingConfig(), PromptLookup(), max_tokens=50):
            rows[event.row] += event.tokens
        texts.append(rows)
    assert texts[0] == texts[1]


def test_a_failed_prefill_leaves_the_batch_empty() -> None:
    model = random_transformer(CONFIG)
    ours, full = pair(model, 3)
    prompts = [ROOT + [row] for row in range(3)]
    norm = model.norm.clone()
    model.norm.fill_(torch.nan)
    with pytest.raises(NumericalError):
        ours.prefill(prompts)
    model.norm.copy_(norm)
    assert ours.lengths == [0] * 3 and not cache_of(ours).levels
    close(ours.prefill(prompts), full.prefill(prompts))


def test_prompts_that_do_not_fit_are_refused_before_anything_is_fed() -> None:
    ours = new_session(MODELS["gqa"], 2, HydragenCache, ALWAYS, context=50)
    fed = count_fed(ours)
    with pytest.raises(UsageError, match="51 tokens do not fit the model's context of 50"):
        ours.prefill([ROOT + [1] * 11, ROOT + [2]])
    assert fed == [] and ours.lengths == [0, 0]


def test_tokens_that_skip_a_layer_are_seen_by_nobody_there() -> None:
    outputs = []
    for session in pair(MODELS["gqa"], 3):
        session.prefill([ROOT + [row] for row in range(3)])
        tokens, positions = torch.tensor([[4, 5]] * 3), torch.tensor([[41, 42]] * 3)
        plan = torch.tensor([[True, False, True], [True, True, False]]).expand(3, -1, -1)
        session.cache.reserve(60)
        step = Step(tokens, positions, role="generated", layer_plan=plan, logits="all")
        logits = session.runner.step(step, session.cache).logits
        session.cache.commit([2, 2, 2])
        assert logits is not None
        outputs.append(torch.cat([logits.flatten(0, 1), session.decode([4, 5, 6])]))
    close(outputs[0], outputs[1])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hydragen:levels=-1", "levels=-1 is negative: use 1 or more, or 0 for any number"),
        ("hydragen:shortest=0", "shortest=0 shares nothing: use 1 or more"),
        ("hydragen:split=never", "choose one of measured, always"),
    ],
)
def test_settings_out_of_range_are_refused(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_spec("cache", spec)


def test_a_batch_gets_several_completions_of_each_prompt(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "tiny")
    plain, shared = (load(folder, weights="dense", dtype="float32", cache=cache) for cache in ("full", "hydragen"))
    prompts = ["the cat sat on the mat and the dog sat on the log. " * 4 + end for end in ("The cat", "Every file")]
    sampling = SamplingConfig(temperature=1.2, seed=5)
    answers = shared.generate_batch(prompts, raw=True, max_tokens=20, sampling=sampling, completions=3)
    for row, answer in enumerate(answers):
        own = SamplingConfig(temperature=1.2, seed=5 + row)
        assert answer.tokens == plain.generate(prompts[row // 3], raw=True, max_tokens=20, sampling=own).tokens
    assert len({answer.text for answer in answers[:3]}) > 1
    with pytest.raises(UsageError, match="completions is 0: ask for at least 1 answer to each prompt"):
        shared.generate_batch(prompts, completions=0)


def test_prompts_may_be_any_sequence() -> None:
    ours, full = pair(MODELS["gqa"], 2)
    prompts: list[Sequence[int]] = [tuple(ROOT + [1]), torch.tensor(ROOT + [2])]  # type: ignore[list-item]
    close(ours.prefill(prompts), full.prefill(prompts))
