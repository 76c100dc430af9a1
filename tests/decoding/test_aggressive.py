"""Aggressive decoding: exact whatever is copied, few rounds where an answer repeats its source, cheap where not."""

from __future__ import annotations

from statistics import mean
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewer.cache import FullCache, SinkWindowCache, SinkWindowConfig
from fewer.decoding.aggressive import Aggressive, AggressiveConfig
from fewer.decoding.copy_drafter import CopyDrafter, CopySettings
from fewer.decoding.copy_source import CopySource
from fewer.decoding.draft_gate import PassCost
from fewer.decoding.generate import Counts
from fewer.decoding.sampling import SamplingConfig
from fewer.errors import UsageError
from fewer.recipe import Recipe
from fewer.slots import Drafter
from tests.decoding.copying import decode, edited, source_text
from tests.decoding.drafters import EachRow
from tests.decoding.test_speculation import run
from tests.random_model import random_tokens, random_transformer

PAPER = CopySettings(max_ngram=3, block="whole")
SETTINGS = {
    "adaptive": CopySettings(),
    "cheap-passes": CopySettings(pass_cost=0.02),
    "paper": PAPER,
    "nearest": CopySettings(resync="nearest"),
    "same-index": CopySettings(resync="index"),
    "widest": CopySettings(tokens=63, block="whole", max_ngram=1),
}
HOT = SamplingConfig(temperature=1.3, top_k=20, seed=7)
MODEL = random_transformer()


class Told(CopyDrafter):
    """Copies from a text that it is given."""

    def __init__(self, config: CopySettings, source: list[int]):
        self.told = source
        super().__init__(config, PassCost())

    def start(self, prompt: Any) -> None:
        super().start(prompt)
        self.source = CopySource(self.told, self.settings.max_ngram)


# ── exactness ────────────────────────────────────────────────────────────────────────────────────────────────────────

PROMPTS = [random_tokens(5 + index % 19, seed=index) * (1 + index % 3) for index in range(100)]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return run(MODEL, PROMPTS, max_tokens=60)


@pytest.mark.parametrize("name", SETTINGS)
def test_greedy_text_is_the_plain_one_from_the_prompt_and_from_edited_answers(
    name: str, expected: list[list[int]]
) -> None:
    """100 prompts: a third copies the prompt, a third the answer with edits, a third unrelated tokens."""

    def make(row: int) -> Drafter:
        config = SETTINGS[name]
        if row % 3 == 0:
            return CopyDrafter(config, PassCost())
        return Told(
            config,
            edited(expected[row], 4, "sid", row, range(48)) if row % 3 == 1 else random_tokens(80, seed=row + 500),
        )

    counts = Counts()
    assert run(MODEL, PROMPTS, EachRow(make), max_tokens=60, counts=counts) == expected
    assert counts.accepted > 200


@pytest.mark.parametrize("cache", [(FullCache,), (SinkWindowCache, SinkWindowConfig(2, 14))], ids=["full", "window"])
def test_sampled_text_is_the_plain_one_of_the_same_seed(cache: tuple[Any, ...]) -> None:
    """A copy is no chance, and each emitted token takes one random number: so not only the law is the target's."""
    plain = run(MODEL, PROMPTS[:40], sampling=HOT, cache=cache)

    def make(row: int) -> Drafter:
        return Told(PAPER if row % 2 else CopySettings(), edited(plain[row], 5, "sid", row, range(48)))

    counts = Counts()
    assert run(MODEL, PROMPTS[:40], EachRow(make), HOT, cache=cache, counts=counts) == plain
    assert counts.tau > 1.5


# ── rounds ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_answer_that_repeats_the_source_takes_one_round() -> None:
    source = [7, *range(100, 160)]
    rounds = decode(CopySettings(tokens=63, block="whole"), source, source)
    assert (rounds.passes, rounds.emitted) == (1, len(source))


@pytest.mark.parametrize("config", [PAPER, CopySettings()], ids=["paper", "adaptive"])
def test_rounds_grow_linearly_with_the_edits(config: CopySettings) -> None:
    """No more than those of an untouched copy, and a few for each edit: the one that breaks off, and the resync."""

    def passes(edits: int) -> float:
        sources = [source_text(200, seed) for seed in range(20)]
        return mean(
            decode(config, source, edited(source, edits, "s", seed)).passes for seed, source in enumerate(sources)
        )

    untouched, each = passes(0), [passes(edits) / edits - passes(0) / edits for edits in (4, 8, 16)]
    assert untouched < 200 / 6
    assert max(each) < 5.5 and max(each) < 2 * min(each)


def test_more_overlap_is_faster_and_unrelated_text_costs_little() -> None:
    """Passes whose further tokens cost 0.4 of the first each, as on a CPU: 32 rows could be 2.4 times as fast."""

    def speed(edits: int) -> float:
        sources = [source_text(150, seed) for seed in range(20)]
        return mean(decode(CopySettings(), s, edited(s, edits, "sid", n)).speed for n, s in enumerate(sources))

    speeds = [speed(edits) for edits in (0, 3, 8, 20)]
    assert speeds == sorted(speeds, reverse=True)
    assert speeds[0] > 2.1 and speeds[1] > 1.6 and speeds[3] > 1.1
    unrelated = [decode(CopySettings(), source_text(150, n), source_text(150, n + 100)) for n in range(20)]
    assert mean(rounds.tau for rounds in unrelated) < 1.1 and mean(rounds.speed for rounds in unrelated) > 0.95
    assert decode(PAPER, source_text(150, 1), source_text(150, 2)).speed < 0.8


def test_going_on_at_the_same_index_loses_where_tokens_come_and_go() -> None:
    def tau(resync: Any, kinds: str) -> float:
        config = CopySettings(resync=resync, block="whole")
        sources = [source_text(150, seed) for seed in range(20)]
        return mean(decode(config, s, edited(s, 8, kinds, n)).tau for n, s in enumerate(sources))

    assert tau("index", "s") > tau("unique", "s")  # nothing moves: the index is right at once
    assert tau("index", "id") < 0.5 * tau("unique", "id") and tau("index", "id") < 0.5 * tau("nearest", "id")
    assert tau("nearest", "sid") > tau("unique", "sid")


# ── where a copy goes on ─────────────────────────────────────────────────────────────────────────────────────────────


def locate_as_written(source: list[int], text: list[int], longest: int) -> int | None:
    """The paper's search, word for word: n = 1, 2, …; once is a place, never is none, else try n + 1."""
    for n in range(1, longest + 1):
        if len(text) < n:
            return None
        ends = [end for end in range(n, len(source) + 1) if source[end - n : end] == text[-n:]]
        if len(ends) != 1 and (not ends or n == longest):
            return None
        if len(ends) == 1:
            return ends[0]
    return None


token_lists = st.lists(st.integers(0, 3), max_size=12)


@given(source=token_lists, text=token_lists, longest=st.integers(1, 5))
def test_the_unique_place_is_the_papers(source: list[int], text: list[int], longest: int) -> None:
    found = CopySource(source, longest).unique(text)
    assert (None if found is None else found.at) == locate_as_written(source, text, longest)


def test_the_nearest_place_wins_until_a_far_one_matches_longer() -> None:
    source = CopySource([*range(10, 40), 5, 6, 7, *range(40, 300), 1, 2, 5, 6, 7], 8)
    assert source.nearest([9, 6], 33) == (32, 1)
    assert source.nearest([9, 6], 295) == (297, 1)
    assert source.nearest([1, 2, 5], 31) == (296, 3)
    assert source.nearest([999], 31) is None


def test_a_marker_says_where_the_text_to_be_edited_begins() -> None:
    class Bytes:
        eos_tokens = frozenset({0})

        def piece(self, token: int) -> bytes:
            return bytes([token])

    prompt = list(b"Fix this: a cat: sat") + [0, 98]
    drafter = CopyDrafter(CopySettings(source=": ", block="whole"), PassCost(), Bytes())
    drafter.start(prompt)
    assert bytes(drafter.source.tokens[:10]) == b"a cat: sat"
    assert drafter.propose([*prompt, ord("a")], 40).tokens == [*b"a cat: sat", 0]  # and nothing behind the end of text
    unmarked = CopyDrafter(CopySettings(source="Text:", block="whole"), PassCost(), Bytes())
    unmarked.start(prompt)
    assert len(unmarked.source) == len(prompt) and unmarked.place is None


def test_a_drafter_forgets_the_text_before() -> None:
    drafter = Aggressive(AggressiveConfig(max_ngram=3, block="whole")).drafter(SamplingConfig(), 0)
    assert drafter is not None
    for prompt in ([1, 2, 3, 4, 9], [11, 12, 13]):
        drafter.start(prompt)
        guesses = drafter.propose([*prompt, prompt[0]], 5).tokens
        assert guesses == [prompt[0], *prompt[1:]]
    assert drafter.propose([11, 12, 13, 11, 9, 2], 5).tokens == [2]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("tokens=0", "tokens=0 is out of range: use 1 to 63"),
        ("max_ngram=0", "max_ngram=0 is out of range"),
        ("source=", "source is empty"),
        ("pass_cost=9", "pass_cost=9.0 is out of range: use 0 to 2"),
        ("block=long", "choose one of adaptive, whole"),
    ],
)
def test_settings_out_of_range_are_refused(spec: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Recipe(decoding=f"aggressive:{spec}")


def test_a_cache_that_cannot_roll_back_so_far_is_refused_with_what_fits() -> None:
    with pytest.raises(UsageError, match="use decoding=aggressive:tokens=16 or cache=full"):
        Recipe(cache="snapkv", decoding="aggressive")
