"""TidalDecode: which layers read what, what is handed on between them, and keys computed again."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewer.cache import FullCache, OracleTopkCache, OracleTopkConfig, TidalDecodeCache, TidalDecodeConfig
from fewer.cache.selected import SelectedLayer
from fewer.cache.stored import StoredCache
from fewer.cache.tidal_calibration import TidalFitConfig, recall, recall_with
from fewer.cache.tidal_decode import TidalSelectLayer, TidalSparseLayer
from fewer.engine.session import Session
from fewer.errors import UsageError
from fewer.model.step import Step
from fewer.registry import parse_spec
from fewer.slots import DraftTree
from fewer.training.adapters import Adapter, Provenance
from tests.random_model import CPU, config_of, new_session, random_tokens, random_transformer

CONFIG = config_of(layers=8, context_length=400)


def settings_of(**changes: Any) -> TidalDecodeConfig:
    return TidalDecodeConfig(**{"budget": 16, "reselect": "4", **changes})


def tidal_session(batch: int = 1, **changes: Any) -> Session:
    return new_session(random_transformer(CONFIG), batch, TidalDecodeCache, settings_of(**changes))


def keys_and_values(session: Session, start: int, stop: int) -> Tensor:
    """[L, 2, B, Hk, T, D] of positions start..stop-1."""
    cache = session.cache
    assert isinstance(cache, StoredCache)
    return cache.pools[0][..., start:stop, :].clone()


def spied(session: Session) -> dict[int, Tensor]:
    """Layer -> the slots that it gathered last."""
    gathered: dict[int, Tensor] = {}
    for layer in session.cache.layers:
        if isinstance(layer, SelectedLayer):

            def spy(q: Tensor, slots: Tensor, *rest: Any, of: SelectedLayer = layer, gather: Any = layer.gather) -> Any:
                gathered[of.index] = slots
                return gather(q, slots, *rest)

            layer.gather = spy  # type: ignore[method-assign, assignment]
    return gathered


# ── the layers' roles ────────────────────────────────────────────────────────────────────────────────────────────────


def test_layers_before_the_start_are_dense_two_select_and_the_others_are_sparse() -> None:
    layers = tidal_session().cache.layers
    assert [isinstance(layer, SelectedLayer) for layer in layers] == [False] * 2 + [True] * 6
    assert [at for at, layer in enumerate(layers) if isinstance(layer, TidalSelectLayer)] == [2, 4]
    assert [at for at, layer in enumerate(layers) if isinstance(layer, TidalSparseLayer)] == [3, 5, 6, 7]


def test_sparse_layers_read_the_set_of_the_last_layer_that_selected() -> None:
    session = tidal_session()
    session.prefill([random_tokens(60)])
    gathered = spied(session)
    session.decode([5])
    assert sorted(gathered) == [3, 5, 6, 7]
    assert torch.equal(gathered[5], gathered[6]) and torch.equal(gathered[6], gathered[7])
    assert not torch.equal(gathered[3].sort().values, gathered[5].sort().values)
    assert gathered[3].shape == (1, CONFIG.heads, 16)
    for slots in gathered.values():
        assert (slots == 60).any(-1).all()  # the newest token is in every set
        assert all(len(set(of_head.tolist())) == 16 for of_head in slots[0])


def test_the_first_selecting_layer_chooses_what_the_oracle_chooses_there() -> None:
    """Layers 0 to 2 are dense, so both see the same query."""
    model, tokens = random_transformer(CONFIG), random_tokens(60)
    tidal = new_session(model, 1, TidalDecodeCache, settings_of())
    oracle = new_session(model, 1, OracleTopkCache, OracleTopkConfig(budget=16, start=2))
    for session in (tidal, oracle):
        session.prefill([tokens])
    by_tidal, by_oracle = spied(tidal), spied(oracle)
    tidal.decode([5]), oracle.decode([5])
    assert torch.equal(by_tidal[3].sort().values, by_oracle[2].sort().values)


@pytest.mark.parametrize("changes", [{"reselect": "every"}, {"reselect": "none", "start": 8}])
def test_selecting_everywhere_or_nowhere_equals_full(changes: dict[str, Any]) -> None:
    model, tokens = random_transformer(CONFIG), random_tokens(100)
    plain, tidal = new_session(model), new_session(model, 1, TidalDecodeCache, settings_of(**changes))
    for session in (plain, tidal):
        session.prefill([tokens[:80]])
    for token in tokens[80:]:
        torch.testing.assert_close(tidal.decode([token]), plain.decode([token]), atol=1e-4, rtol=1e-4)


def test_a_step_that_skips_the_selecting_layer_reads_everything_behind_it() -> None:
    model, tokens = random_transformer(CONFIG), random_tokens(60)
    plan = torch.ones(1, 1, 8, dtype=torch.bool)
    plan[..., 2] = False
    found = []
    for make, settings in ((FullCache, ()), (TidalDecodeCache, (settings_of(reselect="none"),))):
        session = new_session(model, 1, make, *settings)
        session.prefill([tokens])
        session.cache.reserve(61)
        step = Step(torch.tensor([[5]]), torch.tensor([[60]]), role="generated", layer_plan=plan)
        logits = session.runner.step(step, session.cache).logits
        session.cache.commit([1])
        assert logits is not None
        found.append(logits)
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)


def test_an_interleaved_model_selects_among_its_global_layers() -> None:
    sliding = (True, True, True, False, True, False, False, False)
    config = config_of(layers=8, sliding_window=20, sliding_layers=sliding)
    cache = TidalDecodeCache(config, 1, 8, torch.float32, CPU, settings_of(reselect="6"))
    assert cache.selecting == [3, 6]
    assert [isinstance(layer, SelectedLayer) for layer in cache.layers] == [not local for local in sliding]


# ── keys computed again ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("draft", [1, 3])
def test_corrected_keys_are_those_of_a_dense_prefill_and_differed_before(draft: int) -> None:
    model, tokens = random_transformer(CONFIG), random_tokens(90)
    dense = new_session(model)
    dense.prefill([tokens[:60]])
    dense.prefill([tokens[60:72]])
    expected = keys_and_values(dense, 60, 72)
    session = new_session(model, 1, TidalDecodeCache, settings_of(correct_every=12))
    session.prefill([tokens[:60]])
    for start in range(60, 72, draft):
        session.verify([DraftTree(tokens[start : start + draft], list(range(-1, draft - 1)))])
        session.commit([list(range(draft))])
    drifted = keys_and_values(session, 60, 72)
    drift = [float((a - b).norm() / b.norm()) for a, b in zip(drifted, expected, strict=True)]
    assert max(drift[:4]) < 1e-4  # made by what the dense layers, 0 to 2, gave
    assert min(drift[4:]) > 1e-3
    session.decode([tokens[72]])  # first comes the correction
    torch.testing.assert_close(keys_and_values(session, 60, 72), expected, atol=1e-4, rtol=1e-4)
    assert session.lengths == [73]


def test_only_rows_that_are_due_are_corrected_and_the_prompt_never_is() -> None:
    model, tokens = random_transformer(CONFIG), random_tokens(100)
    session = new_session(model, 2, TidalDecodeCache, settings_of(correct_every=8))
    session.prefill([tokens[:60], tokens[:40]])
    for token in tokens[60:64]:
        session.decode([token, 1])
    for token in tokens[64:68]:
        session.decode([token, 0], [True, False])
    untouched = keys_and_values(session, 40, 44)[:, :, 1]
    cache = session.cache
    assert isinstance(cache, TidalDecodeCache) and cache.due() == [tokens[60:68], []]
    session.decode([tokens[68], 0], [True, False])
    dense = new_session(model)
    dense.prefill([tokens[:60]])
    dense.prefill([tokens[60:68]])
    corrected = keys_and_values(session, 60, 68)[:, :, 0]
    torch.testing.assert_close(corrected, keys_and_values(dense, 60, 68)[:, :, 0], atol=1e-4, rtol=1e-4)
    assert torch.equal(keys_and_values(session, 40, 44)[:, :, 1], untouched)
    assert session.lengths == [69, 44]


def test_a_rollback_takes_tokens_off_the_list_of_what_is_due() -> None:
    session = tidal_session(correct_every=6)
    cache = session.cache
    assert isinstance(cache, TidalDecodeCache)
    session.prefill([random_tokens(40)])
    for token in (1, 2, 3, 4, 5):
        session.decode([token])
    session.rollback([42])
    for token in (6, 7, 8):
        session.decode([token])
    assert cache.due() is None
    session.decode([9])
    assert cache.due() == [[1, 2, 6, 7, 8, 9]]


def test_nothing_is_due_while_everything_was_read() -> None:
    session = tidal_session(correct_every=2, budget=100)
    session.prefill([random_tokens(40)])
    for token in range(10):
        session.decode([token])
    cache = session.cache
    assert isinstance(cache, TidalDecodeCache) and cache.due() is None


# ── where to select again ────────────────────────────────────────────────────────────────────────────────────────────


def test_recall_takes_the_last_selecting_layer_as_the_source() -> None:
    overlap = torch.rand(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert float(recall_with(overlap, [2, 4])) == pytest.approx(float(overlap[2, 3] + overlap[4, 5]) / 2)
    found = recall(overlap, 2)
    assert found[[0, 1, 2, 5]].tolist() == [0.0] * 4  # the last layer would select for nobody
    assert float(found[3]) == pytest.approx(float(overlap[3, 4] + overlap[3, 5]) / 2)


def adapter_of(layer: int) -> Adapter:
    return Adapter({"reselect": torch.tensor([layer])}, Provenance("tidal-decode", {}, "model", "data", 0))


def test_the_fitted_layer_is_the_one_that_selects_again() -> None:
    settings = settings_of(reselect="fitted")
    cache = TidalDecodeCache(CONFIG, 1, 8, torch.float32, CPU, settings, adapter=adapter_of(5))
    assert cache.selecting == [2, 5]
    later = replace(settings, start=6)
    assert TidalDecodeCache(CONFIG, 1, 8, torch.float32, CPU, later, adapter=adapter_of(5)).selecting == [6]


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("budget=0", "budget=0 keeps nothing"),
        ("start=-1", "start=-1 is negative"),
        ("correct_every=-2", "correct_every=-2 is negative"),
        ("reselect=often", "reselect=often is not allowed: use fitted, none, every, or layer numbers"),
        ("reselect=3,adapter=a.safetensors", "reselect=3 and an adapter both say where to select again"),
    ],
)
def test_settings_out_of_range_are_refused(spec: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=re.escape(sentence)):
        parse_spec("cache", f"tidal-decode:{spec}")


def test_settings_that_do_not_fit_the_model_are_refused() -> None:
    with pytest.raises(
        UsageError, match=r"layer 2 cannot select again in this model: choose from layers 3, 4, 5, 6, 7"
    ):
        tidal_session(reselect="2")
    with pytest.raises(UsageError, match="no re-selection layer was fitted: run `fewer train tidal-decode`"):
        tidal_session(reselect="fitted")
    windowed = config_of(layers=8, sliding_window=20, sliding_layers=(True, False) * 4)
    with pytest.raises(UsageError, match="correct_every=500 is too long for a model with sliding windows"):
        TidalDecodeCache(windowed, 1, 8, torch.float32, CPU, settings_of(reselect="5", correct_every=500))
    with pytest.raises(UsageError, match="texts of 256 tokens leave nothing to choose"):
        TidalFitConfig(length=256)
