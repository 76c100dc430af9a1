"""DuoAttention: each head sees what its gate says, whatever the steps, and memory is what is kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewer.cache import FullCache
from fewer.cache.duo_attention import DRAFTED, DuoAttentionCache, DuoAttentionConfig
from fewer.cache.head_gates import GATES
from fewer.decoding.generate import generate
from fewer.decoding.prompt_lookup import PromptLookup, PromptLookupConfig
from fewer.decoding.sampling import SamplingConfig
from fewer.engine.runner import Runner
from fewer.engine.session import Session, ancestors
from fewer.errors import CheckpointError, FewerError, UsageError
from fewer.formats import DenseFormat
from fewer.model.config import ModelConfig
from fewer.model.rope import Rotary
from fewer.model.step import Step
from fewer.model.transformer import Transformer
from fewer.recipe import Recipe
from fewer.slots import DraftTree
from fewer.training import Adapter, Provenance, adapter_store, load_adapter
from tests.cache.dense_reference import attention_at
from tests.engine import test_session_histories
from tests.random_model import CPU, config_of, new_session, random_tokens, random_transformer, random_weights

CONFIG = config_of(heads=6, kv_heads=3, head_dim=8, layers=3, context_length=2000)
GATES_OF_3 = torch.tensor([[1.0, 0.1, 0.9], [0.2, 0.0, 0.1], [0.8, 0.9, 1.0]])  # two of three, none, all of them
SINKS, WINDOW = 4, 12
TOTAL = 340
ROTARY = Rotary(8, 8, 1e4, 2000)


def adapter_of(gates: Tensor) -> Adapter:
    return Adapter({GATES: gates}, Provenance("duo-attention", {}, "a model", "a text", 0))


def duo(
    config: ModelConfig = CONFIG, gates: Tensor | None = None, batch: int = 1, capacity: int = 8, **settings: Any
) -> DuoAttentionCache:
    if gates is None:
        gates = GATES_OF_3 if config.kv_heads == 3 else random_gates_of(config)
    chosen = DuoAttentionConfig(**{"sparsity": 4 / 9, "sinks": SINKS, "window": WINDOW, **settings})
    return DuoAttentionCache(config, batch, capacity, torch.float32, CPU, chosen, adapter=adapter_of(gates))


def random_gates_of(config: ModelConfig) -> Tensor:
    return torch.rand(config.layers, config.kv_heads, generator=torch.Generator().manual_seed(5))


def session_of(
    model: Transformer, batch: int = 1, runner: Runner | None = None, gates: Tensor | None = None, **settings: Any
) -> Session:
    return Session(runner or Runner(model), duo(model.config, gates, batch, **settings))


def general(model: Transformer) -> Runner:
    """A runner that never leaves the layers."""
    runner = Runner(model)
    runner.single = None
    return runner


class Text:
    """Queries, keys and values of one random text, before rotation."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.q, self.k, self.v = (torch.randn(heads, TOTAL, 8, generator=generator) for heads in (6, 3, 3))

    def feed(
        self,
        cache: DuoAttentionCache,
        tokens: Sequence[int],
        parents: Sequence[int] | None = None,
        role: Any = "prompt",
    ) -> Tensor:
        """Positions `tokens` of the text, as a chain or as a tree of its own -> [H, T, D]. Nothing is committed."""
        at, length = list(tokens), cache.lengths[0]
        tree = DraftTree(at, list(parents) if parents is not None else list(range(-1, len(at) - 1)))
        step = Step(
            tokens=torch.zeros(1, len(at), dtype=torch.int64),
            positions=torch.tensor([tree.depth]) + length,
            role=role,
            mask="causal" if parents is None else "tree",
            ancestors=None if parents is None else ancestors([tree.parents], len(at)),
        )
        cache.reserve(cache.physical_lengths[0] + len(at))
        q, k, v = (x[None, :, at] for x in (self.q, self.k, self.v))
        return [layer.attend(q, k, v, torch.empty(0), ROTARY, step)[0] for layer in cache.layers][0]

    def expected(self, position: int, window: int = WINDOW) -> Tensor:
        """The first layer: its second key head streams, the others retrieve."""
        at = self.q[:, position]
        everything = attention_at(at, self.k, self.v, position, None, 0, False, CONFIG.scale)
        streaming = attention_at(at, self.k, self.v, position, window, SINKS, False, CONFIG.scale)
        return torch.cat((everything[:2], streaming[2:4], everything[4:])).float()


# ── what is seen ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("chunk", [1, 23, 100, 150])
def test_every_step_equals_float64_attention_over_what_each_head_keeps(chunk: int) -> None:
    cache, text = duo(), Text()
    for start in range(0, TOTAL, chunk):
        tokens = range(start, min(start + chunk, TOTAL))
        out = text.feed(cache, tokens)
        cache.commit([len(tokens)])
        for index, position in enumerate(tokens):
            if position < 40 or position % 7 == 0:
                torch.testing.assert_close(out[:, index], text.expected(position), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("chunk", [23, 100])
def test_an_official_chunk_is_dense_and_sees_the_window_before_it(chunk: int) -> None:
    """The first token of a chunk sees `window` tokens beside itself, the next one more; the first chunk everything."""
    cache, text = duo(prefill="official"), Text()
    for start in range(0, 300, chunk):
        tokens = range(start, min(start + chunk, 300))
        out = text.feed(cache, tokens)
        cache.commit([len(tokens)])
        for index, position in enumerate(tokens):
            if index % 5 == 0:
                window = position - start + WINDOW + 1
                torch.testing.assert_close(out[:, index], text.expected(position, window), atol=2e-5, rtol=1e-4)
    for position in range(300, TOTAL):
        out = text.feed(cache, [position], role="generated")
        cache.commit([1])
        torch.testing.assert_close(out[:, 0], text.expected(position, WINDOW + 1), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("length", [2, 14, 40, 300])
def test_a_branch_of_a_tree_equals_the_same_text_in_a_row(length: int) -> None:
    """The accepted branch comes second, so that its slots are not its positions."""
    cache, text = duo(), Text()
    for start in range(0, length, 50):
        tokens = range(start, min(start + 50, length))
        text.feed(cache, tokens)
        cache.commit([len(tokens)])
    tree = [length, 7, 8, 9, length + 1, length + 2, length + 3, length + 4]
    out = text.feed(cache, tree, [-1, 0, 1, 2, 0, 4, 5, 6], "generated")
    for node, position in zip([0, 4, 5, 6, 7], range(length, length + 5), strict=True):
        torch.testing.assert_close(out[:, node], text.expected(position), atol=2e-5, rtol=1e-4)
    cache.commit([[0, 4, 5, 6, 7]])
    after = text.feed(cache, [length + 5], role="generated")[:, 0]
    torch.testing.assert_close(after, text.expected(length + 5), atol=2e-5, rtol=1e-4)


class MaskedLayer:
    """Everything stays, and a mask for each key head hides what the head would have dropped."""

    def __init__(self, config: ModelConfig, retrieval: Tensor):
        self.config, self.retrieval, self.k, self.v = config, retrieval, torch.empty(0), torch.empty(0)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, rotary: Rotary | None, step: Step) -> Tensor:
        assert rotary is not None
        q, k = rotary.apply(q, step.positions), rotary.apply(k, step.positions)
        self.k, self.v = (torch.cat((old, new), 2) if old.numel() else new for old, new in ((self.k, k), (self.v, v)))
        group = q.shape[1] // k.shape[1]
        keys, values = (part.repeat_interleave(group, 1) for part in (self.k, self.v))
        behind = step.positions[0][:, None] - torch.arange(keys.shape[2])
        streamed = (behind < WINDOW) | (torch.arange(keys.shape[2]) < SINKS)
        seen = (behind >= 0) & (self.retrieval.repeat_interleave(group)[:, None, None] | streamed)
        scores = (q @ keys.transpose(2, 3) * self.config.scale).masked_fill(~seen, -torch.inf)
        return scores.softmax(-1) @ values


@pytest.mark.parametrize("fast", [False, True])
def test_decoding_emits_the_tokens_of_masks_over_everything(fast: bool) -> None:
    model, prompt = random_transformer(CONFIG), random_tokens(70)
    session = session_of(model, runner=None if fast else general(model))
    cache = session.cache
    assert isinstance(cache, DuoAttentionCache)

    class Masked:
        def __init__(self, retrieval: Tensor):
            self.layers = [MaskedLayer(CONFIG, of_layer) for of_layer in retrieval]

    masked, logits = Masked(cache.retrieval), session.prefill([prompt])
    text = list(prompt)
    for _ in range(60):
        new = text if len(text) == len(prompt) else text[-1:]
        first = len(text) - len(new)
        step = Step(torch.tensor([new]), torch.arange(first, len(text))[None])
        wanted = model.forward(step, masked).logits  # type: ignore[arg-type]
        assert wanted is not None
        torch.testing.assert_close(logits, wanted, atol=2e-4, rtol=1e-3)
        assert int(logits.argmax()) == int(wanted.argmax())
        text.append(int(wanted.argmax()))
        logits = session.decode(text[-1:])


# ── where it equals the plain model ─────────────────────────────────────────────────────────────────────────────────


def test_at_sparsity_0_it_is_the_plain_model_and_needs_no_gates() -> None:
    model, tokens = random_transformer(CONFIG), random_tokens(120)
    cache = DuoAttentionCache(CONFIG, 1, 8, torch.float32, CPU, DuoAttentionConfig(sparsity=0.0))
    full, all_retrieve = (
        Session(general(model), FullCache(CONFIG, 1, 8, torch.float32, CPU)),
        Session(general(model), cache),
    )
    assert torch.equal(full.prefill([tokens[:90]]), all_retrieve.prefill([tokens[:90]]))
    for token in tokens[90:]:
        assert torch.equal(full.decode([token]), all_retrieve.decode([token]))
    assert cache.slack is None
    fast, plain = (
        Session(Runner(model), DuoAttentionCache(CONFIG, 1, 8, torch.float32, CPU, DuoAttentionConfig(0.0))),
        new_session(model),
    )
    assert torch.equal(plain.prefill([tokens[:90]]), fast.prefill([tokens[:90]]))
    assert list(plain.greedy(tokens[90], 30)) == list(fast.greedy(tokens[90], 30))


@pytest.mark.parametrize("prefill", ["exact", "official"])
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 1.0])
def test_texts_within_sinks_and_window_equal_the_plain_model(sparsity: float, prefill: str) -> None:
    model, tokens = random_transformer(CONFIG), random_tokens(80)
    full = new_session(model)
    small = session_of(model, sparsity=sparsity, prefill=prefill, sinks=4, window=76)
    torch.testing.assert_close(full.prefill([tokens[:50]]), small.prefill([tokens[:50]]), atol=1e-4, rtol=1e-4)
    for token in tokens[50:]:
        torch.testing.assert_close(small.decode([token]), full.decode([token]), atol=1e-4, rtol=1e-4)


def reordered(config: ModelConfig, order: Tensor, dtype: torch.dtype = torch.float32) -> Transformer:
    """The model with the key heads of every layer permuted by `order` [layers, Hk]: rows of q, k, v (and their biases),
    columns of o."""
    weights, group, dim = random_weights(config), config.heads // config.kv_heads, config.head_dim

    def tensor(name: str) -> Tensor:
        found = weights(name)
        if ".attention." not in name or name.endswith("norm.weight"):
            return found
        heads, part = order[int(name.split(".")[1])], name.split(".")[3]
        block = dim if part in "kv" else dim * group
        rows = (heads[:, None] * block + torch.arange(block)).flatten()
        return found[:, rows] if part == "o" else found[rows]

    return Transformer(config, lambda name: DenseFormat(tensor(name).to(dtype)), tensor, dtype, CPU)


@pytest.mark.parametrize("family", [{}, {"attention_bias": True}, {"qk_norm": "head"}])
def test_reordering_heads_changes_neither_the_model_nor_what_its_gates_do(family: dict[str, Any]) -> None:
    config = config_of(heads=6, kv_heads=3, head_dim=8, layers=3, context_length=2000, **family)
    order = torch.tensor([[0, 2, 1], [2, 0, 1], [1, 2, 0]])  # retrieval heads first, where there are both
    model, other, tokens = random_transformer(config), reordered(config, order), random_tokens(90)
    plain, permuted = new_session(model), new_session(other)
    torch.testing.assert_close(plain.prefill([tokens]), permuted.prefill([tokens]), atol=1e-4, rtol=1e-4)
    ours, theirs = session_of(model), session_of(other, gates=GATES_OF_3.gather(1, order))
    torch.testing.assert_close(ours.prefill([tokens]), theirs.prefill([tokens]), atol=1e-4, rtol=1e-4)
    assert list(ours.greedy(1, 40)) == list(theirs.greedy(1, 40))


# ── steps, rows, families ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("chunk", [7, 64, 150, 512])
def test_prefill_in_chunks_equals_one_pass(chunk: int) -> None:
    model, tokens = random_transformer(CONFIG), random_tokens(300)
    whole = session_of(model).prefill([tokens])
    runner = Runner(model)
    runner.chunk = chunk
    torch.testing.assert_close(session_of(model, runner=runner).prefill([tokens]), whole, atol=1e-4, rtol=1e-4)


def test_the_setting_bounds_a_chunk_and_official_prompts_of_one_chunk_are_dense() -> None:
    model, tokens = random_transformer(CONFIG), random_tokens(300)
    dense = new_session(model).prefill([tokens])
    torch.testing.assert_close(session_of(model, prefill="official").prefill([tokens]), dense, atol=1e-4, rtol=1e-4)
    chunked = session_of(model, prefill="official", chunk=40)
    assert chunked.cache.max_step == 40
    assert (chunked.prefill([tokens]) - dense).abs().max() > 1e-2


@pytest.mark.parametrize("prefill", ["exact", "official"])
def test_rows_of_a_batch_equal_single_runs(prefill: str) -> None:
    model = random_transformer(CONFIG)
    prompts = [random_tokens(length, seed=length) for length in (3, 90, 41)]
    batch = session_of(model, 3, prefill=prefill)
    singles = [session_of(model, prefill=prefill) for _ in prompts]
    found = batch.prefill(prompts)
    wanted = torch.cat([session.prefill([prompt]) for session, prompt in zip(singles, prompts, strict=True)])
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    for step in range(40):
        tokens = [(step * 7 + row) % 48 for row in range(3)]
        wanted = torch.cat([session.decode([token]) for session, token in zip(singles, tokens, strict=True)])
        torch.testing.assert_close(batch.decode(tokens), wanted, atol=1e-4, rtol=1e-4)
    again = [random_tokens(length, seed=length) for length in (60, 2, 33)]
    wanted = torch.cat([session.prefill([prompt]) for session, prompt in zip(singles, again, strict=True)])
    torch.testing.assert_close(batch.prefill(again), wanted, atol=1e-4, rtol=1e-4)


FAMILIES: dict[str, dict[str, Any]] = {
    "a-head-of-keys-each": {"kv_heads": 4},
    "one-head-of-keys": {"kv_heads": 1},
    "biases": {"attention_bias": True},
    "norms": {"qk_norm": "head"},
    "softcap": {"attention_softcap": 5.0},
    "windows": {"sliding_window": 9},
    "local-and-global": {"sliding_window": 9, "sliding_layers": (True, False, False)},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fast_path_and_the_layers_agree_for_every_family(family: str) -> None:
    model, tokens = random_transformer(config_of(**FAMILIES[family])), random_tokens(100)
    ours, theirs = session_of(model, sparsity=0.5), session_of(model, sparsity=0.5, runner=general(model))
    torch.testing.assert_close(ours.prefill([tokens]), theirs.prefill([tokens]), atol=1e-4, rtol=1e-4)
    for token in random_tokens(50, seed=1):
        torch.testing.assert_close(ours.decode([token]), theirs.decode([token]), atol=2e-4, rtol=1e-3)
    if "sliding_window" in FAMILIES[family]:  # what the model's own windows see is the same as without the method
        assert ours.cache.slack == DRAFTED


def test_a_model_of_windows_alone_has_nothing_to_split() -> None:
    model, tokens = random_transformer(config_of(sliding_window=9)), random_tokens(100)
    torch.testing.assert_close(
        session_of(model, sparsity=1.0).prefill([tokens]), new_session(model).prefill([tokens]), atol=1e-4, rtol=1e-4
    )


def test_tokens_that_skip_a_layer_are_seen_by_none_there() -> None:
    model, tokens = random_transformer(CONFIG), random_tokens(30)
    plan = torch.ones(1, 30, 3, dtype=torch.bool)
    plan[:, 5:9, 1] = plan[:, 20:, 2] = False
    results = []
    for cache in (duo(window=40), FullCache(CONFIG, 1, 64, torch.float32, CPU)):
        cache.reserve(64)
        found = []
        for first, stop in ((0, 12), (12, 29), (29, 30)):
            part = Step(
                torch.tensor([tokens[first:stop]]), torch.arange(first, stop)[None], layer_plan=plan[:, first:stop]
            )
            found.append(Runner(model).step(part, cache).logits)
            cache.commit([stop - first])
        results.append(torch.cat([logits for logits in found if logits is not None]))
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


# ── going back ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_as_many_tokens_as_promised_can_be_taken_back_and_no_more() -> None:
    session, tokens = session_of(random_transformer(CONFIG)), random_tokens(600)
    session.prefill([tokens])
    with pytest.raises(FewerError, match=f"cannot go back to 200 tokens.*at least {DRAFTED} tokens"):
        session.rollback([200])
    assert session.lengths == [600]
    wanted = session.decode([3])
    session.rollback([601 - DRAFTED])
    session.prefill([tokens[601 - DRAFTED :]])
    torch.testing.assert_close(session.decode([3]), wanted, atol=1e-4, rtol=1e-4)
    session.rollback([0])
    session.prefill([tokens])
    torch.testing.assert_close(session.decode([3]), wanted, atol=1e-4, rtol=1e-4)


def test_speculation_emits_the_plain_tokens() -> None:
    model = random_transformer(CONFIG)
    prompts = [random_tokens(9, seed=3) * 6, random_tokens(70, seed=4)]

    def run(strategy: PromptLookup | None) -> list[list[int]]:
        texts: list[list[int]] = [[], []]
        for event in generate(session_of(model, 2), prompts, SamplingConfig(), strategy, 60):
            texts[event.row] += event.tokens
        return texts

    assert run(PromptLookup(PromptLookupConfig(tokens=DRAFTED))) == run(None)


@pytest.mark.parametrize("windows", [{}, {"sliding_window": 9, "sliding_layers": (True, False, False)}])
@pytest.mark.parametrize("seed", range(2))
def test_only_the_text_counts_and_not_how_it_came(
    seed: int, windows: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random prompts, steps, draft trees and rollbacks of three ragged rows; logits are those of the bare text."""
    monkeypatch.setattr(test_session_histories, "SLACK", DRAFTED)

    def make(config: ModelConfig, batch: int, capacity: int, *_: object) -> DuoAttentionCache:
        return duo(config, GATES_OF_3, batch, capacity)

    model = random_transformer(config_of(heads=6, kv_heads=3, layers=3, context_length=4000, **windows))
    histories = test_session_histories.Histories(model, (make,), seed)
    while max(histories.session.lengths) < 320:
        actions = histories.prefill, histories.decode, histories.verify, histories.rollback
        histories.dice.choices(actions, (3, 3, 4, 1))[0]()
        assert histories.session.lengths == [len(text) for text in histories.texts]


def test_drafts_longer_than_the_slack_are_refused() -> None:
    Recipe(cache="duo-attention", decoding=f"prompt-lookup:tokens={DRAFTED}")
    with pytest.raises(UsageError, match=f"cache=duo-attention can take back {DRAFTED}"):
        Recipe(cache="duo-attention", decoding=f"prompt-lookup:tokens={DRAFTED + 1}")


@pytest.mark.parametrize("fast", [False, True])
def test_a_step_that_is_given_up_leaves_nothing_behind(fast: bool) -> None:
    model, tokens = random_transformer(CONFIG), random_tokens(100)
    session, clean = (session_of(model, runner=None if fast else general(model)) for _ in range(2))
    for each in (session, clean):
        each.prefill([tokens])
    for start in range(0, 40, 8):
        session.verify([DraftTree(tokens[start : start + 8], list(range(-1, 7)))])  # never committed
    torch.testing.assert_close(session.decode([1]), clean.decode([1]), atol=1e-5, rtol=1e-5)
    assert session.lengths == [101]


# ── memory ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_bytes_are_those_of_full_heads_and_of_short_ones() -> None:
    """2·b·D·(ΣHf·T + ΣHs·(S + R + slack)): 5 of the 9 heads keep everything."""
    model = random_transformer(CONFIG)
    session = session_of(model, capacity=1000)
    session.prefill([random_tokens(900)])
    cache = session.cache
    assert isinstance(cache, DuoAttentionCache) and int(cache.retrieval.sum()) == 5
    short = SINKS + WINDOW + 2 * DRAFTED
    assert cache.nbytes == 2 * 4 * 8 * (5 * 1000 + 4 * short) == sum(pool.storage.nbytes for pool in cache.pools)
    for token in random_tokens(60):
        session.decode([token])
    assert cache.nbytes == 2 * 4 * 8 * (5 * 1000 + 4 * short)
    full = FullCache(CONFIG, 1, 1000, torch.float32, CPU)
    assert cache.nbytes / full.nbytes == pytest.approx(5 / 9, abs=0.025)


def test_without_retrieval_heads_memory_is_flat() -> None:
    model = random_transformer(CONFIG)
    session = session_of(model, sparsity=1.0)
    session.prefill([random_tokens(300)])
    held = session.cache.nbytes
    session.prefill([random_tokens(500)])
    for token in random_tokens(60):
        session.decode([token])
    assert session.cache.nbytes == held and session.lengths == [860]
    kept = session.cache.positions(0).tolist()
    assert set(range(SINKS)) | set(range(860 - WINDOW, 860)) <= set(kept) and len(kept) <= SINKS + WINDOW + 2 * DRAFTED


# ── settings and adapters ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 1.5}, "duo-attention: sparsity=1.5 is out of range"),
        ({"sinks": -1}, "sinks=-1 is negative"),
        ({"window": 0}, "window=0 keeps nothing"),
        ({"chunk": DRAFTED}, f"chunk={DRAFTED} is too small: use {DRAFTED + 1} or more"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        DuoAttentionConfig(**settings)


def test_gates_of_another_shape_or_none_are_refused() -> None:
    with pytest.raises(CheckpointError, match="3 layers of 3 key heads: found 2 x 3"):
        duo(gates=torch.ones(2, 3))
    with pytest.raises(UsageError, match="run `fewer train duo-attention`"):
        DuoAttentionCache(CONFIG, 1, 8, torch.float32, CPU)


def test_the_noise_follows_its_seed() -> None:
    masks = [duo(gates=torch.ones(3, 3), seed=seed).retrieval for seed in (0, 0, 1, 2, 3)]
    assert torch.equal(masks[0], masks[1]) and any(not torch.equal(masks[0], other) for other in masks[2:])


def test_a_model_in_4_bits_runs_on_gates_from_a_file(tmp_path: Path) -> None:
    from fewer.language_model import load
    from fewer.training import save_adapter
    from tests.tiny_model import write_model

    folder = write_model(tmp_path / "tiny")
    fingerprint = load(folder).checkpoint.fingerprint()
    path = tmp_path / "gates.safetensors"
    save_adapter(path, Adapter({GATES: torch.rand(2, 2)}, Provenance("duo-attention", {}, fingerprint, "a text", 0)))
    model = load(folder, weights="int4", cache=f"duo-attention:sinks=2,window=8,adapter={path}")
    answer = model.generate("the cat sat on the mat and " * 6, raw=True, max_tokens=20)
    assert len(answer.tokens) == 20 or answer.finish_reason == "stop"


def test_shipped_gates_are_of_two_kinds_and_kept_nearly_all_of_the_models_answers() -> None:
    shipped = sorted((adapter_store.SHIPPED / "duo-attention").glob("*.safetensors"))
    assert shipped
    for path in shipped:
        adapter = load_adapter(path, "duo-attention")
        gates, metrics = adapter.tensors[GATES], adapter.provenance.metrics
        assert ((gates >= 0) & (gates <= 1)).all()
        assert ((gates < 0.1) | (gates > 0.9)).float().mean() > 0.6  # few in between
        assert gates.min() < 0.2 and gates.max() > 0.9
        assert metrics["distillation"] < 0.05 * metrics["all_streaming"]
        assert 0.2 < metrics["mean_gate"] < 0.9
