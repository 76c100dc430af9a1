"""The paged cache gives the numbers of `full`, stores a common beginning once, and refuses what does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fewer.cache import FullCache, PagedCache, PagedConfig
from fewer.decoding.generate import generate
from fewer.decoding.prompt_lookup import PromptLookup
from fewer.decoding.sampling import SamplingConfig
from fewer.engine.session import Session
from fewer.errors import NumericalError, PoolExhausted, UsageError
from fewer.model.config import ModelConfig
from fewer.model.step import Step
from fewer.model.transformer import Transformer
from fewer.registry import parse_spec
from fewer.slots import DraftTree
from tests.random_model import CONFIG, CPU, config_of, new_session, random_tokens, random_transformer

GEMMA = config_of(sliding_window=20, sliding_layers=(True, False, True), attention_softcap=8.0, local_rope_theta=500.0)
CONFIGS = {
    "gqa": CONFIG,
    "mqa-nope": config_of(kv_heads=1, rope_layers=(True, False, True)),
    "windows": config_of(sliding_window=20),
    "local-and-global": GEMMA,
}
MODELS = {name: random_transformer(config) for name, config in CONFIGS.items()}
every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
TREE = DraftTree([5, 6, 7, 8, 9, 10], [-1, 0, 0, 2, 1, 3])


def pair(model: Transformer, batch: int = 1, size: int = 16, chunk: int = 512) -> tuple[Session, Session]:
    """The same empty batch with the paged cache and with the full one."""
    sessions = new_session(model, batch, PagedCache, PagedConfig(size)), new_session(model, batch, FullCache)
    for session in sessions:
        session.runner.chunk = chunk
    return sessions


def close(paged: torch.Tensor, full: torch.Tensor) -> None:
    torch.testing.assert_close(paged, full, atol=1e-5, rtol=1e-5)


def pool_of(session: Session) -> Any:
    assert isinstance(session.cache, PagedCache)
    return session.cache.pool


# ── the same numbers ─────────────────────────────────────────────────────────────────────────────────────────────────


@every_model
@pytest.mark.parametrize("chunk", [7, 512])
@pytest.mark.parametrize("size", [16, 32, 64])
def test_prefill_and_decoding_of_ragged_rows_equal_full(model: Transformer, chunk: int, size: int) -> None:
    paged, full = pair(model, 3, size, chunk)
    prompts = [random_tokens(n, seed=n) for n in (70, 3, 33)]
    close(paged.prefill(prompts), full.prefill(prompts))
    for step in range(20):
        tokens, active = random_tokens(3, seed=step), [step % 3 != 0, True, step < 9]
        on = [row for row, flag in enumerate(active) if flag]
        close(paged.decode(tokens, active)[on], full.decode(tokens, active)[on])
    assert paged.lengths == full.lengths
    close(paged.prefill(prompts[::-1]), full.prefill(prompts[::-1]))  # a second turn


@every_model
def test_trees_commits_and_rollbacks_equal_full(model: Transformer) -> None:
    paged, full = pair(model, 2)
    prompts = [random_tokens(30, seed=1), random_tokens(14, seed=2)]
    close(paged.prefill(prompts), full.prefill(prompts))
    for path in ([0, 2, 3, 5], [0, 1, 4], [0], []):
        trees: list[DraftTree | None] = [TREE, None]
        paged_logits, full_logits = paged.verify(trees), full.verify(trees)
        assert paged_logits[0] is not None and full_logits[0] is not None
        close(paged_logits[0], full_logits[0])
        for session in (paged, full):
            session.commit([path, []])
        close(paged.decode([3, 4]), full.decode([3, 4]))
    for session in (paged, full):
        session.rollback([33, 15])
    close(paged.decode([7, 8]), full.decode([7, 8]))
    assert paged.lengths == full.lengths == [34, 16]
    assert [len(pages) for pages in pool_of(paged).rows] == [3, 1]
    assert paged.cache.positions(0).tolist() == list(range(34))


def test_one_row_is_the_same_to_the_bit() -> None:
    paged, full = pair(MODELS["gqa"])
    assert torch.equal(paged.prefill([random_tokens(50)]), full.prefill([random_tokens(50)]))
    trees: list[DraftTree | None] = [TREE]
    ours, theirs = paged.verify(trees)[0], full.verify(trees)[0]
    assert ours is not None and theirs is not None
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("strategy", [None, PromptLookup()])
def test_a_batch_generates_what_it_generates_with_full(strategy: PromptLookup | None) -> None:
    common = random_tokens(40, seed=3)
    prompts = [common + random_tokens(n, seed=n) for n in (1, 9, 24)]
    texts = []
    for session in pair(MODELS["local-and-global"], 3):
        rows: list[list[int]] = [[], [], []]
        for event in generate(session, prompts, SamplingConfig(), strategy, max_tokens=60):
            rows[event.row] += event.tokens
        texts.append(rows)
    assert texts[0] == texts[1]


def test_tokens_that_skip_a_layer_are_seen_by_nobody_there() -> None:
    model, tokens = MODELS["gqa"], random_tokens(40)
    plan = torch.rand(1, 40, 3, generator=torch.Generator().manual_seed(0)) < 0.6
    plan[0, :, 2] = False  # nobody runs the last layer
    plan[0, 0] = True
    outputs = []
    for session in pair(model):
        session.cache.reserve(41)
        step = Step(torch.tensor([tokens]), torch.arange(40)[None], layer_plan=plan, logits="all")
        logits = session.runner.step(step, session.cache).logits
        session.cache.commit([[*range(10), *range(20, 40)]])
        assert logits is not None
        outputs.append(torch.cat([logits[0], session.decode([4])]))
    close(outputs[0], outputs[1])


# ── what is shared ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("chunk", [7, 16, 512])
def test_a_common_beginning_is_stored_once(chunk: int) -> None:
    """P tokens of prefix and S of each row's own take P + B·S, in whole pages."""
    batch, prefix, own = 4, 64, 32
    paged, full = pair(MODELS["gqa"], batch, chunk=chunk)
    prompts = [random_tokens(prefix, seed=1) + random_tokens(own, seed=2 + row) for row in range(batch)]
    close(paged.prefill(prompts), full.prefill(prompts))
    pool = pool_of(paged)
    assert pool.owned == (prefix + batch * own) // 16
    assert [pool.owners.count(owners) for owners in (1, batch)] == [batch * own // 16, prefix // 16]
    assert all(row[: prefix // 16] == pool.rows[0][: prefix // 16] for row in pool.rows)
    for step in range(20):
        tokens = random_tokens(batch, seed=step)
        close(paged.decode(tokens), full.decode(tokens))
    assert pool.owned == (prefix + batch * own) // 16 + 2 * batch
    assert paged.cache.nbytes == pool.storage.nbytes + pool.table.nbytes < 0.8 * full.cache.nbytes
    for row in range(batch):
        paged.cache.truncate(row, 0)
    assert pool.owned == 0


@pytest.mark.parametrize("chunk", [24, 512])
@every_model
def test_a_common_beginning_is_computed_by_one_row(model: Transformer, chunk: int) -> None:
    """A tree: 64 tokens of all rows, 32 more of two pairs; the other tokens of each row are fed in one batch."""
    paged, full = pair(model, 5, chunk=chunk)
    common, branches = random_tokens(70, seed=1), [random_tokens(40, seed=seed) for seed in (2, 3)]
    prompts = [common + branches[row % 2] + random_tokens(3 + row, seed=9 + row) for row in range(4)] + [common]
    fed: list[int] = []
    run = paged.runner.step

    def counting(step: Step, cache: Any) -> Any:
        fed.append(step.positions.numel() if step.lengths is None else sum(step.lengths))
        return run(step, cache)

    paged.runner.step = counting  # type: ignore[method-assign]
    close(paged.prefill(prompts), full.prefill(prompts))
    assert sum(fed) == 64 + 2 * 32 + sum(len(prompt) - 96 for prompt in prompts[:4]) + 6
    assert pool_of(paged).owned == 4 + 2 * 2 + 4 * 2 + 1
    assert paged.cache.positions(3).tolist() == list(range(len(prompts[3])))
    for step in range(6):
        tokens = random_tokens(5, seed=step)
        close(paged.decode(tokens), full.decode(tokens))


def test_a_prompt_that_comes_later_finds_the_pages_that_are_there() -> None:
    paged, full = pair(MODELS["gqa"], 2)
    prompt = random_tokens(48)
    # Row 1 begins with something else, is emptied, and then gets row 0's text.
    for session in (paged, full):
        session.prefill([prompt, [1]])
        session.rollback([48, 0])
        session.rollback([40, 0])  # in the middle of a page that stays whole
    assert pool_of(paged).owned == 3
    close(paged.prefill([[5], prompt])[1], full.prefill([[5], prompt])[1])
    assert pool_of(paged).rows[0][:2] == pool_of(paged).rows[1][:2]
    assert pool_of(paged).rows[0][2] != pool_of(paged).rows[1][2]
    close(paged.decode([6, 7]), full.decode([6, 7]))


def test_a_row_that_goes_back_into_common_pages_copies_before_it_writes() -> None:
    paged, full = pair(MODELS["gqa"], 2)
    prompt = random_tokens(64)
    for session in (paged, full):
        session.prefill([prompt, prompt])
        session.rollback([40, 64])
    assert pool_of(paged).owned == 4
    for step in range(12):
        tokens = random_tokens(2, seed=step)
        close(paged.decode(tokens), full.decode(tokens))
    assert pool_of(paged).owned == 4 + 2 + 1


def test_soft_tokens_and_generated_ones_are_not_taken_for_a_prompt() -> None:
    paged, _ = pair(MODELS["gqa"], 2)
    paged.prefill_embeddings([torch.randn(32, CONFIG.hidden_size), torch.randn(32, CONFIG.hidden_size)])
    assert pool_of(paged).owned == 4
    paged.prefill([random_tokens(32), random_tokens(32)])
    assert pool_of(paged).owned == 8


def test_a_prompt_cut_into_a_choice_of_its_tokens_leaves_others_alone() -> None:
    paged, full = pair(MODELS["gqa"], 2)
    prompt = torch.tensor([random_tokens(48)] * 2)
    for session in (paged, full):
        session.cache.reserve(48)
        session.runner.step(Step(prompt, torch.arange(48).expand(2, -1)), session.cache)
        session.cache.commit([48, [*range(10), *range(20, 48)]])
    for step in range(4):
        tokens = random_tokens(2, seed=step)
        close(paged.decode(tokens), full.decode(tokens))


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_pool_that_is_used_up_refuses_the_step_and_keeps_what_it_holds() -> None:
    model = MODELS["gqa"]
    paged = new_session(model, 2, PagedCache, PagedConfig(16, pages=5))
    full = new_session(model, 2)
    prompts = [random_tokens(31, seed=1), random_tokens(48, seed=2)]
    for session in (paged, full):
        session.prefill(prompts)
    with pytest.raises(
        PoolExhausted, match="5 pages .16 tokens each. is used up: this step needs 1 more and 0 are free"
    ):
        paged.decode([1, 2])
    assert paged.lengths == [31, 48] and pool_of(paged).owned == 5
    close(paged.decode([1, 2], [True, False])[:1], full.decode([1, 2], [True, False])[:1])
    paged.rollback([0, 48])  # one sequence fewer
    full.rollback([0, 48])
    close(paged.decode([1, 2], [False, True])[1:], full.decode([1, 2], [False, True])[1:])


def test_a_row_that_never_fits_is_refused_before_a_pass() -> None:
    paged = new_session(MODELS["gqa"], 1, PagedCache, PagedConfig(16, pages=4))
    with pytest.raises(
        PoolExhausted, match="a row of 65 tokens takes 5 pages of 16 tokens, and the cache's pool has 4"
    ):
        paged.prefill([random_tokens(65)])
    assert pool_of(paged).owned == 0
    paged.prefill([random_tokens(64)])


def test_a_failed_pass_leaves_no_trace_not_even_among_the_shared_pages() -> None:
    model = random_transformer(CONFIG)
    paged, full = pair(model, 2, chunk=24)
    prompts = [random_tokens(40), random_tokens(40)]
    norm = model.norm.clone()
    model.norm.fill_(torch.nan)
    with pytest.raises(NumericalError):
        paged.prefill(prompts)
    model.norm.copy_(norm)
    assert pool_of(paged).owned == 0 and paged.lengths == [0, 0]
    pool_of(paged).storage.fill_(torch.nan)  # as a pass that broke in a layer would
    for session in (paged, full):
        session.rollback([0, 0])
    close(paged.prefill(prompts), full.prefill(prompts))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("paged:page_size=8", "page_size=8 is out of range: use 16 to 64"),
        ("paged:page_size=65", "page_size=65 is out of range"),
        ("paged:pages=-1", "pages=-1 is negative"),
    ],
)
def test_settings_out_of_range_are_refused(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_spec("cache", spec)


def test_memory_is_one_row_at_first_and_what_is_owned_later() -> None:
    config: ModelConfig = config_of(context_length=4096)
    cache = PagedCache(config, 8, 320, torch.bfloat16, CPU, PagedConfig(32))
    assert cache.pool.pages == 10 and cache.slack is None and cache.keys_rotated
    assert cache.nbytes == 10 * 32 * config.kv_bytes_per_token(2) + cache.pool.table.nbytes
