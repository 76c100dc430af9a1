"""The generation loop: where texts end, what the session holds then, scores, seeds, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import pytest

from fewer.cache import FullCache, SinkWindowCache, SinkWindowConfig
from fewer.decoding import tree as trees
from fewer.decoding.generate import Counts, Strategy, TokenEvent, generate
from fewer.decoding.prompt_lookup import PromptLookup
from fewer.decoding.sampling import SamplingConfig
from fewer.engine.session import Session
from fewer.errors import UsageError
from tests.decoding.drafters import EachRow, Scripted, chance, oracle
from tests.random_model import config_of, new_session, random_tokens, random_transformer

MODEL = random_transformer()
PROMPTS = [random_tokens(6 + 5 * index, seed=index) for index in range(4)]
GREEDY = SamplingConfig()
HOT = SamplingConfig(temperature=1.3, top_k=20, seed=7)


def collect(
    session: Session,
    prompts: list[list[int]],
    strategy: Strategy | None = None,
    sampling: SamplingConfig = GREEDY,
    max_tokens: int = 40,
    stop_tokens: Collection[int] = (),
    **more: Any,
) -> tuple[list[list[int]], list[str | None], list[TokenEvent]]:
    """Texts, how each ended, and the events."""
    events = list(generate(session, prompts, sampling, strategy, max_tokens, stop_tokens, **more))
    texts: list[list[int]] = [[] for _ in prompts]
    finishes: list[str | None] = [None] * len(prompts)
    for event in events:
        assert event.tokens and finishes[event.row] is None  # nothing comes after the end
        texts[event.row] += event.tokens
        finishes[event.row] = event.finished
    return texts, finishes, events


EXPECTED = collect(new_session(MODEL, 4), PROMPTS)[0]
STRATEGIES: dict[str, Callable[[list[list[int]]], Strategy | None]] = {
    "plain": lambda answers: None,
    "oracle": lambda answers: EachRow(lambda row: oracle(PROMPTS[row], answers[row], 7)),
    "random": lambda answers: EachRow(lambda row: chance(48, row)),
    "mixed": lambda answers: EachRow(lambda row: oracle(PROMPTS[row], answers[row], 2 + row) if row % 2 else None),
}
every_strategy = pytest.mark.parametrize("name", STRATEGIES)


@every_strategy
@pytest.mark.parametrize("rows", [1, 4])
def test_a_stop_token_ends_each_row_where_it_comes(name: str, rows: int) -> None:
    """Rows end at different times, the oracle's inside an accepted draft; the stop token is the last token."""
    stops = {EXPECTED[0][36], EXPECTED[0][15]}
    session = new_session(MODEL, rows)
    texts, finishes, _ = collect(session, PROMPTS[:rows], STRATEGIES[name](EXPECTED), stop_tokens=stops)
    for row in range(rows):
        end = next((place for place, token in enumerate(EXPECTED[row]) if token in stops), None)
        assert texts[row] == (EXPECTED[row] if end is None else EXPECTED[row][: end + 1])
        assert finishes[row] == ("length" if end is None else "stop")
        assert session.lengths[row] == len(PROMPTS[row]) + len(texts[row]) - 1
    assert rows == 1 or len({len(text) for text in texts}) == 4


@every_strategy
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("max_tokens", [1, 2, 7, 8, 12])
def test_max_tokens_ends_a_text_also_inside_a_draft(name: str, rows: int, max_tokens: int) -> None:
    session = new_session(MODEL, rows)
    strategy = STRATEGIES[name](EXPECTED)
    texts, finishes, _ = collect(session, PROMPTS[:rows], strategy, max_tokens=max_tokens)
    assert texts == [text[:max_tokens] for text in EXPECTED[:rows]]
    assert finishes == ["length"] * rows
    assert session.lengths == [len(p) + max_tokens - 1 for p in PROMPTS[:rows]]


@every_strategy
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("context", [21, 24, 30])
def test_the_contexts_end_ends_a_text_also_inside_a_tree(name: str, rows: int, context: int) -> None:
    """As many tokens as the context holds, and one more that never needs to be fed."""
    session = new_session(MODEL, rows, context=context)
    texts, finishes, _ = collect(session, PROMPTS[:rows], STRATEGIES[name](EXPECTED))
    assert texts == [text[: context - len(p) + 1] for p, text in zip(PROMPTS, EXPECTED[:rows], strict=False)]
    assert finishes == ["length"] * rows
    assert session.lengths == [context] * rows


def test_a_stop_token_at_the_last_place_counts_as_a_stop() -> None:
    for rows in (1, 2):
        stop = EXPECTED[0][4]
        assert stop not in EXPECTED[0][:4]
        _, finishes, _ = collect(new_session(MODEL, rows), PROMPTS[:rows], None, max_tokens=5, stop_tokens=[stop])
        assert finishes[0] == "stop"


@every_strategy
def test_a_text_goes_on_where_the_loop_was_left(name: str) -> None:
    """Left after a few tokens, then continued in the same session with the last token as the prompt."""
    session = new_session(MODEL, 1)
    text: list[int] = []
    running = generate(session, PROMPTS[:1], GREEDY, STRATEGIES[name](EXPECTED), 40)
    for event in running:
        text += event.tokens
        if len(text) >= 9:
            break
    running.close()
    assert session.lengths == [len(PROMPTS[0]) + len(text) - 1]
    history = [PROMPTS[0] + text[:-1]]
    rest = [
        Scripted(lambda context, limit: trees.chain(context[-1], EXPECTED[0][len(context) - len(PROMPTS[0]) :][:3]))
    ]
    strategy = None if name == "plain" else EachRow(lambda row: rest[row])
    more, _, _ = collect(session, [text[-1:]], strategy, max_tokens=40 - len(text), history=history)
    assert text + more[0] == EXPECTED[0]
    assert name == "plain" or rest[0].prompt == history[0] + text[-1:]


def test_the_penalty_sees_the_history() -> None:
    sampling = SamplingConfig(repetition_penalty=1.5)
    whole, _, _ = collect(new_session(MODEL), PROMPTS[:1], sampling=sampling, max_tokens=20)
    session = new_session(MODEL)
    session.prefill([PROMPTS[0][:-2]])
    text, _, _ = collect(session, [PROMPTS[0][-2:]], None, sampling, 20, history=[PROMPTS[0][:-2]])
    assert text == whole
    without = new_session(MODEL)
    without.prefill([PROMPTS[0][:-2]])
    assert collect(without, [PROMPTS[0][-2:]], None, sampling, 20)[0] != whole


@every_strategy
@pytest.mark.parametrize("rows", [1, 4])
def test_scores_are_the_models_own_log_probabilities(name: str, rows: int) -> None:
    strategy = STRATEGIES[name](EXPECTED)
    texts, _, events = collect(new_session(MODEL, rows), PROMPTS[:rows], strategy, max_tokens=12, logprobs=True)
    assert texts == [text[:12] for text in EXPECTED[:rows]]
    scores: list[list[float]] = [[] for _ in range(rows)]
    for event in events:
        assert event.logprobs is not None and len(event.logprobs) == len(event.tokens)
        scores[event.row] += event.logprobs
    for prompt, text, score in zip(PROMPTS, texts, scores, strict=False):
        for place in (0, 1, 5, 11):
            logits = new_session(MODEL).prefill([prompt + text[:place]])[0]
            assert score[place] == pytest.approx(float(logits.log_softmax(-1)[text[place]]), abs=1e-4)


def test_a_seed_gives_the_same_text_and_each_row_the_text_it_has_alone() -> None:
    texts, _, _ = collect(new_session(MODEL, 4), PROMPTS, None, HOT)
    assert collect(new_session(MODEL, 4), PROMPTS, None, HOT)[0] == texts
    for row, prompt in enumerate(PROMPTS):
        own = SamplingConfig(temperature=1.3, top_k=20, seed=7 + row)
        assert collect(new_session(MODEL), [prompt], None, own)[0] == [texts[row]]
    assert collect(new_session(MODEL, 4), PROMPTS, None, SamplingConfig(temperature=1.3, top_k=20, seed=70))[0] != texts


def test_deterministic_drafts_do_not_even_change_a_sampled_text() -> None:
    """Sample and match spends one random number a token, as plain decoding does: the same seed, the same text."""
    texts, _, _ = collect(new_session(MODEL, 4), PROMPTS, None, HOT)
    guided, _, _ = collect(new_session(MODEL, 4), PROMPTS, STRATEGIES["oracle"](texts), HOT)
    assert guided == texts
    assert collect(new_session(MODEL, 4), PROMPTS, PromptLookup(), HOT)[0] == texts


@every_strategy
def test_counts_add_up(name: str) -> None:
    counts = Counts()
    session = new_session(MODEL, 4)
    texts, _, events = collect(
        session, PROMPTS, STRATEGIES[name](EXPECTED), stop_tokens=[EXPECTED[2][9]], counts=counts
    )
    assert counts.emitted == sum(map(len, texts)) - 4  # the prefill's tokens are not counted
    assert counts.target_passes == len(events) - 4
    assert counts.emitted <= counts.target_passes + counts.accepted
    assert counts.accepted <= counts.drafted
    alone = Counts()
    collect(new_session(MODEL), PROMPTS[:1], None, counts=alone)
    assert (alone.target_passes, alone.emitted, alone.tau) == (39, 39, 1.0)
    assert Counts().tau == 1.0 and Counts().draft_efficiency == 0.0


def test_a_drafter_that_ignores_the_limit_is_cut() -> None:
    """Also where a window bounds how many tokens one step may bring."""
    config = config_of(context_length=1000)
    model, cache = random_transformer(config), (SinkWindowCache, SinkWindowConfig(2, 14))
    prompt = random_tokens(300)
    expected, _, _ = collect(new_session(model, 1, *cache), [prompt], max_tokens=400)
    greedy = Scripted(lambda context, limit: trees.chain(context[-1], expected[0][len(context) - 300 :][:300]))
    counts = Counts()
    session = new_session(model, 1, *cache)
    texts, _, _ = collect(session, [prompt], EachRow(lambda row: greedy), max_tokens=400, counts=counts)
    assert texts == expected
    assert counts.tau > 90 and session.cache.max_step == 128


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class OneWay(FullCache):
    """A cache that cannot take anything back."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.slack = 0


def test_speculation_with_a_cache_that_cannot_roll_back_is_refused() -> None:
    session = new_session(MODEL, 1, OneWay)
    with pytest.raises(UsageError, match="cannot take back rejected guesses: use decoding=plain or cache=full"):
        collect(session, PROMPTS[:1], PromptLookup())
    assert session.lengths == [0]
    assert collect(session, PROMPTS[:1])[0] == EXPECTED[:1]


@pytest.mark.parametrize("max_tokens", [0, -3])
def test_max_tokens_below_one_is_refused(max_tokens: int) -> None:
    with pytest.raises(UsageError, match=f"max_tokens is {max_tokens}: ask for at least 1"):
        collect(new_session(MODEL), PROMPTS[:1], max_tokens=max_tokens)


@pytest.mark.parametrize("prompts", [[], [[]], [[1], []]])
def test_empty_prompts_are_refused(prompts: list[list[int]]) -> None:
    with pytest.raises(UsageError, match="a prompt is empty"):
        collect(new_session(MODEL, max(len(prompts), 1)), prompts)


def test_a_prompt_longer_than_the_context_is_one_sentence() -> None:
    with pytest.raises(UsageError, match="21 tokens do not fit the model's context of 20"):
        collect(new_session(MODEL, context=20), [random_tokens(21)])


def test_a_drafter_that_breaks_its_contract_is_named() -> None:
    broken = Scripted(lambda context, limit: trees.chain(context[-1], [48]))
    with pytest.raises(ValueError, match="node 1 of a draft tree is token 48 of 48"):
        collect(new_session(MODEL), PROMPTS[:1], EachRow(lambda row: broken))
    elsewhere = Scripted(lambda context, limit: trees.chain((context[-1] + 1) % 48, [1]))
    with pytest.raises(ValueError, match="starts at token"):
        collect(new_session(MODEL), PROMPTS[:1], EachRow(lambda row: elsewhere))
