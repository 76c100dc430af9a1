"""ADED: the table learns what the paper says, the search visits what the paper's does, and drafts cost no exactness."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fewer.decoding import tree as trees
from fewer.decoding.aded import Aded, AdedConfig, TrigramDrafter
from fewer.decoding.draft_gate import Chances, PassCost, best_length
from fewer.decoding.generate import Counts
from fewer.decoding.sampling import SamplingConfig
from fewer.decoding.trigram_search import SEARCHES, SearchSettings, apportion, flat_visits, search_tree
from fewer.decoding.trigram_table import CAP, TrigramTable, build_table, load_table
from fewer.errors import CheckpointError, FewerError, UsageError
from tests.decoding.test_speculation import GREEDY, PROMPTS, VOCAB, run
from tests.random_model import random_transformer

WIDE = {"gate": False, "tokens": 9}


class Words:
    """A tokenizer whose tokens are words."""

    def __init__(self, words: str) -> None:
        self.vocabulary = SimpleNamespace(tokens=words.split())

    @property
    def vocab_size(self) -> int:
        return len(self.vocabulary.tokens)

    def encode(self, text: str, special: bool = True, bos: bool | None = None) -> list[int]:
        return [self.vocabulary.tokens.index(word) for word in text.split()]


LETTERS = Words("a b c d e")


def random_table(seed: int, vocab: int = 12, keep: float = 0.7) -> TrigramTable:
    """Most pairs are known, with one to eight successors of continuous weights; no token follows itself."""
    dice, table = random.Random(seed), TrigramTable(vocab_size=vocab)
    for a in range(vocab):
        for b in range(vocab):
            if dice.random() < keep:
                for c in dice.sample([c for c in range(vocab) if c != b], dice.randint(1, 8)):
                    table.reward(a, b, c, dice.uniform(0.01, 1.5))
    return table


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_weights_are_shares_of_what_followed_a_pair() -> None:
    table = build_table(LETTERS, ["a b c a b c a b d", "a b", "e a b"])
    assert dict(table.successors(0, 1)) == pytest.approx({2: 2 / 3, 3: 1 / 3})
    assert table.successors(4, 0) == [(1, 1.0)]
    assert table.successors(1, 4) == []  # "b" and "e" stand in two documents


def test_successors_are_the_heaviest_and_ties_go_to_the_lowest_token() -> None:
    table = TrigramTable()
    for token in (9, 4, 7):
        table.reward(1, 2, token, 0.5)
    table.reward(1, 2, 8, 0.75)
    assert [token for token, _ in table.successors(1, 2)] == [8, 4, 7, 9]
    for token in range(20, 40):
        table.reward(1, 2, token, 1.0)
    assert [token for token, _ in table.successors(1, 2)] == list(range(20, 32))


def test_each_round_rewards_the_window_and_a_weight_is_capped() -> None:
    drafter = Aded(AdedConfig(prompt=False, window=4)).drafter(GREEDY, 0)
    assert isinstance(drafter, TrigramDrafter)
    drafter.start([0])
    drafter.propose([9, 9, 1, 2, 3, 4], 5)  # the last four hold two triples
    drafter.propose([9, 9, 1, 2, 3, 4, 5], 5)
    assert drafter.table.weight(1, 2, 3) == pytest.approx(0.04)
    assert drafter.table.weight(2, 3, 4) == pytest.approx(0.08)
    assert drafter.table.weight(9, 1, 2) == 0
    for _ in range(100):
        drafter.propose([9, 9, 1, 2, 3, 4, 5], 5)
    assert drafter.table.weight(3, 4, 5) == CAP


def test_a_text_adds_to_what_a_corpus_said() -> None:
    table = build_table(LETTERS, ["a b c a b d"])
    text = table.fork()
    text.reward(0, 1, 4, 0.04)
    assert dict(text.successors(0, 1)) == pytest.approx({2: 0.5, 3: 0.5, 4: 0.04})
    assert dict(table.successors(0, 1)) == pytest.approx({2: 0.5, 3: 0.5})


def test_a_saved_table_with_what_it_learnt_is_read_back(tmp_path: Path) -> None:
    table = build_table(LETTERS, ["a b c a b d e a b c", "d c b a d c e"])
    table.reward(0, 1, 4, 2.0)
    table.reward(4, 4, 0, 0.5)
    table.save(tmp_path / "table")
    again = load_table(tmp_path / "table", LETTERS)
    for a in range(5):
        for b in range(5):
            assert dict(again.successors(a, b)) == pytest.approx(dict(table.successors(a, b)))
    again.save(tmp_path / "table")
    assert np.array_equal(load_table(tmp_path / "table", LETTERS).pairs, again.pairs)


def test_an_interrupted_save_leaves_the_table_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table"
    table = build_table(LETTERS, ["a b c"])
    table.save(path)
    before = path.read_bytes()
    table.reward(0, 1, 4, 2.0)

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(FewerError, match="No space left"):
        table.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_the_table_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    build_table(LETTERS, ["a b c"]).save(tmp_path / "table")
    for other in (Words("a b c d f"), Words("a b c d e f")):
        with pytest.raises(CheckpointError, match="another tokenizer"):
            load_table(tmp_path / "table", other)


@pytest.mark.parametrize(
    ("name", "value", "fault"),
    [
        ("tokens", [9, 0, 0], "vocabulary"),
        ("weights", [float("nan"), 0.1, 0.1], "weight"),
        ("weights", [0.0, 0.1, 0.1], "weight"),
        ("starts", [0, 2, 2, 3], "overlap"),
        ("pairs", [7, 1, 13], "order"),
        ("pairs", [1, 7], "lengths"),
    ],
)
def test_a_damaged_table_is_refused(name: str, value: list[Any], fault: str, tmp_path: Path) -> None:
    table = build_table(LETTERS, ["a b c d e"])
    setattr(table, name, np.array(value, getattr(table, name).dtype))
    table.save(tmp_path / "table")
    with pytest.raises(CheckpointError, match=f"damaged trigram table.*{fault}"):
        load_table(tmp_path / "table", LETTERS)


def test_a_text_without_triples_is_refused() -> None:
    with pytest.raises(UsageError, match="three tokens"):
        build_table(LETTERS, ["a b", ""])


# ── the search ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("iterations", [1, 5, 40, 150, 400])
def test_visits_worked_out_are_those_of_the_search(iterations: int) -> None:
    """Where no token follows itself, the reference's reward is 1 throughout, and the two give the same list."""
    settings = SearchSettings(iterations=iterations, reward="reference")
    for seed in range(20):
        table, pair = random_table(seed), (seed % 12, (seed + 1) % 12)
        nodes = search_tree(table, pair, settings, random.Random(0))
        assert list(flat_visits(table, pair, settings)) == [(node.path, node.visits) for node in nodes]


@pytest.mark.parametrize("seed", range(30))
def test_visits_are_divided_one_by_one_or_at_once_alike(seed: int) -> None:
    dice = random.Random(seed)
    priors = sorted((dice.random() for _ in range(dice.randint(1, 12))), reverse=True)
    total = dice.randint(1, 300)
    given = [0] * len(priors)
    given[-1] = 1
    for _ in range(total - 1):
        unseen = [place for place, visits in enumerate(given) if not visits]
        best = max(range(len(priors)), key=lambda place: (priors[place] / (1 + given[place]), -place))
        given[unseen[0] if unseen else best] += 1
    assert apportion(priors, total) == given


def test_visits_of_siblings_follow_their_priors() -> None:
    table = TrigramTable()
    for token, weight in ((1, 0.5), (2, 0.3), (3, 0.15), (4, 0.05)):
        table.reward(0, 0, token, weight)
    found = {path: visits for path, visits in flat_visits(table, (0, 0), SearchSettings())}
    assert found == {(1,): 76, (2,): 45, (3,): 22, (4,): 7}


def test_the_intended_reward_counts_what_the_reference_misses() -> None:
    """The heavier child leads nowhere, the lighter one to heavy pairs: only the intended reward sees it."""
    table = TrigramTable()
    for a, b, c, weight in ((0, 0, 1, 0.5), (0, 0, 2, 0.45), (0, 2, 3, 3.0), (2, 3, 4, 3.0)):
        table.reward(a, b, c, weight)

    def first(reward: Any, c1: float) -> tuple[int, ...]:
        return search_tree(table, (0, 0), SearchSettings(c1=c1, reward=reward), random.Random(0))[0].path

    assert first("reference", 0.5) == (1,)
    assert first("intended", 0.5) == (2,)


@pytest.mark.parametrize("name", SEARCHES)
def test_a_seeded_search_gives_the_same_paths_and_no_path_before_its_beginning(name: Any) -> None:
    for seed in range(5):
        table, settings = random_table(seed), SearchSettings(iterations=60)
        first, second = (list(SEARCHES[name](table, (1, 2), settings, random.Random(7))) for _ in range(2))
        assert first == second and len(set(first)) == len(first)
        assert all(path[:-1] in first[:place] for place, path in enumerate(first) if len(path) > 1)


# ── the draft ────────────────────────────────────────────────────────────────────────────────────────────────────────


def table_of(chain: list[int]) -> TrigramTable:
    table = TrigramTable()
    for a, b, c in zip(chain, chain[1:], chain[2:], strict=False):
        table.reward(a, b, c, 1.0)
    return table


def drafter_of(table: TrigramTable, **changes: Any) -> TrigramDrafter:
    return TrigramDrafter(AdedConfig(**changes), table, PassCost(), Chances())


def test_paths_are_as_deep_as_the_search_and_one_greedy_token() -> None:
    for search in SEARCHES:
        drafter = drafter_of(table_of([1, 2, 3, 4, 5, 6, 7, 8]), search=search, **WIDE)
        assert drafter.propose([1, 2], 20).tokens == [2, 3, 4, 5, 6]
        assert drafter.propose([1, 2], 2).tokens == [2, 3, 4]
    assert drafter.propose([2], 5).tokens == [2] and drafter.propose([9, 9], 5).tokens == [9]


def test_a_draft_is_a_tree_within_its_budget() -> None:
    for seed in range(10):
        for tokens in (1, 3, 10, 40):
            drafter = drafter_of(random_table(seed), gate=False, tokens=tokens, iterations=60)
            draft = drafter.propose([seed % 12, 3], 63)
            trees.check(draft, 12)
            assert len(draft.tokens) <= tokens + 1 and trees.merge_duplicates(draft) is draft
            assert max(draft.depth) <= 4


def test_the_most_likely_path_lies_behind_the_root_like_a_chain() -> None:
    draft = trees.depth_first(trees.DraftTree([0, 1, 2, 3, 4, 5], [-1, 0, 0, 1, 2, 3]))
    assert draft.tokens == [0, 1, 3, 5, 2, 4] and draft.parents == [-1, 0, 1, 2, 0, 4]


def test_a_frozen_table_learns_nothing() -> None:
    drafter = drafter_of(TrigramTable(), update=False, **WIDE)
    drafter.start([1, 2, 3, 1, 2])
    assert drafter.propose([1, 2, 3, 1, 2, 3, 1, 2], 5).tokens == [2] and not drafter.table.learnt


def test_an_answer_starts_from_the_table_alone_unless_it_is_kept() -> None:
    for keep in (False, True):
        strategy = Aded(AdedConfig(keep=keep, **WIDE))
        first, second = strategy.drafter(GREEDY, 0), strategy.drafter(GREEDY, 1)
        assert first is not None and second is not None
        first.start([1, 2, 3, 4])
        second.start([9])
        assert second.propose([9, 1, 2], 5).tokens == ([2, 3, 4] if keep else [2])


@pytest.mark.parametrize(
    "settings",
    ["tokens=0", "tokens=64", "window=2", "iterations=0", "depth=0", "amount=4", "amount=0", "c2=0", "seed=-1"],
)
def test_settings_out_of_range_are_refused(settings: str) -> None:
    name, value = settings.split("=")
    with pytest.raises(UsageError, match=f"aded: {name}={value}"):
        AdedConfig(**{name: int(value)})


# ── the gate ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_gate_keeps_what_pays() -> None:
    dear, free = [1 + 0.4 * width for width in range(9)], [1.0] * 9
    assert best_length([0.9, 0.8, 0.7, 0.1], dear) == 3
    assert best_length([0.3, 0.2], dear) == 0
    assert best_length([0.3, 0.9, 0.9], dear) == 3  # two good ones behind a poor one
    assert best_length([0.3, 0.01], free) == 2


def test_costs_between_measured_widths_are_interpolated_and_never_fall() -> None:
    cost = PassCost()
    assert cost.relative(3) == pytest.approx([1, 1.35, 1.7])
    for width, seconds in ((1, 0.010), (5, 0.030), (9, 0.020)):
        for _ in range(3):
            cost.record(width, seconds)
    assert cost.relative(10)[:10] == pytest.approx([1, 1.5, 2, 2.5, 3, 3, 3, 3, 3, 3.25])


def test_one_slow_pass_does_not_close_the_gate() -> None:
    cost = PassCost()
    for _ in range(5):
        cost.record(1, 0.01)
    cost.record(2, 5.0)
    assert cost.relative(2)[1] == pytest.approx(1.35)
    for _ in range(2):
        cost.record(2, 0.02)
    assert cost.relative(2)[1] == pytest.approx(2.0)
    cost.rounds += 1000  # what was measured long ago counts no more
    cost.record(1, 0.01)
    assert cost.relative(2)[1] == pytest.approx(1.35)


def test_chances_become_what_was_seen() -> None:
    chances = Chances()
    assert chances.of("kind", 0.25) == 0.25
    for count in range(400):
        chances.learn("kind", count % 4 != 0)
    assert chances.of("kind", 0.1) == pytest.approx(0.75, abs=0.02)


def test_a_gate_guesses_in_text_that_repeats_and_not_where_guesses_fail() -> None:
    drafter = drafter_of(TrigramTable())
    context = [1, 2, 3, 4, 5] * 8
    drafter.start(context[:10])
    assert len(drafter.propose(context, 20).tokens) == 5
    dice, text = random.Random(1), [1, 2]
    drafter.start(text)
    proposed = []
    for _ in range(300):
        text.append(dice.choice([t for t in range(6) if (text[-2], text[-1], t)]))
        proposed.append(len(drafter.propose(text, 20).tokens) - 1)
    assert sum(proposed[-100:]) < 20


# ── exactness ────────────────────────────────────────────────────────────────────────────────────────────────────────


def taught(prompts: list[list[int]], answers: list[list[int]], wrong: bool = False) -> TrigramTable:
    """A table of the answers themselves, or one in which every successor is another token."""
    table = TrigramTable(vocab_size=VOCAB)
    for prompt, answer in zip(prompts, answers, strict=True):
        text = prompt + answer
        for a, b, c in zip(text, text[1:], text[2:], strict=False):
            table.reward(a, b, (c + 1) % VOCAB if wrong else c, 1.0)
    return table


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("search", ["visits", "monte-carlo"])
def test_every_table_gives_the_plain_tokens(search: Any, gate: bool) -> None:
    """An empty one, one of the answers, and one that is always wrong; 52 prompts of 64 tokens each."""
    model = random_transformer()
    prompts = PROMPTS if search == "visits" and not gate else PROMPTS[:8]
    expected = run(model, prompts)
    rates = []
    for table in (None, taught(prompts, expected), taught(prompts, expected, wrong=True)):
        strategy = Aded(AdedConfig(search=search, gate=gate, tokens=9, iterations=40))
        strategy.table = table or strategy.table
        counts = Counts()
        assert run(model, prompts, strategy, counts=counts) == expected
        rates.append(counts.tau)
    if not gate:
        assert rates[1] > 2 > rates[2]


def test_the_second_answer_to_a_prompt_takes_fewer_passes_with_a_kept_table() -> None:
    model, strategy, rates = random_transformer(), Aded(AdedConfig(keep=True, **WIDE)), []
    for _ in range(2):
        counts = Counts()
        run(model, PROMPTS[:1], strategy, counts=counts)
        rates.append(counts.tau)
    assert rates[1] > 1.3 * rates[0]


def test_sampled_text_does_not_depend_on_the_draft() -> None:
    """One number is drawn a token, so the text of a seed is that of plain decoding, whatever is guessed."""
    model, sampling = random_transformer(), SamplingConfig(temperature=0.7, top_p=0.9, seed=5)
    expected = run(model, PROMPTS[:10], sampling=sampling, max_tokens=32)
    assert expected != run(model, PROMPTS[:10], max_tokens=32)
    for wrong in (False, True):
        strategy = Aded(AdedConfig(**WIDE))
        strategy.table = taught(PROMPTS[:10], expected, wrong)
        assert run(model, PROMPTS[:10], strategy, sampling, 32) == expected
