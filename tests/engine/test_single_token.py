"""The one-token paths, in C and in TorchScript, give the general path's numbers, and leave other models alone."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewer.cache import FullCache, SinkWindowCache, SinkWindowConfig
from fewer.cache.stored import StoredLayer
from fewer.engine import native, single_token
from fewer.engine.native import NativeDecoder
from fewer.engine.runner import Runner
from fewer.engine.session import Session
from fewer.engine.single_token import SingleToken
from fewer.formats import DenseFormat, Int4Format, Int8Format, WeightFormat
from fewer.kernels.native import Unavailable, library
from fewer.model.config import ExpertsConfig, ModelConfig, RopeScaling
from fewer.model.transformer import Transformer
from fewer.slots import DraftTree
from fewer.weights.int4 import Int4Config, Int4Weights
from tests.random_model import config_of, new_session, random_tokens, random_transformer

BASE = config_of(hidden_size=64, intermediate_size=128, head_dim=16)
NETWORKS = {
    "gqa": BASE,
    "mha": replace(BASE, kv_heads=4),
    "mqa": replace(BASE, kv_heads=1),
    "biases": replace(BASE, attention_bias=True, output_bias=True, mlp_bias=True),
    "nope": replace(BASE, rope_layers=(True, False, True)),
    "no-positions": replace(BASE, rope_layers=(False, False, False)),
    "tied-scaled": replace(
        BASE, tied_embeddings=True, embedding_scale=8.0, attention_scale=0.1, logit_scale=0.5, logit_softcap=20.0
    ),
    "gelu": replace(BASE, activation="gelu_tanh"),
    "exact-gelu": replace(BASE, activation="gelu"),
    "llama3-rope": replace(BASE, rope_scaling=RopeScaling("llama3", 8.0, 32)),
    "yarn": replace(BASE, rope_scaling=RopeScaling("yarn", 4.0, 64)),  # its magnitude is not 1
}

Quantize = Callable[[str, Tensor], WeightFormat] | None


def mixed(name: str, weight: Tensor) -> WeightFormat:
    """As loaders make it: int4 layers, int8 embedding and head."""
    return Int4Weights(torch.bfloat16, Int4Config(group=64)).quantize(name, weight)


FORMATS: dict[str, tuple[torch.dtype, Quantize, float]] = {  # dtype, format, tolerance as a share of the logit range
    "float32": (torch.float32, None, 1e-5),
    "bfloat16": (torch.bfloat16, None, 3e-2),
    "int8": (torch.bfloat16, lambda name, weight: Int8Format.from_dense(weight), 3e-2),
    "int4": (torch.bfloat16, lambda name, weight: Int4Format.from_dense(weight, 32), 3e-2),
    "int4 and int8": (torch.bfloat16, mixed, 3e-2),
    "int4 in float32": (torch.float32, mixed, 3e-2),
}


Way = type[SingleToken] | type[NativeDecoder]
has_compiler = not isinstance(library(), Unavailable)
no_compiler = pytest.mark.skipif(not has_compiler, reason="there is no C compiler")
every_way = pytest.mark.parametrize("way", [SingleToken, pytest.param(NativeDecoder, marks=no_compiler)])


def runners(model: Transformer, way: Way) -> tuple[Runner, Runner]:
    """One with the fast path and one without it."""
    supports = native.supports if way is NativeDecoder else single_token.supports
    assert supports(model)
    fast, general = Runner(model), Runner(model)
    fast.single, general.single = way(model), None
    return fast, general


def build(config: ModelConfig, kind: str, way: Way) -> tuple[Runner, Runner, float]:
    """The same model with the fast path and without it."""
    dtype, quantize, tolerance = FORMATS[kind]
    return *runners(random_transformer(config, dtype=dtype, quantize=quantize, spread=1.0), way), tolerance


def compare(fast: Session, general: Session, steps: int, tolerance: float) -> None:
    for token in random_tokens(steps, seed=3):
        left, right = fast.decode([token]), general.decode([token])
        assert left.shape == right.shape and left.dtype == right.dtype == torch.float32
        assert float((left - right).abs().max()) <= tolerance * float(right.max() - right.min())


@pytest.mark.parametrize("network", NETWORKS)
@every_way
def test_it_equals_the_general_path_in_float32(network: str, way: Way) -> None:
    fast, general, tolerance = build(NETWORKS[network], "float32", way)
    sessions = [new_session(runner.model, runner=runner) for runner in (fast, general)]
    for session in sessions:
        session.prefill([random_tokens(5)])
    compare(*sessions, 70, tolerance)  # the cache grows several times
    left, right = (session.cache for session in sessions)
    assert left.lengths == right.lengths == [75]
    assert torch.equal(left.positions(0), right.positions(0))
    torch.testing.assert_close(left.pools[0][..., :75, :], right.pools[0][..., :75, :], atol=1e-4, rtol=1e-4)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind != "float32"])
@pytest.mark.parametrize("network", ["gqa", "biases", "tied-scaled"])
@every_way
def test_it_equals_the_general_path_in_every_format(network: str, kind: str, way: Way) -> None:
    fast, general, tolerance = build(NETWORKS[network], kind, way)
    sessions = [new_session(runner.model, runner=runner) for runner in (fast, general)]
    for session in sessions:
        session.prefill([random_tokens(5)])
    compare(*sessions, 12, tolerance)


@every_way
def test_it_alternates_with_every_other_kind_of_step(way: Way) -> None:
    fast, general, tolerance = build(BASE, "float32", way)
    sessions = [new_session(runner.model, runner=runner) for runner in (fast, general)]
    for session in sessions:
        session.prefill([random_tokens(9)])
    compare(*sessions, 3, tolerance)
    for session in sessions:
        session.rollback([6])
    compare(*sessions, 2, tolerance)
    for session in sessions:
        session.prefill([random_tokens(30, seed=1)])
    compare(*sessions, 3, tolerance)


@every_way
def test_it_starts_from_an_empty_cache(way: Way) -> None:
    fast, general, tolerance = build(BASE, "float32", way)
    compare(new_session(fast.model, runner=fast), new_session(general.model, runner=general), 3, tolerance)


@every_way
def test_models_of_one_runner_do_not_share_buffers(way: Way) -> None:
    """Logits handed out stay what they were when the next token runs."""
    fast, _, _ = build(BASE, "float32", way)
    session = new_session(fast.model, runner=fast)
    first = session.decode([3])
    kept = first.clone()
    session.decode([4])
    assert torch.equal(first, kept)


def test_torchscript_leaves_a_window_from_the_token_that_drops_one() -> None:
    fast, _, _ = build(BASE, "float32", SingleToken)
    session = new_session(fast.model, 1, SinkWindowCache, SinkWindowConfig(2, 6), runner=fast)
    rooms = []
    for _ in range(8):
        rooms.append(fast.fast_room(session.cache))
        session.decode([3])
    assert rooms == [6, 5, 4, 3, 2, 1, 0, 0]


@every_way
@pytest.mark.parametrize("settings", [SinkWindowConfig(2, 6), SinkWindowConfig(0, 9), SinkWindowConfig(2, 6, True)])
def test_sinks_and_a_window_equal_the_general_path(settings: SinkWindowConfig, way: Way) -> None:
    fast, general, tolerance = build(BASE, "float32", way)
    sessions = [new_session(runner.model, 1, SinkWindowCache, settings, runner=runner) for runner in (fast, general)]
    compare(*sessions, 30, tolerance)


WINDOWS = {
    "all layers": {"sliding_window": 7},
    "some layers": {"sliding_window": 7, "sliding_layers": (True, False, True), "local_rope_theta": 100.0},
}


@no_compiler
@pytest.mark.parametrize("cache", [FullCache, SinkWindowCache])
@pytest.mark.parametrize("windows", WINDOWS)
def test_sliding_windows_equal_the_general_path_before_and_after_they_evict(windows: str, cache: type) -> None:
    fast, general, tolerance = build(replace(BASE, **WINDOWS[windows]), "float32", NativeDecoder)
    settings = [SinkWindowConfig(3, 12)] if cache is SinkWindowCache else []
    sessions = [new_session(r.model, 1, cache, *settings, context=1000, runner=r) for r in (fast, general)]
    assert fast.has_fast_path(sessions[0].cache)
    compare(*sessions, 20, tolerance)
    for session in sessions:
        session.prefill([random_tokens(240, seed=9)])  # little room is left
    compare(*sessions, 150, tolerance)  # evicts on the way
    for session in sessions:
        session.rollback([session.lengths[0] - 100])
    compare(*sessions, 20, tolerance)
    left, right = (session.cache for session in sessions)
    for layer in range(3):
        assert left.positions(0, layer).tolist()[-12:] == right.positions(0, layer).tolist()[-12:]


@pytest.mark.parametrize("count", [3, 6, 7, 40])
@every_way
def test_greedy_tokens_are_the_same_across_a_windows_edge(count: int, way: Way) -> None:
    fast, general, _ = build(BASE, "float32", way)
    settings = SinkWindowConfig(2, 6)
    found = list(new_session(fast.model, 1, SinkWindowCache, settings, runner=fast).greedy(5, count))
    assert found == list(new_session(general.model, 1, SinkWindowCache, settings, runner=general).greedy(5, count))
    assert len(found) == count


def test_after_a_window_has_dropped_tokens_a_rollback_does_not_bring_torchscript_back() -> None:
    fast, _, _ = build(BASE, "float32", SingleToken)
    session = new_session(fast.model, 1, SinkWindowCache, SinkWindowConfig(2, 6), context=1000, runner=fast)
    session.prefill([random_tokens(400)])
    list(session.greedy(5, 200))
    session.rollback([session.lengths[0] - 5])
    assert fast.fast_room(session.cache) == 0


@no_compiler
@pytest.mark.parametrize("heads", [(7, 1, 64), (9, 3, 48), (4, 4, 128), (2, 1, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_over_many_keys_equals_the_general_path(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Several parts, several chunks in a part, and what the last of sixteen keys leaves over."""
    count, groups, dim = heads
    config = replace(BASE, heads=count, kv_heads=groups, head_dim=dim, hidden_size=64)
    fast, general = runners(random_transformer(config, dtype=dtype, spread=1.0), NativeDecoder)
    sessions = [new_session(runner.model, 1, context=3000, runner=runner) for runner in (fast, general)]
    for length in (62, 67, 130, 1001):
        for session in sessions:
            session.rollback([0])
            session.prefill([random_tokens(length)])
        compare(*sessions, 3, 1e-5 if dtype == torch.float32 else 3e-2)
    settings = SinkWindowConfig(70, 400)  # the sinks end within a chunk, and so does the gap behind them
    sessions = [new_session(r.model, 1, SinkWindowCache, settings, context=3000, runner=r) for r in (fast, general)]
    for length in (400, 71, 300):
        for session in sessions:
            session.prefill([random_tokens(length)])
        compare(*sessions, 3, 1e-5 if dtype == torch.float32 else 3e-2)


@every_way
@pytest.mark.parametrize("token", [-1, 1 << 20])
def test_a_token_beyond_the_vocabulary_is_refused(token: int, way: Way) -> None:
    fast, _, _ = build(BASE, "float32", way)
    session = new_session(fast.model, runner=fast)
    with pytest.raises(IndexError):
        session.decode([token])
    assert session.lengths == [0]


def test_layers_of_another_kind_take_the_general_path() -> None:
    class Counting(StoredLayer):
        calls = 0

        def attend(self, *args: Any) -> Tensor:
            Counting.calls += 1
            return super().attend(*args)

    session = new_session(random_transformer(BASE))
    for layer in session.cache.layers:
        layer.__class__ = Counting
    session.decode([3])
    list(session.greedy(4, 3))
    assert Counting.calls == 4 * len(session.cache.layers)


@no_compiler
def test_a_cache_that_is_given_up_is_freed() -> None:
    fast, _, _ = build(BASE, "float32", NativeDecoder)
    session = new_session(fast.model, runner=fast)
    session.decode([3])
    pool = weakref.ref(session.cache.pools[0])  # type: ignore[attr-defined]
    del session
    gc.collect()
    assert pool() is None


@no_compiler
def test_the_number_of_threads_changes_no_bit() -> None:
    model = random_transformer(BASE, dtype=torch.bfloat16, quantize=mixed, spread=1.0)
    all_threads = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(1)
            session = new_session(model, context=3000)
            session.prefill([random_tokens(700)])
            session.cache.reserve(704)
            single = session.runner.single
            assert single is not None
            torch.set_num_threads(threads)
            with torch.inference_mode():
                found.append(torch.cat([single.run(7, 700 + i, session.cache) for i in range(4)]))  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(all_threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


def few_formats(name: str) -> Transformer:
    dtype, quantize, _ = FORMATS[name]
    return random_transformer(BASE, dtype=dtype, quantize=quantize, spread=1.0)


@no_compiler
@pytest.mark.parametrize("length", [1, 60, 500])
@pytest.mark.parametrize("kind", FORMATS)
def test_verifying_a_draft_gives_the_very_bits_of_plain_decoding(kind: str, length: int) -> None:
    model, text = few_formats(kind), random_tokens(20, seed=4)
    plain, drafted = new_session(model, context=1000), new_session(model, context=1000)
    for session in (plain, drafted):
        session.prefill([random_tokens(length)])
    one_by_one = torch.cat([plain.decode([token]) for token in text])
    together = []
    for count in (1, 2, 3, 4, 5, 6, 7):
        start = len(together)
        if start + count > len(text):
            break
        part = text[start : start + count]
        logits = drafted.verify([DraftTree(part, list(range(-1, count - 1)))])[0]
        assert logits is not None
        together += list(logits)
        drafted.commit([list(range(count))])
    assert len(together) == 15
    assert torch.equal(torch.stack(together), one_by_one[:15])


@no_compiler
def test_a_branch_of_a_tree_gives_the_numbers_of_plain_decoding() -> None:
    model = few_formats("int4 and int8")
    tree = DraftTree([5, 6, 7, 8, 9, 10], [-1, 0, 0, 1, 2, 4])
    session = new_session(model)
    session.prefill([random_tokens(62)])  # the tree lies across a chunk's end
    logits = session.verify([tree])[0]
    assert logits is not None
    session.commit([[0, 2, 4, 5]])
    after = session.decode([11])
    plain = new_session(model)
    plain.prefill([random_tokens(62)])
    expected = torch.cat([plain.decode([token]) for token in (5, 7, 9, 10, 11)])
    found = torch.cat((logits[[0, 2, 4, 5]], after))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)  # keys lie elsewhere, and add up in another order


@no_compiler
@pytest.mark.parametrize("windows", WINDOWS)
def test_drafts_under_a_sliding_window_equal_the_general_path(windows: str) -> None:
    fast, general, tolerance = build(replace(BASE, **WINDOWS[windows]), "float32", NativeDecoder)
    sessions = [new_session(r.model, 1, context=1000, runner=r) for r in (fast, general)]
    tree = DraftTree([5, 6, 7, 8], [-1, 0, 0, 2])
    wide = DraftTree(list(range(9)), list(range(-1, 8)))  # wider than the window
    for length in (3, 40, 250):
        for session in sessions:
            session.prefill([random_tokens(length)])
        for draft, kept in ((tree, [0, 2, 3]), (wide, [0, 1, 2, 3])):
            left, right = (session.verify([draft])[0] for session in sessions)
            assert left is not None and right is not None
            assert float((left - right).abs().max()) <= tolerance * float(right.max() - right.min())
            for session in sessions:
                session.commit([kept])
        compare(*sessions, 3, tolerance)


REFUSED = {
    "sliding window": {"sliding_window": 16},
    "windows in some layers": {"sliding_window": 16, "sliding_layers": (True, False, False)},
    "soft-cap": {"attention_softcap": 30.0},
    "norms of q and k": {"qk_norm": "head"},
    "norms of all of q and k": {"qk_norm": "all"},
    "sandwich norms": {"norm_placement": "sandwich"},
    "post norms": {"norm_placement": "post"},
    "clipping": {"clip_qkv": 4.0},
    "residual scale": {"residual_scale": 0.5},
    "partial rotation": {"rotary_dim": 8},
    "experts": {"experts": ExpertsConfig(4, 2, 32, True)},
}


OF_THE_NATIVE_PATH = (
    "soft-cap",
    "norms of q and k",
    "norms of all of q and k",
    "sandwich norms",
    "post norms",
    "clipping",
    "residual scale",
)


@pytest.mark.parametrize("reason", REFUSED)
def test_networks_that_torchscript_does_not_run_take_another_way(reason: str) -> None:
    model = random_transformer(replace(BASE, **REFUSED[reason]))
    assert not single_token.supports(model)
    runner = Runner(model)
    assert isinstance(runner.single, NativeDecoder) == (has_compiler and reason != "experts")
    session, whole = new_session(model, 1, FullCache, runner=runner), new_session(model)
    tokens = random_tokens(24)
    session.prefill([tokens[:20]])
    for token in tokens[20:]:
        logits = session.decode([token])
    torch.testing.assert_close(logits, whole.prefill([tokens]), atol=1e-4, rtol=1e-4)


def of_parts(dtype: torch.dtype, **kinds: str) -> Callable[[str, Tensor], WeightFormat]:
    """Formats by projection; int4 for the others."""

    def quantize(name: str, weight: Tensor) -> WeightFormat:
        kind = kinds.get(name.split(".")[-2], "int4")
        if kind == "dense":
            return DenseFormat(weight.to(dtype))
        return Int8Format.from_dense(weight) if kind == "int8" else Int4Format.from_dense(weight, 32)

    return quantize


PARTS = {  # formats by projection, and the parts of qkv and of gate_up
    "v dense": ({"v": "dense"}, 2, 1),
    "v and down dense, as in Q4_K_M": ({"v": "dense", "down": "dense"}, 2, 1),
    "q int8, v dense": ({"q": "int8", "v": "dense"}, 3, 1),
    "k dense": ({"k": "dense"}, 3, 1),
    "up dense": ({"up": "dense"}, 1, 2),
    "gate int8": ({"gate": "int8"}, 1, 2),
    "all dense but q": ({**dict.fromkeys(("k", "v", "o", "gate", "up", "down"), "dense")}, 2, 1),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("network", ["gqa", "biases"])
@pytest.mark.parametrize("parts", PARTS)
@every_way
def test_projections_of_different_formats_equal_the_general_path(
    parts: str, network: str, dtype: torch.dtype, way: Way
) -> None:
    kinds, qkv, gate_up = PARTS[parts]
    model = random_transformer(NETWORKS[network], dtype=dtype, quantize=of_parts(dtype, **kinds), spread=1.0)
    layer = model.layers[0]
    assert (len(layer.attention.qkv.parts), len(layer.feed_forward.gate_up.parts)) == (qkv, gate_up)  # type: ignore[union-attr]
    fast, general = runners(model, way)
    sessions = [new_session(model, runner=runner) for runner in (fast, general)]
    for session in sessions:
        session.prefill([random_tokens(5)])
    compare(*sessions, 12, 3e-2)


def test_parts_take_x_in_the_widest_of_their_dtypes() -> None:
    """A dense float32 part beside a bfloat16 one loses nothing: in the first layer, v is that of the dense model."""
    dtype = torch.float32
    mixed_parts = random_transformer(BASE, dtype=dtype, quantize=of_parts(dtype, v="dense", embed="dense"), spread=1.0)
    dense = random_transformer(BASE, dtype=dtype, spread=1.0)
    values = []
    for model in (mixed_parts, dense):
        session = new_session(model)
        session.decode([7])
        values.append(session.cache.pools[0][0, 1, 0, :, 0])  # type: ignore[attr-defined]
    torch.testing.assert_close(*values, atol=1e-5, rtol=1e-5)


def test_a_part_without_a_cpu_kernel_is_refused() -> None:
    config = replace(BASE, hidden_size=72, heads=4, kv_heads=2)  # int8 has no kernel for 72 columns
    kinds = dict.fromkeys(("q", "k", "o", "gate", "up", "down", "embed", "head"), "dense")
    model = random_transformer(config, dtype=torch.bfloat16, quantize=of_parts(torch.bfloat16, v="int8", **kinds))
    assert not single_token.supports(model) and not native.supports(model)
    assert new_session(model).decode([1]).isfinite().all()
