"""Eviction by score: keys are really gone, what stays is what masks would leave, however a text is fed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fewer.cache import (
    A2sfCache,
    A2sfConfig,
    H2OCache,
    H2OConfig,
    SnapKVCache,
    SnapKVConfig,
    TovaCache,
    TovaConfig,
)
from fewer.cache.scored import ScoredCache
from fewer.decoding.generate import generate
from fewer.decoding.sampling import SamplingConfig
from fewer.engine.session import Session
from fewer.errors import FewerError, UsageError
from fewer.model.step import Step
from fewer.recipe import Recipe
from fewer.slots import DraftTree
from fewer.weights.int4 import Int4Weights
from tests.cache.masked_reference import Choose, MaskedCache, fading, last_row, votes
from tests.random_model import config_of, new_session, random_tokens, random_transformer

BUDGET = 24
CONFIG = config_of(head_dim=16)  # heads that the CPU's fast path takes; the others go the general way
GEMMA = config_of(sliding_window=20, sliding_layers=(True, False, True), attention_softcap=8.0, local_rope_theta=500.0)
CONFIGS = {
    "gqa": CONFIG,
    "mha-biases": config_of(kv_heads=4, attention_bias=True),
    "mqa-nope": config_of(kv_heads=1, rope_layers=(True, False, True)),
    "head-norms": config_of(qk_norm="head", attention_softcap=8.0),
    "local-and-global": GEMMA,
}
MODELS = {name: random_transformer(config) for name, config in CONFIGS.items()}
MODEL = MODELS["gqa"]
every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)

Kind = tuple[type[ScoredCache], Callable[..., Any]]
A2SF: Kind = (A2sfCache, A2sfConfig)
H2O: Kind = (H2OCache, H2OConfig)
TOVA: Kind = (TovaCache, TovaConfig)
SNAPKV: Kind = (SnapKVCache, SnapKVConfig)
PREFILL, STEPWISE = {"mode": "prefill-then-evict"}, {"mode": "stepwise"}
KINDS = {
    "a2sf": (A2SF, {}),
    "a2sf-stepwise": (A2SF, STEPWISE),
    "a2sf-all-queries": (A2SF, {"alpha": 0.9, "recent": 2}),
    "a2sf-cache-positions": (A2SF, {"positions": "cache"}),
    "h2o": (H2O, {}),
    "h2o-stepwise-cache-positions": (H2O, {**STEPWISE, "positions": "cache"}),
    "tova": (TOVA, {}),
    "tova-stepwise": (TOVA, STEPWISE),
    "snapkv": (SNAPKV, {}),
}
every_kind = pytest.mark.parametrize(("kind", "settings"), KINDS.values(), ids=KINDS)


def session_of(kind: Kind, settings: dict[str, Any], budget: int = BUDGET, model: Any = MODEL, **how: Any) -> Session:
    make, config = kind
    if make is SnapKVCache:
        settings = {"window": 16, **settings}
    session = new_session(model, how.get("batch", 1), make, config(budget=budget, **settings))
    session.runner.chunk = how.get("chunk", 512)
    return session


def scored(session: Session) -> ScoredCache:
    assert isinstance(session.cache, ScoredCache)
    return session.cache


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


# ── a budget as large as the text ────────────────────────────────────────────────────────────────────────────────────


@every_model
@every_kind
def test_a_budget_as_large_as_the_text_equals_full(model: Any, kind: Kind, settings: dict[str, Any]) -> None:
    full, session = new_session(model), session_of(kind, settings, 64, model, chunk=11)
    prompt = random_tokens(44)
    logits = session.prefill([prompt])
    close(logits, full.prefill([prompt]))
    for _ in range(20):
        token = int(logits.argmax())
        logits, expected = session.decode([token]), full.decode([token])
        close(logits, expected)
        assert logits.argmax() == expected.argmax()


@pytest.mark.parametrize(("kind", "settings"), [(A2SF, {}), (SNAPKV, {})])
def test_with_4_bit_weights_a_large_budget_equals_full(kind: Kind, settings: dict[str, Any]) -> None:
    method = Int4Weights(torch.bfloat16)
    config = config_of(hidden_size=64, head_dim=16, intermediate_size=128)
    model = random_transformer(
        config, dtype=torch.bfloat16, quantize=lambda name, weight: method.quantize(name, weight)
    )
    full, session = new_session(model), session_of(kind, settings, 64, model)
    prompt = random_tokens(40)
    first, expected = session.prefill([prompt]), full.prefill([prompt])
    torch.testing.assert_close(first, expected, atol=0.15, rtol=0.05)
    for token in random_tokens(40, seed=2):
        assert session.decode([token]).isfinite().all()


# ── what is dropped ──────────────────────────────────────────────────────────────────────────────────────────────────

POLICIES: dict[str, tuple[Kind, dict[str, Any], Choose]] = {
    "a2sf": (A2SF, {}, fading(0.2, BUDGET)),
    "a2sf-slow-with-recent": (A2SF, {"alpha": 0.9, "recent": 3}, fading(0.9, BUDGET, 3)),
    "a2sf-last-query": (A2SF, {"alpha": 0.0}, fading(0.0, BUDGET)),
    "h2o": (H2O, {}, fading(1.0, BUDGET, BUDGET // 2)),
    "tova": (TOVA, {}, last_row(BUDGET)),
}


def compare_with_masks(session: Session, reference: MaskedCache, prompts: list[list[int]], model: Any) -> None:
    """Prompts with greedy answers between them: the same logits, tokens and keys throughout."""
    masked = new_session(model, 1, lambda *_: reference)
    masked.runner.chunk = session.runner.chunk
    for prompt in prompts:
        logits, expected = session.prefill([prompt]), masked.prefill([prompt])
        close(logits, expected)
        for _ in range(12):
            token = int(expected.argmax())
            assert int(logits.argmax()) == token
            logits, expected = session.decode([token]), masked.decode([token])
            close(logits, expected)
            for layer in range(model.config.layers):
                for head in range(model.config.kv_heads):
                    assert scored(session).positions(0, layer, head).tolist() == reference.held(layer, head)


@pytest.mark.parametrize("positions", ["absolute", "cache"])
@pytest.mark.parametrize("mode", ["prefill-then-evict", "stepwise"])
@pytest.mark.parametrize("name", POLICIES)
def test_dropped_keys_equal_masked_keys(name: str, mode: str, positions: str) -> None:
    kind, settings, choose = POLICIES[name]
    if kind is TOVA and positions == "cache":
        pytest.skip("TOVA keeps the positions of the text")
    settings = {**settings, "mode": mode, **({} if kind is TOVA else {"positions": positions})}
    reference = MaskedCache(CONFIG, choose, mode == "stepwise", positions == "cache")
    prompts = [random_tokens(50, seed=5), random_tokens(9, seed=6)]
    compare_with_masks(session_of(kind, settings, chunk=25), reference, prompts, MODEL)


def test_dropped_keys_equal_masked_keys_of_snapkv() -> None:
    """One prompt: SnapKV decides once, and what is generated stays."""
    session = session_of(SNAPKV, {}, chunk=25)
    reference = MaskedCache(CONFIG, votes(BUDGET, 16, 5), while_generating=False)
    compare_with_masks(session, reference, [random_tokens(60, seed=5)], MODEL)
    assert scored(session).physical_lengths == [BUDGET + 12]


def test_heads_choose_for_themselves() -> None:
    session = session_of(A2SF, {})
    session.prefill([random_tokens(60)])
    session.decode([1])
    assert scored(session).positions(0, 0, 0).tolist() != scored(session).positions(0, 0, 1).tolist()


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@every_kind
def test_the_pool_shrinks_at_the_end_of_the_prompt_and_then_stays(kind: Kind, settings: dict[str, Any]) -> None:
    session = session_of(kind, settings)
    cache = scored(session)
    session.prefill([random_tokens(100)])
    assert settings.get("mode") == "stepwise" or cache.physical_lengths == [100]
    session.decode([1])
    sizes = []
    for token in random_tokens(60):
        session.decode([token])
        sizes.append(cache.nbytes)
    one_layer = 2 * (BUDGET + 1) * CONFIG.kv_heads * CONFIG.head_dim * 4  # keys, values; float32
    if kind is not SNAPKV:
        assert cache.physical_lengths == [BUDGET] and cache.lengths == [161]
        assert set(sizes) == {CONFIG.layers * (one_layer + (BUDGET + 1) * CONFIG.kv_heads * 8)}  # a score, a position
    stored = [*cache.pools, cache.scores, cache.held]
    assert cache.nbytes == sum(tensor.untyped_storage().nbytes() for tensor in stored)


def test_generated_tokens_displace_the_prompt() -> None:
    """A newcomer that started from a score of nothing would be evicted at once, and the cache would never change."""
    session = session_of(A2SF, {})
    session.prefill([random_tokens(100)])
    for token in random_tokens(60, seed=1):
        session.decode([token])
    for head in range(CONFIG.kv_heads):
        held = scored(session).positions(0, 1, head)
        assert (held >= 100).sum() > BUDGET // 4


def test_layers_with_a_window_of_the_model_keep_that() -> None:
    model = MODELS["local-and-global"]
    session = session_of(A2SF, {}, model=model)
    session.prefill([random_tokens(100)])
    session.decode([1])
    assert len(session.cache.positions(0, 0)) == 101 and len(session.cache.positions(0, 1)) == BUDGET
    with pytest.raises(UsageError, match="each layer of this model keeps a window of 20 tokens already"):
        session_of(A2SF, {}, model=random_transformer(config_of(sliding_window=20)))


def test_a_share_of_the_prompt_is_each_rows_own() -> None:
    settings = A2sfConfig(budget=0, share=0.5)
    session = new_session(MODEL, 3, A2sfCache, settings)
    session.prefill([random_tokens(n) for n in (80, 60, 10)])
    for token in range(12):
        session.decode([token] * 3)
    cache = scored(session)
    assert cache.limits == [(40, 0), (30, 0), (16, 0)]  # never fewer than sixteen
    assert cache.slots.counts == [40, 30, 16]


# ── however it is fed ────────────────────────────────────────────────────────────────────────────────────────────────


@every_kind
def test_rows_of_a_batch_equal_single_runs(kind: Kind, settings: dict[str, Any]) -> None:
    prompts = [random_tokens(n, seed=n) for n in (70, 5, 33)]
    batch = session_of(kind, settings, batch=3, chunk=30)
    alone = [session_of(kind, settings, chunk=30) for _ in prompts]
    found = batch.prefill(prompts)
    expected = [single.prefill([prompt]) for single, prompt in zip(alone, prompts, strict=True)]
    close(found, torch.cat(expected))
    for turn in range(24):
        active = [True, turn % 3 != 0, turn < 9]
        tokens = random_tokens(3, seed=turn)
        found = batch.decode(tokens, active)
        for row, single in enumerate(alone):
            if active[row]:
                close(found[row : row + 1], single.decode(tokens[row : row + 1]))
    for row, single in enumerate(alone):
        assert scored(batch).positions(row, 1, 1).tolist() == scored(single).positions(0, 1, 1).tolist()
    more = [random_tokens(n, seed=n) for n in (3, 40, 17)]  # a second turn
    close(
        batch.prefill(more), torch.cat([single.prefill([prompt]) for single, prompt in zip(alone, more, strict=True)])
    )
    close(batch.decode([1, 2, 3]), torch.cat([single.decode([1 + row]) for row, single in enumerate(alone)]))


@every_kind
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_a_prompt_in_chunks_equals_the_whole_prompt(kind: Kind, settings: dict[str, Any], chunk: int) -> None:
    whole, parts = session_of(kind, settings), session_of(kind, settings, chunk=chunk)
    prompt = random_tokens(90)
    close(parts.prefill([prompt]), whole.prefill([prompt]))
    for token in random_tokens(30, seed=1):
        close(parts.decode([token]), whole.decode([token]))
    assert parts.cache.positions(0, 2).tolist() == whole.cache.positions(0, 2).tolist()


# ── positions ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_positions_in_the_cache_give_another_text_and_outgrow_the_context_stepwise() -> None:
    model = random_transformer(config_of(context_length=40))
    outputs = []
    for positions in ("absolute", "cache"):
        session = session_of(A2SF, {"positions": positions, "mode": "stepwise"}, 12, model)
        session.prefill([random_tokens(38)])
        outputs.append(session.decode([1]))
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3
    for token in random_tokens(60):
        assert session.decode([token]).isfinite().all()
    assert session.lengths == [99]
    whole = session_of(A2SF, {"positions": "cache"}, 12, model)
    with pytest.raises(UsageError, match=r"beyond the context of 40 tokens .*positions=cache,mode=stepwise"):
        whole.prefill([random_tokens(50)])


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("spec", ["a2sf", "h2o", "tova"])
def test_drafts_are_refused_where_every_token_evicts(spec: str) -> None:
    with pytest.raises(UsageError, match=f"cache={spec} can take back none: use decoding=plain"):
        Recipe(cache=spec, decoding="prompt-lookup")
    kind = {"a2sf": A2SF, "h2o": H2O, "tova": TOVA}[spec]
    session = session_of(kind, {})
    session.prefill([random_tokens(40)])
    with pytest.raises(FewerError, match=f"cache={spec} evicts after every token, so a step of 3 is too long"):
        session.verify([DraftTree([1, 2, 3], [-1, 0, 1])])
    session.decode([1])
    with pytest.raises(FewerError, match=f"cache={spec} cannot go back to 30 tokens"):
        session.rollback([30])
    assert session.lengths == [41]


@every_kind
def test_going_back_to_nothing_starts_anew(kind: Kind, settings: dict[str, Any]) -> None:
    session, fresh = session_of(kind, settings), session_of(kind, settings)
    session.prefill([random_tokens(60)])
    for token in random_tokens(20):
        session.decode([token])
    session.rollback([0])
    prompt = random_tokens(50, seed=9)
    close(session.prefill([prompt]), fresh.prefill([prompt]))
    for token in random_tokens(20, seed=8):
        close(session.decode([token]), fresh.decode([token]))


def test_a_step_that_failed_leaves_no_trace() -> None:
    session, fresh = session_of(A2SF, {}), session_of(A2SF, {})
    for each in (session, fresh):
        each.prefill([random_tokens(60)])
        each.decode([1])
    cache = session.cache
    step = Step(torch.tensor([[7]]), torch.tensor([[61]]), role="generated")
    MODEL.forward(step, cache)  # never committed
    for token in random_tokens(10):
        close(session.decode([token]), fresh.decode([token]))


def test_layers_that_are_skipped_are_refused() -> None:
    session = session_of(A2SF, {})
    plan = torch.ones(1, 3, CONFIG.layers, dtype=torch.bool)
    step = Step(torch.tensor([[1, 2, 3]]), torch.arange(3)[None], layer_plan=plan)
    with pytest.raises(FewerError, match="no token may skip a layer"):
        MODEL.forward(step, session.cache)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (A2SF, {"budget": 0}, "a2sf: budget=0 keeps nothing"),
        (A2SF, {"budget": -3}, "a2sf: budget=-3 is negative"),
        (A2SF, {"budget": 9, "share": 0.1}, "budget=9 and share=0.1 are two budgets"),
        (A2SF, {"budget": 0, "share": 1.5}, "share=1.5 is not a share of the prompt"),
        (A2SF, {"budget": 0, "share": 0.2, **STEPWISE}, "mode=stepwise does not know"),
        (A2SF, {"alpha": 1.5}, "alpha=1.5 is not a forgetting factor"),
        (A2SF, {"budget": 8, "recent": 9}, "recent=9 tokens do not fit a budget of 8"),
        (H2O, {"recent": 2}, "recent=2 is not a part of the budget"),
        (TOVA, {"budget": 0}, "tova: budget=0 keeps nothing"),
        (SNAPKV, {"budget": 32}, "budget=32 leaves nothing beside a window of 32"),
        (SNAPKV, {"window": 4}, "window=4 is too small: use 16 or more"),
        (SNAPKV, {"kernel": 4}, "kernel=4 has no middle"),
    ],
)
def test_settings_that_make_no_sense_are_refused(kind: Kind, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        kind[1](**settings)


def test_generation_stops_at_the_context_and_batches_generate_what_single_rows_do() -> None:
    prompts = [random_tokens(n, seed=n) for n in (50, 20)]
    texts = []
    for rows in ([prompts], [[prompts[0]], [prompts[1]]]):
        said: list[list[int]] = []
        for group in rows:
            session = session_of(H2O, {}, batch=len(group))
            words: list[list[int]] = [[] for _ in group]
            for event in generate(session, group, SamplingConfig(), max_tokens=30):
                words[event.row] += event.tokens
            said += words
        texts.append(said)
    assert texts[0] == texts[1]


# ── the fast path of the CPU ─────────────────────────────────────────────────────────────────────────────────────────

FAST = {name: KINDS[name] for name in ("a2sf", "a2sf-stepwise", "a2sf-all-queries", "h2o", "tova", "snapkv")}


@pytest.mark.parametrize(("kind", "settings"), FAST.values(), ids=FAST)
def test_the_fast_path_and_the_general_one_take_turns(kind: Kind, settings: dict[str, Any]) -> None:
    """A fast path hands out a token's attention when it is over, and puts the next key where the lowest one lay."""
    fast, general, mixed = (session_of(kind, settings) for _ in range(3))
    assert fast.runner.has_fast_path(fast.cache)
    single, general.runner.single = mixed.runner.single, None
    prompt = random_tokens(50)
    for session in (fast, general, mixed):
        session.prefill([prompt])
    for turn, token in enumerate(random_tokens(50, seed=1)):
        mixed.runner.single = single if turn // 4 % 2 else None
        expected = general.decode([token])
        close(fast.decode([token]), expected)
        close(mixed.decode([token]), expected)
        assert fast.cache.physical_lengths == general.cache.physical_lengths
    for layer in range(CONFIG.layers):
        for head in range(CONFIG.kv_heads):
            held = general.cache.positions(0, layer, head).tolist()
            assert fast.cache.positions(0, layer, head).tolist() == held
            assert mixed.cache.positions(0, layer, head).tolist() == held


def test_positions_in_the_cache_take_the_general_path() -> None:
    session = session_of(A2SF, {"positions": "cache"})
    assert not session.runner.has_fast_path(session.cache)
    assert session.runner.single is not None


def test_the_last_token_of_a_fast_path_can_be_taken_back_before_it_evicts() -> None:
    """What the runner does when logits are not finite."""
    session, expected = session_of(A2SF, {}), session_of(A2SF, {})
    for each in (session, expected):
        each.prefill([random_tokens(50)])
        for token in random_tokens(12, seed=1):
            each.decode([token])
    session.decode([7])
    session.cache.truncate(0, 62)
    assert session.lengths == [62] and session.cache.physical_lengths == [BUDGET]
    for token in random_tokens(10, seed=2):
        close(session.decode([token]), expected.decode([token]))
