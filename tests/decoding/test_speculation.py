"""Greedy speculation emits exactly the plain tokens, whatever is drafted and whatever the cache is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fewer.cache import FullCache, SinkWindowCache, SinkWindowConfig
from fewer.decoding.draft_model import ChainDrafter
from fewer.decoding.generate import Counts, Strategy, generate
from fewer.decoding.prompt_lookup import NgramDrafter, PromptLookup, PromptLookupConfig
from fewer.decoding.sampling import DRAFT_STREAM, Sampler, SamplingConfig
from fewer.model.transformer import Transformer
from fewer.slots import Drafter
from tests.decoding.drafters import EachRow, adversary, chance, oracle
from tests.random_model import CONFIG, config_of, new_session, random_tokens, random_transformer

PROMPTS = [random_tokens(4 + index % 23, seed=index) for index in range(52)]
TOKENS = 64
VOCAB = CONFIG.vocab_size
GREEDY = SamplingConfig()


def run(
    model: Transformer,
    prompts: list[list[int]],
    strategy: Strategy | None = None,
    sampling: SamplingConfig = GREEDY,
    max_tokens: int = TOKENS,
    cache: tuple[Any, ...] = (FullCache,),
    counts: Counts | None = None,
) -> list[list[int]]:
    session = new_session(model, len(prompts), *cache)
    texts: list[list[int]] = [[] for _ in prompts]
    for event in generate(session, prompts, sampling, strategy, max_tokens, counts=counts):
        texts[event.row] += event.tokens
    # The session holds all of each text but its last token.
    assert session.lengths == [len(p) + len(t) - 1 for p, t in zip(prompts, texts, strict=True)]
    return texts


def draft_of(model: Transformer, tokens: int, row: int = 0, sampling: SamplingConfig = GREEDY) -> Drafter:
    return ChainDrafter(new_session(model), Sampler(sampling, row, DRAFT_STREAM), tokens, VOCAB)


CACHES: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    "gqa": ({}, (FullCache,)),
    "mha": ({"kv_heads": 4}, (FullCache,)),
    "windows": ({"sliding_window": 12}, (FullCache,)),
    "local-and-global": ({"sliding_window": 12, "sliding_layers": (True, False, True)}, (FullCache,)),
    "sink-window": ({}, (SinkWindowCache, SinkWindowConfig(2, 14))),
    "renumbered": ({}, (SinkWindowCache, SinkWindowConfig(2, 14, True))),
}


@pytest.fixture(scope="module")
def plain() -> Callable[[str], tuple[Transformer, list[list[int]]]]:
    """The model of a case and its plain answers to PROMPTS."""
    known: dict[str, tuple[Transformer, list[list[int]]]] = {}

    def answers(name: str) -> tuple[Transformer, list[list[int]]]:
        if name not in known:
            changes, cache = CACHES[name]
            model = random_transformer(config_of(**changes))
            known[name] = model, run(model, PROMPTS, cache=cache)
        return known[name]

    return answers


@pytest.mark.parametrize("name", CACHES)
def test_every_drafter_gives_the_plain_tokens(name: str, plain: Any) -> None:
    """52 prompts of 64 tokens in one batch; neighbouring rows draft in different ways."""
    model, expected = plain(name)

    def make(row: int) -> Drafter | None:
        kinds = [
            lambda: oracle(PROMPTS[row], expected[row], 1 + row % 7),
            lambda: chance(VOCAB, row),
            lambda: adversary(PROMPTS[row], expected[row], VOCAB),
            lambda: NgramDrafter(PromptLookupConfig()),
            lambda: None,
        ]
        return kinds[row % len(kinds)]()

    assert run(model, PROMPTS, EachRow(make), cache=CACHES[name][1]) == expected


def test_plain_rows_of_a_batch_equal_single_runs(plain: Any) -> None:
    model, expected = plain("gqa")
    for row in (0, 7, 22):
        assert run(model, [PROMPTS[row]]) == [expected[row]]


@pytest.mark.parametrize("tokens", [1, 5])
def test_an_oracle_yields_its_tokens_and_one_more_each_pass(tokens: int, plain: Any) -> None:
    model, expected = plain("gqa")
    counts, length = Counts(), 1 + 6 * (tokens + 1)
    strategy = EachRow(lambda row: oracle(PROMPTS[row], expected[row], tokens))
    texts = run(model, PROMPTS, strategy, max_tokens=length, counts=counts)
    assert texts == [answer[:length] for answer in expected]
    assert counts.tau == tokens + 1
    assert counts.draft_efficiency == 1.0
    assert (counts.target_passes, counts.emitted) == (6 * 52, 6 * 52 * (tokens + 1))
    heard = [drafter.heard for drafter in strategy.made.values()]  # type: ignore[union-attr]
    assert heard == [text[1 : length - tokens - 1] for text in texts]  # the last round ends the text: nobody is told


def test_random_guesses_cost_passes_but_not_the_text(plain: Any) -> None:
    model, expected = plain("gqa")
    counts = Counts()
    assert run(model, PROMPTS, EachRow(lambda row: chance(VOCAB, row)), counts=counts) == expected
    assert 1.0 <= counts.tau < 1.2
    assert counts.emitted == 52 * (TOKENS - 1)
    assert counts.accepted < 0.1 * counts.drafted


def test_the_same_model_as_draft_is_an_oracle(plain: Any) -> None:
    model, expected = plain("gqa")
    counts, rows = Counts(), 12
    strategy = EachRow(lambda row: draft_of(model, 4))
    assert run(model, PROMPTS[:rows], strategy, max_tokens=61, counts=counts) == [text[:61] for text in expected[:rows]]
    assert counts.tau == 5.0


@pytest.mark.parametrize("name", ["gqa", "windows"])
def test_another_model_as_draft_gives_the_plain_tokens(name: str, plain: Any) -> None:
    model, expected = plain(name)
    other = random_transformer(config_of(layers=1), seed=8)
    strategy = EachRow(lambda row: draft_of(other, 1 + row))
    texts = run(model, PROMPTS[:6], strategy, max_tokens=40)
    assert texts == [text[:40] for text in expected[:6]]


def test_a_noised_copy_as_draft_is_accepted_in_part(plain: Any) -> None:
    model, expected = plain("gqa")
    noisy = random_transformer()
    for layer in noisy.layers:
        layer.feed_forward.down.format.weight.mul_(0.93)  # type: ignore[union-attr]
    counts = Counts()
    strategy = EachRow(lambda row: draft_of(noisy, 3))
    assert run(model, PROMPTS[:8], strategy, max_tokens=48, counts=counts) == [text[:48] for text in expected[:8]]
    assert 0 < counts.accepted < counts.drafted


def test_a_draft_model_forgets_rejected_guesses() -> None:
    """However much of each draft was accepted, the next one is what a draft model fresh to the text proposes."""
    model = random_transformer(seed=3)
    drafter, context = draft_of(model, 4), list(PROMPTS[3])
    drafter.start(context)
    for accepted in (0, 4, 2, 0, 3, 1, 4):
        draft, fresh = drafter.propose(context, 9), draft_of(model, 4)
        fresh.start(context)
        assert draft.tokens == fresh.propose(context, 9).tokens and len(draft.tokens) == 5
        tokens = [*draft.tokens[1 : accepted + 1], random_tokens(1, seed=accepted)[0]]
        drafter.accept(tokens)
        context += tokens


def test_a_draft_with_a_shorter_context_stops_guessing_there(plain: Any) -> None:
    model, expected = plain("gqa")
    short = random_transformer(config_of(context_length=30))
    assert run(model, PROMPTS[:2], EachRow(lambda row: draft_of(short, 4))) == expected[:2]


def test_a_draft_with_fewer_rows_never_meets_a_token_that_it_lacks() -> None:
    """Vocabularies are padded to different sizes; the target may still emit one of its unused rows."""
    model, small = random_transformer(), random_transformer(config_of(vocab_size=40))
    prompt = [5, 44, 6]
    expected = run(model, [prompt], max_tokens=40)
    assert max(expected[0]) >= 40
    assert run(model, [prompt], EachRow(lambda row: draft_of(small, 3)), max_tokens=40) == expected


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_the_repetition_penalty_sees_each_path(penalty: float) -> None:
    model, sampling = random_transformer(), SamplingConfig(repetition_penalty=penalty)
    prompts = PROMPTS[:6]
    expected = run(model, prompts, sampling=sampling, max_tokens=40)
    assert expected != run(model, prompts, max_tokens=40)
    drafters: list[Callable[[int], Drafter]] = [
        lambda row: oracle(prompts[row], expected[row], 4),
        lambda row: adversary(prompts[row], expected[row], VOCAB),
        lambda row: draft_of(model, 3, row, sampling),
    ]
    for make in drafters:
        assert run(model, prompts, EachRow(make), sampling, 40) == expected


def test_logits_in_bfloat16_differ_only_where_the_plain_decoder_wavers() -> None:
    """In bfloat16 a pass over several tokens rounds differently: a difference needs two nearly equal logits."""
    model = random_transformer(dtype=torch.bfloat16)
    prompts = PROMPTS[:20]
    expected = run(model, prompts, max_tokens=40)
    texts = run(model, prompts, EachRow(lambda row: oracle(prompts[row], expected[row], 5)), max_tokens=40)
    for prompt, text, wanted in zip(prompts, texts, expected, strict=True):
        if text != wanted:
            place = next(i for i, pair in enumerate(zip(text, wanted, strict=True)) if pair[0] != pair[1])
            logits = new_session(model).prefill([[*prompt, *wanted[:place]]])[0]
            first, second = logits.topk(2).values
            assert float(first - second) < 1e-2 * float(logits.max() - logits.min())


def test_prompt_lookup_copies_what_followed_the_longest_match() -> None:
    drafter = NgramDrafter(PromptLookupConfig(tokens=4, max_ngram=2))
    drafter.start([1, 2, 3, 9, 2, 5, 1])
    assert drafter.propose([1, 2, 3, 9, 2, 5, 1, 2], 10).tokens == [2, 3, 9, 2, 5]  # after "1 2", not after "2"
    assert drafter.propose([1, 2, 3, 9, 2, 5, 1, 2, 7], 10).tokens == [7]
    assert drafter.propose([1, 2, 3, 9, 2, 5, 1, 2, 7, 2], 2).tokens == [2, 7, 2]  # the latest "2", cut to the limit


def test_prompt_lookup_runs_into_its_own_copy() -> None:
    drafter = NgramDrafter(PromptLookupConfig(tokens=6))
    drafter.start([4, 8])
    assert drafter.propose([4, 8, 4], 10).tokens == [4, 8, 4, 8, 4, 8, 4]


def test_prompt_lookup_forgets_the_text_before() -> None:
    drafter = PromptLookup().drafter(GREEDY, 0)
    assert drafter is not None
    drafter.start([1, 2, 3])
    drafter.start([3, 3, 1])
    assert drafter.propose([3, 3, 1], 5).tokens == [1]
