"""The CUDA decoding path gives the general path's numbers: in the interpreter on the CPU, in a graph on a GPU.

The reference is the same network in float32 on the CPU with dense, dequantised matrices.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

from fewer.cache import FullCache, SinkWindowCache, SinkWindowConfig
from fewer.decoding.generate import generate
from fewer.decoding.prompt_lookup import PromptLookup
from fewer.decoding.sampling import SamplingConfig
from fewer.engine import cuda
from fewer.engine.cuda import CudaDecoder
from fewer.engine.runner import Runner
from fewer.engine.session import Session
from fewer.errors import NumericalError
from fewer.formats import DenseFormat, Int4Format, Int8Format, WeightFormat
from fewer.model.config import ModelConfig
from fewer.model.transformer import Transformer
from tests.random_model import config_of, random_tokens, random_weights

CPU = torch.device("cpu")
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "layers": 2,
    "heads": 2,
    "kv_heads": 1,
    "head_dim": 16,
    "vocab_size": 40,
}
FORMATS: dict[str, Callable[[Tensor], WeightFormat]] = {
    "dense": DenseFormat,
    "int8": Int8Format.from_dense,
    "int4": lambda weight: in_nibble_order(Int4Format.from_dense(weight, 32)),
}
FEATURES: dict[str, dict[str, Any]] = {
    "biases everywhere": {"attention_bias": True, "output_bias": True, "mlp_bias": True},
    "norms of heads": {"qk_norm": "head", "activation": "gelu_tanh"},
    "a layer without positions": {"rope_layers": (True, False), "rotary_dim": 8},
    "caps and scales": {"attention_softcap": 1.5, "logit_softcap": 4.0, "logit_scale": 0.5, "attention_scale": 0.4},
    "tied embeddings": {"tied_embeddings": True, "embedding_scale": 3.0, "activation": "gelu", "kv_heads": 2},
    "three queries a key": {"heads": 6, "kv_heads": 2},
}


def in_nibble_order(stored: Int4Format) -> Int4Format:
    """As a GPU holds it, on any device."""
    tensors = stored.state_dict()
    return Int4Format(stored.shape, stored.group_size, tensors["packed"], tensors["scale"], tensors["zero"])


def build(
    config: ModelConfig, kind: str, device: torch.device, dtype: torch.dtype = torch.float32, dense: bool = False
) -> Transformer:
    """The random model in a format; `dense`: the same numbers as plain matrices."""
    weights = random_weights(config)

    def matrix(name: str) -> WeightFormat:
        stored = FORMATS[kind](weights(name))
        if dense or kind == "dense":
            return DenseFormat(stored.dequantize(dtype).to(device))
        return stored.to(device)

    return Transformer(config, matrix, lambda name: weights(name).to(device), dtype, device)


def fast_runner(model: Transformer) -> Runner:
    runner = Runner(model)
    runner.single = None
    if model.device.type == "cpu":
        assert cuda.supports(model)
        runner.cuda = CudaDecoder(model)
    assert runner.cuda is not None
    return runner


def general_runner(model: Transformer) -> Runner:
    runner = Runner(model)
    runner.single = runner.cuda = None
    return runner


def session_of(runner: Runner, batch: int) -> Session:
    """With room for 8 tokens, so that the cache has to grow."""
    model = runner.model
    return Session(runner, FullCache(model.config, batch, 8, model.dtype, model.device))


def assert_same_steps(fast: Runner, exact: Runner, batch: int, steps: int, tolerance: float) -> None:
    """Every step's logits, while rows start one after another and so have unequal lengths."""
    ours, theirs = session_of(fast, batch), session_of(exact, batch)
    for step in range(steps):
        active = [step >= row for row in range(batch)]
        tokens = random_tokens(batch, seed=step, vocab_size=fast.config.vocab_size)
        found, wanted = ours.decode(tokens, active).cpu()[active], theirs.decode(tokens, active)[active]
        assert (found - wanted).norm() <= tolerance * wanted.norm()
    assert ours.lengths == theirs.lengths == [steps - row for row in range(batch)]


@pytest.mark.parametrize("kind", list(FORMATS))
@pytest.mark.parametrize("batch", [1, 3])
def test_steps_equal_the_general_paths(kind: str, batch: int, device: torch.device) -> None:
    config = config_of(**SMALL)
    fast, exact = fast_runner(build(config, kind, device)), general_runner(build(config, kind, CPU, dense=True))
    tolerance = 1e-4
    if kind != "dense" and batch > 1:
        tolerance = 0.05  # several rows meet quantised matrices in bfloat16
    elif kind == "int4":
        tolerance = 0.02  # the codes' bit patterns are thousands of times as large as the codes
    assert_same_steps(fast, exact, batch, 3 if device.type == "cpu" else 40, tolerance)


@pytest.mark.parametrize("feature", list(FEATURES))
def test_every_switch_of_the_network_is_honoured(feature: str, device: torch.device) -> None:
    config = config_of(**SMALL | FEATURES[feature])
    fast, exact = fast_runner(build(config, "dense", device)), general_runner(build(config, "dense", CPU))
    assert_same_steps(fast, exact, 2, 3, 1e-4)


def test_decoding_continues_a_prefill_of_unequal_prompts(device: torch.device) -> None:
    config = config_of(**SMALL)
    ours = session_of(fast_runner(build(config, "dense", device)), 2)
    theirs = session_of(general_runner(build(config, "dense", CPU)), 2)
    prompts = [random_tokens(9, 1, 40), random_tokens(4, 2, 40)]
    torch.testing.assert_close(ours.prefill(prompts).cpu(), theirs.prefill(prompts), rtol=1e-4, atol=1e-4)
    for tokens in ([3, 4], [5, 6]):
        torch.testing.assert_close(ours.decode(tokens).cpu(), theirs.decode(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 2])
def test_logits_that_are_not_finite_name_their_layer(batch: int, device: torch.device) -> None:
    model = build(config_of(**SMALL), "dense", device)
    damaged = model.layers[1].feed_forward_norm
    assert damaged is not None
    damaged[0] = float("nan")
    with pytest.raises(NumericalError, match="first in layer 1"):
        session_of(fast_runner(model), batch).decode([1] * batch)


@pytest.mark.parametrize(
    "changes",
    [{"sliding_window": 16}, {"qk_norm": "all"}, {"norm_placement": "sandwich"}, {"clip_qkv": 1.0}],
    ids=lambda changes: next(iter(changes)),
)
def test_what_the_kernels_do_not_compute_is_left_to_the_general_path(changes: dict[str, Any]) -> None:
    assert cuda.supports(build(config_of(**SMALL), "dense", CPU))
    assert not cuda.supports(build(config_of(**SMALL | changes), "dense", CPU))


def test_graphs_go_with_the_rotary_tables_that_they_read() -> None:
    """Also where the first layer has no positions: its table could not tell."""
    model = build(config_of(**SMALL | {"rope_layers": (False, True)}), "dense", CPU)
    decoder = fast_runner(model).cuda
    assert decoder is not None
    decoder._fusions(10)
    decoder.graphs["recorded"] = object()  # type: ignore[assignment]
    decoder._fusions(cuda.SHORTEST_TABLE)
    assert decoder.graphs
    decoder._fusions(cuda.SHORTEST_TABLE + 1)
    assert not decoder.graphs


def test_a_pool_that_was_outgrown_is_freed() -> None:
    session = session_of(fast_runner(build(config_of(**SMALL | {"layers": 1}), "dense", CPU)), 1)
    session.decode([1])
    outgrown = weakref.ref(session.cache.pools[0])
    session.cache.reserve(100)
    session.decode([2])
    assert outgrown() is None


# ── on a GPU only: graphs, bfloat16, generation ─────────────────────────────────────────────────────────────────────


@pytest.fixture
def gpu() -> torch.device:
    return torch.device("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", list(FORMATS))
@pytest.mark.parametrize("batch", [1, 3])
def test_graph_replay_equals_the_eager_pass(kind: str, batch: int, gpu: torch.device) -> None:
    runner = fast_runner(build(config_of(**SMALL), kind, gpu, torch.bfloat16))
    session = session_of(runner, batch)
    session.prefill([random_tokens(100 + 30 * row, row, 40) for row in range(batch)])
    decoder, cache = runner.cuda, session.cache
    assert decoder is not None and isinstance(cache, FullCache)
    capture = cache.contiguous_capture()
    with torch.inference_mode():
        for _ in range(2):  # the first call captures, the second only replays
            replayed = decoder.run([7] * batch, session.lengths, capture).clone()
        assert len(decoder.graphs) == 1
        work = decoder.feed([7] * batch, session.lengths)  # a pass leaves its successor's inputs behind
        work.logits.zero_()
        decoder.forward(work, capture, decoder.fusions)
        assert torch.equal(work.logits, replayed)


@pytest.mark.parametrize("kind", list(FORMATS))
def test_running_ahead_gives_the_tokens_of_single_steps(kind: str, device: torch.device) -> None:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    runner = fast_runner(build(config_of(**SMALL), kind, device, dtype))
    count = 4 if device.type == "cpu" else 40
    ahead, single = session_of(runner, 1), session_of(runner, 1)
    found = list(ahead.greedy(5, count))
    token, wanted = 5, []
    for _ in range(count):
        token = int(single.decode([token])[0].argmax())
        wanted.append(token)
    assert found == wanted
    assert ahead.lengths == single.lengths == [count]


def test_running_ahead_stops_where_a_window_drops_a_token(device: torch.device) -> None:
    model = build(config_of(**SMALL), "dense", device)
    fast, general = fast_runner(model), general_runner(model)
    sessions = [
        Session(runner, SinkWindowCache(model.config, 1, 8, model.dtype, device, SinkWindowConfig(1, 3)))
        for runner in (fast, general)
    ]
    found, wanted = (list(session.greedy(5, 5)) for session in sessions)
    assert found == wanted


def test_leaving_the_run_ahead_early_leaves_a_usable_session(device: torch.device) -> None:
    runner = fast_runner(build(config_of(**SMALL), "dense", device))
    session, whole = session_of(runner, 1), session_of(runner, 1)
    wanted = list(whole.greedy(5, 4))
    found = list(islice(session.greedy(5, 100), 2))
    assert session.lengths == [2]
    assert found + list(session.greedy(found[-1], 2)) == wanted


@pytest.mark.gpu
@pytest.mark.parametrize("kind", list(FORMATS))
def test_a_bfloat16_session_equals_the_cpus_float32(kind: str, gpu: torch.device) -> None:
    config = config_of(**SMALL | {"attention_bias": True, "qk_norm": "head"})
    ours = session_of(fast_runner(build(config, kind, gpu, torch.bfloat16)), 2)
    theirs = session_of(general_runner(build(config, kind, CPU, dense=True)), 2)
    prompts = [random_tokens(150, 1, 40), random_tokens(33, 2, 40)]
    pairs = [(ours.prefill(prompts), theirs.prefill(prompts))]
    pairs += [(ours.decode([step, step]), theirs.decode([step, step])) for step in range(20)]
    for found, wanted in pairs:
        assert (found.cpu() - wanted).norm() <= 0.05 * wanted.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 2])
def test_prompt_lookup_emits_the_plain_tokens(batch: int, gpu: torch.device) -> None:
    runner = fast_runner(build(config_of(**SMALL), "dense", gpu))
    prompts = [random_tokens(20, row, 40) * 2 for row in range(batch)]
    texts = []
    for strategy in (None, PromptLookup()):
        rows: list[list[int]] = [[] for _ in prompts]
        for event in generate(session_of(runner, batch), prompts, SamplingConfig(), strategy, max_tokens=100):
            rows[event.row] += event.tokens
        texts.append(rows)
    assert texts[0] == texts[1]
    assert all(len(row) == 100 for row in texts[0])


@pytest.mark.gpu
def test_growth_of_the_cache_captures_a_new_graph(gpu: torch.device) -> None:
    config = config_of(**SMALL)
    runner = fast_runner(build(config, "dense", gpu))
    assert_same_steps(runner, general_runner(build(config, "dense", CPU)), 1, 200, 1e-4)
    assert runner.cuda is not None and len(runner.cuda.graphs) > 1


@pytest.mark.gpu
def test_sessions_that_take_turns_keep_their_own_graphs(gpu: torch.device) -> None:
    config = config_of(**SMALL)
    fast, exact = fast_runner(build(config, "dense", gpu)), general_runner(build(config, "dense", CPU))
    pairs = [(session_of(fast, 1), session_of(exact, 1)) for _ in range(cuda.KEPT_GRAPHS + 2)]  # one graph is dropped
    for step in range(3):
        for index, (ours, theirs) in enumerate(pairs):
            found, wanted = ours.decode([step + index]).cpu(), theirs.decode([step + index])
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
