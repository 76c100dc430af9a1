"""Selected keys: what every selecting cache owes, whatever it selects by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewer.cache import (
    FullCache,
    OracleTopkCache,
    OracleTopkConfig,
    QuestCache,
    QuestConfig,
    RandomTopkCache,
    RandomTopkConfig,
    TidalDecodeCache,
    TidalDecodeConfig,
)
from fewer.cache.selected import SelectedCache, SelectedLayer
from fewer.engine.runner import Runner
from fewer.engine.session import Session
from fewer.errors import UsageError
from fewer.model.config import ModelConfig
from fewer.slots import DraftTree
from fewer.weights.int4 import Int4Weights
from tests.random_model import CPU, config_of, new_session, random_tokens, random_transformer

CONFIG = config_of(layers=6, context_length=400)
Make = Callable[..., SelectedCache]
ALL: list[tuple[Make, Any]] = [
    (TidalDecodeCache, TidalDecodeConfig(budget=16, reselect="3")),
    (QuestCache, QuestConfig(budget=16, page_size=4)),
    (OracleTopkCache, OracleTopkConfig(budget=16)),
    (RandomTopkCache, RandomTopkConfig(budget=16)),
]
every_cache = pytest.mark.parametrize(("make", "settings"), ALL, ids=[make.__name__ for make, _ in ALL])


def decoded(session: Session, prompt: list[int], fed: list[int]) -> Tensor:
    """Logits after each fed token: [fed, V]."""
    session.prefill([prompt])
    return torch.cat([session.decode([token]) for token in fed])


@every_cache
@pytest.mark.parametrize("config", [CONFIG, config_of(layers=6, attention_bias=True, qk_norm="head", kv_heads=4)])
def test_a_budget_of_the_whole_text_equals_full_at_every_step(make: Make, settings: Any, config: ModelConfig) -> None:
    model, tokens = random_transformer(config), random_tokens(120)
    plain = decoded(new_session(model), tokens[:60], tokens[60:])
    selected = decoded(new_session(model, 1, make, replace(settings, budget=120)), tokens[:60], tokens[60:])
    torch.testing.assert_close(selected, plain, atol=1e-4, rtol=1e-4)
    assert torch.equal(selected.argmax(-1), plain.argmax(-1))


@every_cache
def test_reading_every_token_through_lists_equals_full(make: Make, settings: Any) -> None:
    """The rows are shorter than the budget, and a third one, longer than it, makes them select all the same."""
    model, tokens = random_transformer(CONFIG), random_tokens(140)
    prompts = [tokens[:20], tokens[:90], tokens[:33]]
    plain, selected = new_session(model, 3), new_session(model, 3, make, replace(settings, budget=60))
    for session in (plain, selected):
        session.prefill(prompts)
    for token in tokens[100:120]:
        expected, found = plain.decode([token] * 3), selected.decode([token] * 3)
        torch.testing.assert_close(found[[0, 2]], expected[[0, 2]], atol=1e-4, rtol=1e-4)


@every_cache
def test_a_small_budget_is_felt(make: Make, settings: Any) -> None:
    model, tokens = random_transformer(CONFIG), random_tokens(120)
    plain = decoded(new_session(model), tokens[:100], tokens[100:])
    selected = decoded(new_session(model, 1, make, settings), tokens[:100], tokens[100:])
    assert (selected - plain).abs().max() > 1e-3


@every_cache
def test_rows_of_unequal_lengths_equal_single_runs(make: Make, settings: Any) -> None:
    model, tokens = random_transformer(CONFIG), random_tokens(200)
    prompts, fed = [tokens[:71], tokens[:18], tokens[5:125]], tokens[130:142]
    batch = new_session(model, 3, make, settings)
    batch.prefill(prompts)
    together = torch.stack([batch.decode([token] * 3) for token in fed], 1)  # [3, fed, V]
    for row, prompt in enumerate(prompts):
        alone = decoded(new_session(model, 1, make, settings), prompt, fed)
        torch.testing.assert_close(together[row], alone, atol=1e-4, rtol=1e-4)


@every_cache
def test_a_row_that_rests_is_left_as_it_was(make: Make, settings: Any) -> None:
    model, tokens = random_transformer(CONFIG), random_tokens(90)
    batch = new_session(model, 2, make, settings)
    batch.prefill([tokens[:70], tokens[:40]])
    first = torch.cat([batch.decode([token, 0], [True, False])[:1] for token in tokens[70:80]])
    second = torch.cat([batch.decode([0, token], [False, True])[1:] for token in tokens[40:50]])
    for found, prompt, fed in ((first, tokens[:70], tokens[70:80]), (second, tokens[:40], tokens[40:50])):
        alone = decoded(new_session(model, 1, make, settings), prompt, fed)
        torch.testing.assert_close(found, alone, atol=1e-4, rtol=1e-4)


@every_cache
def test_chunked_prefill_equals_one_shot(make: Make, settings: Any) -> None:
    model, tokens = random_transformer(CONFIG), random_tokens(120)
    whole, parts = (new_session(model, 1, make, settings) for _ in range(2))
    expected = whole.prefill([tokens[:100]])
    for start in range(0, 100, 23):
        found = parts.prefill([tokens[start : min(start + 23, 100)]])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    for token in tokens[100:]:
        torch.testing.assert_close(parts.decode([token]), whole.decode([token]), atol=1e-4, rtol=1e-4)


@every_cache
def test_a_text_that_another_cache_has_read_may_be_adopted(make: Make, settings: Any) -> None:
    model, tokens = random_transformer(CONFIG), random_tokens(120)
    full, adopted = new_session(model, 2), new_session(model, 2, make, settings)
    full.prefill([tokens[:100], tokens[:61]])
    assert isinstance(full.cache, FullCache) and isinstance(adopted.cache, SelectedCache)
    adopted.cache.adopt(full.cache)
    own = new_session(model, 2, make, settings)
    own.prefill([tokens[:100], tokens[:61]])
    for token in tokens[100:110]:
        torch.testing.assert_close(adopted.decode([token] * 2), own.decode([token] * 2), atol=1e-4, rtol=1e-4)


@every_cache
def test_prompts_are_read_with_full_attention(make: Make, settings: Any) -> None:
    model, tokens = random_transformer(CONFIG), random_tokens(100)
    plain, selected = new_session(model), new_session(model, 1, make, settings)
    torch.testing.assert_close(selected.prefill([tokens]), plain.prefill([tokens]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(selected.prefill([[7]]), plain.prefill([[7]]), atol=1e-4, rtol=1e-4)


@every_cache
def test_a_verified_chain_equals_one_token_after_the_other(make: Make, settings: Any) -> None:
    model, tokens = random_transformer(CONFIG), random_tokens(120)
    one, chain = (new_session(model, 1, make, settings) for _ in range(2))
    expected = decoded(one, tokens[:90], tokens[90:112])
    chain.prefill([tokens[:90]])
    found = []
    for start in range(90, 112, 11):  # pages of 4 begin and end inside
        (logits,) = chain.verify([DraftTree(tokens[start : start + 11], list(range(-1, 10)))])
        assert logits is not None
        found.append(logits)
        chain.commit([list(range(11))])
    torch.testing.assert_close(torch.cat(found), expected, atol=1e-4, rtol=1e-4)


@every_cache
def test_rejected_drafts_leave_no_trace(make: Make, settings: Any) -> None:
    model, tokens = random_transformer(CONFIG), random_tokens(120)
    plain, drafted = (new_session(model, 1, make, settings) for _ in range(2))
    expected = decoded(plain, tokens[:90], tokens[90:110])
    drafted.prefill([tokens[:90]])
    for token, logits in zip(tokens[90:110], expected, strict=True):
        (found,) = drafted.verify([DraftTree([token, 3, 9, 11, 2, 5], [-1, 0, 1, 2, 3, 4])])
        drafted.commit([[0]])
        assert found is not None
        torch.testing.assert_close(found[0], logits, atol=1e-4, rtol=1e-4)


@every_cache
def test_after_a_rollback_the_text_goes_on_as_if_nothing_had_been_there(make: Make, settings: Any) -> None:
    model, tokens = random_transformer(CONFIG), random_tokens(120)
    session = new_session(model, 1, make, settings)
    expected = decoded(session, tokens[:90], tokens[90:110])
    session.rollback([90])
    for token in random_tokens(10, seed=5):
        session.decode([token])
    session.rollback([90])
    found = torch.cat([session.decode([token]) for token in tokens[90:110]])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("make", "settings"), [pair for pair in ALL if pair[0] in (TidalDecodeCache, OracleTopkCache)])
def test_a_branch_of_a_tree_equals_the_same_text_in_a_row(make: Make, settings: Any) -> None:
    model, tokens = random_transformer(CONFIG), random_tokens(120)
    plain, tree = (new_session(model, 1, make, settings) for _ in range(2))
    expected = decoded(plain, tokens[:90], tokens[90:96])
    tree.prefill([tokens[:90]])
    nodes = [tokens[90], 7, 8, tokens[91], tokens[92], 9]
    (found,) = tree.verify([DraftTree(nodes, [-1, 0, 1, 0, 3, 4])])
    assert found is not None
    torch.testing.assert_close(found[[0, 3, 4]], expected[:3], atol=1e-4, rtol=1e-4)
    tree.commit([[0, 3, 4]])
    after = torch.cat([tree.decode([token]) for token in tokens[93:96]])
    torch.testing.assert_close(after, expected[3:], atol=1e-4, rtol=1e-4)


@every_cache
def test_layers_with_a_window_of_their_own_stay_as_they_are(make: Make, settings: Any) -> None:
    sliding = (True, True, False, False, True, False)
    config = config_of(layers=6, sliding_window=20, sliding_layers=sliding, context_length=400)
    model, tokens = random_transformer(config), random_tokens(160)
    cache = make(config, 1, 8, torch.float32, CPU, settings)
    assert not any(
        isinstance(layer, SelectedLayer) for layer, local in zip(cache.layers, sliding, strict=True) if local
    )
    plain = decoded(new_session(model), tokens[:140], tokens[140:])
    selected = decoded(new_session(model, 1, make, replace(settings, budget=160)), tokens[:140], tokens[140:])
    torch.testing.assert_close(selected, plain, atol=1e-4, rtol=1e-4)
    small = decoded(new_session(model, 1, make, settings), tokens[:140], tokens[140:])
    assert small.isfinite().all() and (small - plain).abs().max() > 1e-3


@every_cache
def test_a_model_of_windows_alone_is_refused(make: Make, settings: Any) -> None:
    with pytest.raises(UsageError, match="nothing to select from: every layer of this model sees only its last 20"):
        make(config_of(layers=6, sliding_window=20), 1, 8, torch.float32, CPU, settings)


@every_cache
def test_four_bit_weights_and_soft_capped_scores_work(make: Make, settings: Any) -> None:
    config = config_of(
        layers=6, hidden_size=64, intermediate_size=128, head_dim=16, attention_softcap=20.0, vocab_size=64
    )
    model = random_transformer(config, quantize=Int4Weights(torch.float32).quantize)
    tokens = random_tokens(120, vocab_size=64)
    runner = Runner(model)
    runner.single = None  # the fast path does not round its inputs as the product of many rows does
    plain = decoded(new_session(model, runner=runner), tokens[:60], tokens[60:])
    selected = decoded(new_session(model, 1, make, replace(settings, budget=116)), tokens[:60], tokens[60:])
    torch.testing.assert_close(selected[:56], plain[:56], atol=1e-3, rtol=1e-3)
    assert selected.isfinite().all()


@every_cache
def test_one_set_for_a_key_head_equals_its_own_where_heads_are_not_grouped(make: Make, settings: Any) -> None:
    if isinstance(settings, RandomTopkConfig):
        return  # it has no such setting
    model, tokens = random_transformer(config_of(layers=6, kv_heads=4)), random_tokens(110)
    single = decoded(new_session(model, 1, make, settings), tokens[:90], tokens[90:])
    shared = decoded(new_session(model, 1, make, replace(settings, sets="key-head")), tokens[:90], tokens[90:])
    torch.testing.assert_close(shared, single, atol=1e-4, rtol=1e-4)


def test_an_oracle_attends_to_its_best_tokens_as_a_mask_would_let_it() -> None:
    """A sparse layer with a set equals full attention with -inf outside of the set."""
    model, tokens = random_transformer(CONFIG), random_tokens(80)
    session = new_session(model, 1, OracleTopkCache, OracleTopkConfig(budget=12, start=0))
    cache = session.cache
    assert isinstance(cache, OracleTopkCache)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    layer = cache.layers[0]
    assert isinstance(layer, SelectedLayer)
    gather = layer.gather

    def spy(q: Tensor, slots: Tensor, *rest: Any) -> Tensor:
        out = gather(q, slots, *rest)
        seen.append((q.clone(), slots.clone(), out.clone()))
        return out

    layer.gather = spy  # type: ignore[method-assign, assignment]
    decoded(session, tokens[:70], tokens[70:71])
    (q, slots, out), length = seen[0], 71
    keys, values = (part[0, :, :length].repeat_interleave(2, 0) for part in (layer.keys, layer.values))
    scores = (q[0] @ keys.transpose(1, 2))[:, 0] * CONFIG.scale  # [H, S]
    allowed = torch.zeros_like(scores, dtype=torch.bool).scatter(1, slots[0].long(), True)
    assert allowed.sum(-1).tolist() == [12] * 4 and allowed[:, -1].all()
    others = scores[:, :-1].topk(11).indices
    assert allowed.gather(1, others).all()
    expected = scores.masked_fill(~allowed, -torch.inf).softmax(-1)[:, None] @ values
    torch.testing.assert_close(out[0], expected, atol=1e-5, rtol=1e-5)


def test_memory_is_that_of_full_and_quest_adds_its_bounds() -> None:
    full = FullCache(CONFIG, 1, 64, torch.float32, CPU)
    for make, settings in ALL:
        cache = make(CONFIG, 1, 64, torch.float32, CPU, settings)
        extra = 4 * 2 * (64 // 4) * 2 * 8 * 4 if make is QuestCache else 0  # 4 layers, 2 bounds, 16 pages, Hk, D, bytes
        assert cache.nbytes == full.nbytes + extra
