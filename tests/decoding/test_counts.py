"""Counts: what a round adds, at which draft positions guesses were right, and where the time went."""

from __future__ import annotations

import pytest

from fewer.decoding import tree as trees
from fewer.decoding.counts import Counts
from fewer.decoding.generate import generate
from fewer.decoding.sampling import SamplingConfig
from fewer.slots import DraftTree
from tests.decoding.drafters import EachRow, Scripted, oracle
from tests.random_model import new_session, random_tokens, random_transformer


def test_positions_are_counted_where_earlier_guesses_were_right() -> None:
    counts, chain = Counts(), trees.chain(0, [1, 2, 3])
    counts.add(chain, [0, 1, 2, 3], 4)
    counts.add(chain, [0, 1], 2)
    counts.add(chain, [0], 1)
    counts.add(trees.root(0), [0], 1)
    assert (counts.reached, counts.accepted_at) == ([3, 2, 1], [2, 1, 1])
    assert counts.acceptance == [2 / 3, 1 / 2, 1.0]
    assert (counts.target_passes, counts.emitted, counts.drafted, counts.accepted) == (4, 8, 9, 4)
    assert (counts.tau, counts.draft_efficiency) == (2.0, 4 / 9)


def test_a_tree_counts_along_its_accepted_path() -> None:
    counts, tree = Counts(), DraftTree([0, 5, 6, 7, 8], [-1, 0, 0, 2, 3])
    counts.add(tree, [0, 1], 2)  # nothing was guessed behind node 1
    counts.add(tree, [0, 2, 3], 3)
    assert (counts.reached, counts.accepted_at) == ([2, 1, 1], [2, 1, 0])


def test_what_a_stop_cuts_off_is_not_text() -> None:
    counts = Counts()
    counts.add(trees.chain(0, [1, 2, 3]), [0, 1, 2, 3], 2)
    assert (counts.emitted, counts.accepted, counts.reached, counts.accepted_at) == (2, 2, [1, 1], [1, 1])


def test_events_say_which_tokens_were_guessed_and_by_what() -> None:
    model, prompt = random_transformer(), random_tokens(9)
    plain = [
        token for event in generate(new_session(model), [prompt], SamplingConfig(), None, 20) for token in event.tokens
    ]
    right = oracle(prompt, plain, 4)

    def named(context: list[int], limit: int) -> DraftTree:
        draft = right.propose(context, limit)
        draft.drafter = f"round {len(context)}"
        return draft

    counts = Counts()
    strategy = EachRow(lambda row: Scripted(named))  # type: ignore[arg-type]
    events = list(generate(new_session(model), [prompt], SamplingConfig(), strategy, 20, counts=counts))
    assert [(len(event.tokens), event.guessed, event.drafter) for event in events] == [
        (1, 0, ""),
        (5, 4, "round 10"),
        (5, 4, "round 15"),
        (5, 4, "round 20"),
        (4, 3, "round 25"),
    ]
    assert counts.draft_seconds > 0 and counts.verify_seconds > counts.draft_seconds
    assert counts.to_json()["tau"] == pytest.approx(19 / 4)


def test_cutting_a_tree_and_merging_siblings_keeps_its_drafter() -> None:
    tree = DraftTree([0, 1, 1, 2], [-1, 0, 0, 2], drafter="table")
    merged = trees.merge_duplicates(tree)
    assert merged.tokens == [0, 1, 2] and merged.drafter == trees.cut(merged, 1).drafter == "table"
