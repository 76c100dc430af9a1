"""Draft trees: building, merging, cutting, and the contract that drafters must keep."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewer.decoding import tree as trees
from fewer.slots import DraftTree

sequences = st.lists(st.lists(st.integers(0, 3), max_size=5), max_size=6)


@st.composite
def any_tree(draw: st.DrawFn) -> DraftTree:
    """Up to 12 nodes of 3 tokens, so that siblings often agree."""
    count = draw(st.integers(0, 12))
    parents = [-1, *(draw(st.integers(0, node - 1)) for node in range(1, count + 1))]
    return DraftTree([draw(st.integers(0, 2)) for _ in parents], parents)


def paths(tree: DraftTree) -> set[tuple[int, ...]]:
    """The token sequence of every node, from the root."""
    found: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return set(found)


def test_a_chain_is_a_tree() -> None:
    chain = trees.chain(7, [1, 2, 3])
    assert chain.is_chain and chain.depth == [0, 1, 2, 3]
    assert trees.root(7).is_chain and trees.root(7).depth == [0]
    assert not DraftTree([7, 1, 2], [-1, 0, 0]).is_chain


@given(sequences)
def test_sequences_become_a_tree_of_their_beginnings(guesses: list[list[int]]) -> None:
    tree = trees.from_sequences(9, guesses)
    beginnings = {(9, *guess[:end]) for guess in guesses for end in range(len(guess) + 1)} | {(9,)}
    assert paths(tree) == beginnings and len(tree.tokens) == len(beginnings)
    trees.check(tree, 10)


@given(any_tree())
def test_merging_keeps_every_path_once(tree: DraftTree) -> None:
    merged = trees.merge_duplicates(tree)
    assert paths(merged) == paths(tree) and len(merged.tokens) == len(paths(tree))
    trees.check(merged, 3)


def test_duplicates_of_an_iid_tree_carry_meaning_and_stay() -> None:
    tree = DraftTree([0, 1, 1], [-1, 0, 0], "iid", torch.full((3, 2), 0.5))
    assert trees.merge_duplicates(tree) is tree


@given(any_tree(), st.integers(0, 14))
def test_a_cut_tree_is_its_first_nodes(tree: DraftTree, limit: int) -> None:
    tree.probabilities = torch.rand(len(tree.tokens), 3)
    small = trees.cut(tree, limit)
    size = min(limit + 1, len(tree.tokens))
    assert (small.tokens, small.parents, small.origin) == (tree.tokens[:size], tree.parents[:size], tree.origin)
    assert small.probabilities is not None and torch.equal(small.probabilities, tree.probabilities[:size])
    trees.check(small, 3)


@given(any_tree())
def test_children_come_in_the_order_they_were_drafted(tree: DraftTree) -> None:
    below = trees.children(tree)
    assert sorted(node for nodes in below for node in nodes) == list(range(1, len(tree.tokens)))
    for parent, nodes in enumerate(below):
        assert nodes == sorted(nodes) and all(tree.parents[node] == parent for node in nodes)


LAW = torch.tensor([[0.5, 0.5, 0.0]] * 2)


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        (DraftTree([], []), "one parent a token"),
        (DraftTree([1], [0]), "starts with a root"),
        (DraftTree([1, 2], [-1]), "one parent a token"),
        (DraftTree([1, 2], [-1, 1]), "node 1 of a draft tree has parent 1"),
        (DraftTree([1, 2, 0], [-1, 0, -1]), "node 2 of a draft tree has parent -1"),
        (DraftTree([1, 3], [-1, 0]), "node 1 of a draft tree is token 3 of 3"),
        (DraftTree([1, -2], [-1, 0]), "node 1 of a draft tree is token -2 of 3"),
        (DraftTree([1, 0], [-1, 0], "iid"), "needs its law [nodes, 3]"),
        (DraftTree([1, 0], [-1, 0], "without-replacement", LAW[:1]), "needs its law [nodes, 3]"),
        (DraftTree([1, 2], [-1, 0], "iid", LAW), "probability 0 under the law it was drawn from"),
    ],
)
def test_a_broken_contract_is_named(tree: DraftTree, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        trees.check(tree, 3)
