"""LServe attends to what the paper says, stores no more than that, and refuses what it cannot do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewer.cache.duo_attention import DuoAttentionCache, DuoAttentionConfig
from fewer.cache.full import FullCache
from fewer.cache.head_gates import retrieval_heads
from fewer.cache.lserve import LServeCache, LServeConfig
from fewer.cache.page_statistics import PageStatistics
from fewer.cache.quantised_pages import RowLayout
from fewer.cache.quest import QuestCache, QuestConfig
from fewer.decoding.generate import generate
from fewer.decoding.sampling import SamplingConfig
from fewer.engine.session import Session
from fewer.errors import CheckpointError, FewerError, NumericalError, UsageError
from fewer.language_model import load
from fewer.model.config import ModelConfig
from fewer.model.transformer import Transformer
from fewer.recipe import Recipe
from fewer.slots import DraftTree
from fewer.training import adapter_store
from fewer.training.adapters import Adapter, Provenance, save_adapter
from fewer.weights.int4 import Int4Weights
from tests.cache.lserve_reference import LServeReference
from tests.random_model import CONFIG, CPU, config_of, new_session, random_tokens, random_transformer
from tests.tiny_model import write_model

GEMMA = config_of(sliding_window=20, sliding_layers=(True, False, True), attention_softcap=8.0, local_rope_theta=500.0)
CONFIGS = {
    "gqa": CONFIG,
    "biases-and-norms": config_of(attention_bias=True, qk_norm="head"),
    "mqa-nope": config_of(kv_heads=1, rope_layers=(True, False, True)),
    "mha": config_of(kv_heads=4),
    "windows": config_of(sliding_window=20),
    "local-and-global": GEMMA,
}
MODELS = {name: random_transformer(config) for name, config in CONFIGS.items()}
every_model = pytest.mark.parametrize("name", MODELS)
SMALL = LServeConfig(
    sparsity=0.5, sinks=4, window=8, prefill_window=20, page_size=16, logical_size=4, budget=48, interval=4
)


def gates_for(config: ModelConfig, seed: int = 1) -> Adapter:
    gates = torch.rand(config.layers, config.kv_heads, generator=torch.Generator().manual_seed(seed))
    return Adapter({"gates": gates}, Provenance("duo-attention", {}, "model", "data", 0))


def lserve(model: Transformer, settings: LServeConfig, batch: int = 1, chunk: int = 512) -> Session:
    def make(config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> LServeCache:
        return LServeCache(config, batch, capacity, dtype, device, settings, adapter=gates_for(config))

    return cut_into(chunk, new_session(model, batch, make))


def reference(model: Transformer, settings: LServeConfig) -> Session:
    retrieval = retrieval_heads(gates_for(model.config).tensors["gates"], settings.sparsity, model.config)
    return new_session(model, 1, lambda config, *_: LServeReference(config, settings, retrieval))


def full(model: Transformer, batch: int = 1, chunk: int = 512) -> Session:
    return cut_into(chunk, new_session(model, batch, FullCache))


def cut_into(chunk: int, session: Session) -> Session:
    session.runner.chunk = chunk
    return session


def close(ours: Tensor, theirs: Tensor, bits: int = 16) -> None:
    """Equal but for rounding. A number halfway between two codes may get either: with fewer bits, that shows."""
    torch.testing.assert_close(ours, theirs, atol={16: 1e-4, 8: 0.01, 4: 0.1}[bits], rtol=1e-4)


def cache_of(session: Session) -> LServeCache:
    assert isinstance(session.cache, LServeCache)
    return session.cache


# ── nothing is left out ──────────────────────────────────────────────────────────────────────────────────────────────


@every_model
@pytest.mark.parametrize("chunk", [7, 512])
def test_no_streaming_heads_and_a_budget_for_everything_equal_full(name: str, chunk: int) -> None:
    settings = LServeConfig(sparsity=0)
    ours, theirs = lserve(MODELS[name], settings, 3, chunk), full(MODELS[name], 3, chunk)
    prompts = [random_tokens(n, seed=n) for n in (70, 3, 33)]
    close(ours.prefill(prompts), theirs.prefill(prompts))
    for step in range(20):
        tokens, active = random_tokens(3, seed=step), [step % 3 != 0, True, step < 9]
        on = [row for row, flag in enumerate(active) if flag]
        close(ours.decode(tokens, active)[on], theirs.decode(tokens, active)[on])
    assert ours.lengths == theirs.lengths
    close(ours.prefill(prompts[::-1]), theirs.prefill(prompts[::-1]))  # a second turn


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 1.0])
def test_texts_within_sinks_and_window_equal_full_at_any_sparsity(sparsity: float) -> None:
    ours, theirs = lserve(MODELS["gqa"], LServeConfig(sparsity=sparsity, sinks=8, window=40), 2), full(MODELS["gqa"], 2)
    prompts = [random_tokens(30, seed=1), random_tokens(11, seed=2)]
    close(ours.prefill(prompts), theirs.prefill(prompts))
    for step in range(18):
        tokens = random_tokens(2, seed=step)
        close(ours.decode(tokens), theirs.decode(tokens))


def test_the_greedy_text_is_that_of_full_with_four_bit_weights_too() -> None:
    model = random_transformer(CONFIG, quantize=Int4Weights(torch.float32).quantize)
    prompts = [random_tokens(n, seed=n) for n in (40, 9)]
    texts = []
    for session in (lserve(model, LServeConfig(sparsity=0), 2), full(model, 2)):
        rows: list[list[int]] = [[], []]
        for event in generate(session, prompts, SamplingConfig(), None, max_tokens=60):
            rows[event.row] += event.tokens
        texts.append(rows)
    assert texts[0] == texts[1]


# ── what is left out is what the paper says ──────────────────────────────────────────────────────────────────────────


@every_model
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_prefill_and_decoding_attend_to_what_the_paper_names(name: str, bits: Any) -> None:
    """Static and dynamic sparsity and rounded keys, against one query at a time in float64."""
    settings = replace(SMALL, bits=bits)
    ours, theirs = lserve(MODELS[name], settings, chunk=13), reference(MODELS[name], settings)
    prompt = random_tokens(70)
    close(ours.prefill([prompt]), theirs.prefill([prompt]), bits)
    for step in range(24):
        tokens = random_tokens(1, seed=step)
        close(ours.decode(tokens), theirs.decode(tokens), bits)
    second = random_tokens(9, seed=3)
    close(ours.prefill([second]), theirs.prefill([second]), bits)
    close(ours.decode([5]), theirs.decode([5]), bits)


@pytest.mark.parametrize(
    "changes", [{"interval": 1}, {"interval": 16}, {"logical_size": 16}, {"page_size": 32, "budget": 96}]
)
def test_any_reuse_and_any_page_sizes_follow_the_rule(changes: dict[str, int]) -> None:
    settings = replace(SMALL, sparsity=0.0, **changes)  # type: ignore[arg-type]
    ours, theirs = lserve(MODELS["gqa"], settings), reference(MODELS["gqa"], settings)
    prompt = random_tokens(settings.budget - 10)  # the budget is passed while decoding
    close(ours.prefill([prompt]), theirs.prefill([prompt]))
    for step in range(60):
        tokens = random_tokens(1, seed=step)
        close(ours.decode(tokens), theirs.decode(tokens))


def test_static_sparsity_alone_is_the_window_of_each_head_however_the_prompt_is_cut() -> None:
    """DuoAttention's rule in both phases: budget and prefill window leave nothing else to do."""
    settings = replace(SMALL, budget=512, prefill_window=8)
    ours = [lserve(MODELS["gqa"], settings, chunk=chunk) for chunk in (5, 16, 512)]
    theirs = reference(MODELS["gqa"], settings)
    prompt = random_tokens(90)
    expected = theirs.prefill([prompt])
    for session in ours:
        close(session.prefill([prompt]), expected)
    for step in range(12):
        tokens = random_tokens(1, seed=step)
        expected = theirs.decode(tokens)
        for session in ours:
            close(session.decode(tokens), expected)


def test_static_sparsity_alone_is_duo_attention_with_exact_windows() -> None:
    ours = lserve(MODELS["gqa"], replace(SMALL, budget=512, prefill_window=8), 2, chunk=16)
    settings = DuoAttentionConfig(sparsity=0.5, sinks=4, window=8, prefill="exact")

    def make(config: ModelConfig, *arguments: Any) -> DuoAttentionCache:
        return DuoAttentionCache(*(config, *arguments, settings), adapter=gates_for(config))

    theirs = cut_into(16, new_session(MODELS["gqa"], 2, make))
    prompts = [random_tokens(60, seed=1), random_tokens(21, seed=2)]
    close(ours.prefill(prompts), theirs.prefill(prompts))
    for step in range(20):
        tokens = random_tokens(2, seed=step)
        close(ours.decode(tokens), theirs.decode(tokens))


@pytest.mark.parametrize("sets", ["query-head", "key-head"])
@pytest.mark.parametrize("bits", [16, 4])
def test_ragged_batches_equal_single_runs(sets: Any, bits: Any) -> None:
    """Every row by its own length: within the budget, beyond it, and passing it; with rows that rest."""
    settings = replace(SMALL, sets=sets, bits=bits)
    prompts = [random_tokens(n, seed=n) for n in (90, 5, 45)]
    batch = lserve(MODELS["gqa"], settings, 3, chunk=16)
    alone = [lserve(MODELS["gqa"], settings, chunk=16) for _ in prompts]
    close(
        batch.prefill(prompts), torch.cat([one.prefill([prompt]) for one, prompt in zip(alone, prompts, strict=True)])
    )
    for step in range(20):
        tokens, active = random_tokens(3, seed=step), [step % 4 != 1, step < 15, True]
        found = batch.decode(tokens, active)
        for row, one in enumerate(alone):
            if active[row]:
                close(found[row], one.decode(tokens[row : row + 1])[0], bits)
    assert batch.lengths == [one.lengths[0] for one in alone]


def test_a_list_for_a_key_head_holds_what_its_query_heads_agree_on() -> None:
    """MHA has one query head a key head, so both are one; with groups, each head reads what its group chose."""
    texts = []
    for sets in ("query-head", "key-head"):
        session = lserve(MODELS["mha"], replace(SMALL, sets=sets))
        session.prefill([random_tokens(90)])
        texts.append(torch.cat([session.decode([token]) for token in random_tokens(8)]))
    assert torch.equal(*texts)
    session = lserve(MODELS["gqa"], replace(SMALL, sparsity=0.0, sets="key-head"))
    session.prefill([random_tokens(90)])
    session.decode([1])
    lists = cache_of(session).pages.lists[0]
    assert lists is not None and lists.shape[1] == CONFIG.kv_heads


# ── the choice of pages ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_choice_serves_its_interval_and_always_holds_the_newest_page() -> None:
    session = lserve(MODELS["gqa"], replace(SMALL, sparsity=0.0))
    session.prefill([random_tokens(62)])
    chosen = []
    for step in range(40):
        session.decode([step])
        lists = cache_of(session).pages.lists[0]
        assert lists is not None
        count = session.lengths[0]
        assert (lists[..., -1] == (count - 1) // 16).all()
        assert all(len(set(head.tolist()) - {-1}) == 3 for head in lists[0])
        chosen.append((count - 1, lists.clone()))
    changed = [
        at for (_, before), (at, after) in zip(chosen[:-1], chosen[1:], strict=True) if not torch.equal(before, after)
    ]
    assert changed and all(at % 4 == 0 for at in changed)


@pytest.mark.parametrize("sets", ["query-head", "key-head"])
def test_one_page_size_chosen_every_step_is_quest(sets: Any) -> None:
    settings = replace(SMALL, sparsity=0.0, logical_size=16, interval=1, sets=sets)
    ours = lserve(MODELS["gqa"], settings)
    theirs = new_session(MODELS["gqa"], 1, QuestCache, QuestConfig(settings.budget, 16, start=0, sets=sets))
    prompt = random_tokens(90)
    close(ours.prefill([prompt]), theirs.prefill([prompt]))
    for step in range(30):
        tokens = random_tokens(1, seed=step)
        close(ours.decode(tokens), theirs.decode(tokens))


def test_a_prompt_in_between_makes_a_new_choice() -> None:
    settings = replace(SMALL, sparsity=0.0, interval=16)
    ours, theirs = lserve(MODELS["gqa"], settings), reference(MODELS["gqa"], settings)
    for session in (ours, theirs):
        session.prefill([random_tokens(65)])
        session.decode([1])
        session.prefill([random_tokens(3, seed=1)])
    close(ours.decode([2]), theirs.decode([2]))
    assert theirs.cache.layers[0].choices == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("chunk", [3, 512])
def test_bounds_are_those_of_the_keys_before_rounding_in_any_cut(chunk: int, bits: Any) -> None:
    """Prefill in chunks and decoded tokens give the bounds of all keys at once."""
    exact, ours = (
        lserve(MODELS["gqa"], replace(SMALL, sparsity=0.0, bits=b, budget=200), chunk=chunk) for b in (16, bits)
    )
    for session in (exact, ours):
        session.prefill([random_tokens(37)])
        for token in random_tokens(9, seed=1):
            session.decode([token])
    found, pool = cache_of(ours).pages, cache_of(exact).pages.pool
    length, table = 46, torch.tensor(pool.rows[0])
    slots = torch.arange(length)
    keys = pool.storage[0, 0][table[slots // 16], :, slots % 16]  # [S, heads, D] of all layers side by side
    whole = PageStatistics(1, pool.pages, keys.shape[1], CONFIG.head_dim, 16, 4, torch.float32, CPU)
    whole.add(0, keys, whole.place(table[slots // 16], slots % 16))
    first = found.statistics[0].bounds[0]  # the first layer: later ones have seen rounded keys
    for page in range(3):
        parts = 4 if page < 2 else -(-(length % 16) // 4)
        assert torch.equal(
            first[found.pool.rows[0][page], :, :parts], whole.bounds[0, table[page], : CONFIG.kv_heads, :parts]
        )


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_streaming_heads_store_sinks_and_window_and_the_others_whole_pages(bits: Any) -> None:
    settings = replace(SMALL, bits=bits)
    session = lserve(MODELS["gqa"], settings)
    session.prefill([random_tokens(150)])
    session.decode([1])
    cache = cache_of(session)
    row = {16: 4 * 8, 8: 8 + 4, 4: 4 + 4}[bits]  # bytes of one head's key: float32 or codes and their scale
    streaming = sum(layer.span.stop - layer.span.start for layer in cache.layers)
    assert streaming == 3 and cache.ring.nbytes == 2 * streaming * (4 + 8) * row
    pages, retrieval = cache.pages.pool.pages, 6 - streaming
    assert cache.pages.pool.storage.nbytes == 2 * pages * retrieval * 16 * row
    bounds = sum(of_layer.nbytes for of_layer in cache.pages.statistics)
    assert bounds == pages * retrieval * 4 * 2 * 4 * 8  # 4 logical pages of 2 keys in float32
    lists = sum(chosen.nbytes for chosen in cache.pages.lists if chosen is not None)
    assert cache.nbytes == cache.ring.nbytes + cache.pages.pool.nbytes + bounds + lists
    assert cache.physical_lengths == [151]


def test_memory_of_streaming_heads_stays_flat_and_the_prefill_window_is_freed() -> None:
    session = lserve(MODELS["gqa"], replace(SMALL, sparsity=1.0, prefill_window=64), chunk=16)
    session.prefill([random_tokens(200)])
    cache = cache_of(session)
    assert cache.ring.slots == 4 + 64
    session.decode([1])
    assert cache.ring.slots == 4 + 8
    before = cache.nbytes
    for token in random_tokens(40):
        session.decode([token])
    assert cache.nbytes == before and cache.physical_lengths == [12]
    assert cache.positions(0, 1).tolist() == [*range(4), *range(233, 241)]


def test_layers_with_a_window_of_the_models_own_store_that_window() -> None:
    session = lserve(MODELS["windows"], SMALL)
    session.prefill([random_tokens(150)])
    session.decode([1])
    cache = cache_of(session)
    assert cache.rings[1].slots == 20 and cache.pages.pool.storage.numel() == cache.ring.storage.numel() == 0


# ── going back ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("length", [0, 50, 37])
def test_a_row_that_goes_back_is_as_if_it_had_never_gone_on(length: int) -> None:
    settings = replace(SMALL, sparsity=0.0)
    ours, theirs = lserve(MODELS["gqa"], settings), lserve(MODELS["gqa"], settings)
    prompt = random_tokens(80)
    ours.prefill([prompt])
    for token in random_tokens(9, seed=1):
        ours.decode([token])
    ours.rollback([length])
    if length:
        theirs.prefill([prompt[:length]])
    rest = random_tokens(30, seed=2)
    close(ours.prefill([rest]), theirs.prefill([rest]))
    for token in random_tokens(9, seed=3):
        close(ours.decode([token]), theirs.decode([token]))


def test_a_window_that_has_moved_on_is_not_taken_back() -> None:
    session = lserve(MODELS["gqa"], SMALL)
    session.prefill([random_tokens(80)])
    session.decode([1])
    with pytest.raises(FewerError, match="cannot go back to 70 of 81 tokens: streaming heads have dropped"):
        session.rollback([70])
    assert session.lengths == [81]
    session.rollback([0])
    fresh = lserve(MODELS["gqa"], replace(SMALL, prefill_window=8))  # decoding has begun: its window holds
    close(session.prefill([random_tokens(30)]), fresh.prefill([random_tokens(30)]))


@pytest.mark.parametrize("bits", [16, 8])
def test_a_failed_pass_leaves_no_trace(bits: Any) -> None:
    model = random_transformer(CONFIG)
    ours, theirs = (lserve(model, replace(SMALL, bits=bits), chunk=24) for _ in range(2))
    for session in (ours, theirs):
        session.prefill([random_tokens(61)])
        session.decode([1])
    norm = model.norm.clone()
    model.norm.fill_(torch.nan)
    with pytest.raises(NumericalError):
        ours.prefill([random_tokens(20, seed=5)])
    model.norm.copy_(norm)
    assert ours.lengths == [62]
    for token in random_tokens(9, seed=3):
        found, expected = ours.decode([token]), theirs.decode([token])
        if bits == 16:
            close(found, expected)  # with fewer bits the last bounds are those of rounded keys: a page may differ
        assert found.isfinite().all()


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sparsity": 1.5}, "lserve: sparsity=1.5 is out of range"),
        ({"sinks": -1}, "sinks=-1 is negative"),
        ({"window": 0}, "window=0 keeps nothing"),
        ({"prefill_window": 100}, "prefill_window=100 is smaller than window=256: use 256 or more"),
        ({"page_size": 48}, "page_size=48 is not allowed: use 16, 32, 64 or 128"),
        ({"logical_size": 24}, "logical_size=24 does not divide page_size=64"),
        ({"interval": 3}, "interval=3 does not divide page_size=64"),
        ({"budget": 128}, "budget=128 is less than 3 pages of 64 tokens: use 192 or more, or smaller pages"),
    ],
)
def test_settings_that_cannot_work_are_told_in_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        LServeConfig(**changes)


def test_without_gates_only_no_sparsity_works() -> None:
    with pytest.raises(UsageError, match=r"sparsity=0.5 needs the gates of duo-attention.*or use sparsity=0"):
        LServeCache(CONFIG, 1, 8, torch.float32, CPU)
    LServeCache(CONFIG, 1, 8, torch.float32, CPU, LServeConfig(sparsity=0))


def test_a_recipe_takes_the_gates_of_duo_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWER_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(adapter_store, "SHIPPED", tmp_path / "shipped")
    folder = write_model(tmp_path / "tiny")
    told = "cache=lserve takes what duo-attention learns, which has not been fitted.*run `fewer train duo-attention`"
    with pytest.raises(CheckpointError, match=told):
        load(folder, cache="lserve")
    model = load(folder, cache="lserve:sparsity=0")
    assert not cache_of(model.session()).ring.storage.numel()
    gates = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    path = adapter_store.own_path("duo-attention", str(folder), model.checkpoint.fingerprint())
    save_adapter(
        path, Adapter({"gates": gates}, Provenance("duo-attention", {}, model.checkpoint.fingerprint(), "d", 0))
    )
    cache = cache_of(load(folder, cache="lserve:window=16,sinks=4").session())
    streaming = [layer.parts[1] for layer in cache.layers]
    assert [heads.tolist() for part in streaming if part for heads in part[1:]] == [[0], [1]]


def test_drafts_are_refused() -> None:
    session = lserve(MODELS["gqa"], SMALL)
    session.prefill([random_tokens(30)])
    with pytest.raises(UsageError, match="one generated token a row at a time"):
        session.verify([DraftTree([5, 6], [-1, 0])])
    assert session.lengths == [30]
    with pytest.raises(UsageError, match="cache=lserve can take back none: use decoding=plain or cache=full"):
        Recipe(cache="lserve", decoding="prompt-lookup")


def test_rows_are_packed_for_every_head_size_that_models_have() -> None:
    for head_dim in (64, 80, 96, 128, 256):
        assert RowLayout(head_dim, 4, torch.bfloat16).width == head_dim // 2 + 4
