"""The tree of what prompts begin with in common."""

from __future__ import annotations

import random

import pytest

from fewer.cache.prefix_tree import PrefixNode, common_length, prefix_levels, worthwhile


def shape(levels: list[list[PrefixNode]]) -> list[list[tuple[int, int, list[int]]]]:
    return [[(node.start, node.stop, node.rows) for node in level] for level in levels]


def test_two_levels_and_a_row_that_shares_nothing() -> None:
    few_shot, first, second = [1, 2, 3, 4], [5, 6, 7], [8, 9]
    prompts = [[*few_shot, *first, 10], [9, 9, 9], [*few_shot, *second, 11], [*few_shot, *first, 12]]
    prompts += [[*few_shot, *second, 13]]
    levels = prefix_levels(prompts)
    assert shape(levels) == [[(0, 4, [0, 2, 3, 4])], [(4, 7, [0, 3]), (4, 6, [2, 4])]]
    root, (left, right) = levels[0][0], levels[1]
    assert root.tokens == few_shot and left.tokens == first and right.tokens == second
    assert root.children == [left, right] and left.parent is right.parent is root and root.parent is None
    assert left.own_rows == [0, 3] and right.own_rows == [2, 4] and root.own_rows == []


def test_one_prompt_for_many_completions_leaves_each_row_its_last_token() -> None:
    assert shape(prefix_levels([[1, 2, 3]] * 4)) == [[(0, 2, [0, 1, 2, 3])]]


def test_a_prompt_that_is_the_beginning_of_others_ends_inside_them() -> None:
    levels = prefix_levels([[1, 2, 3, 4, 5, 6], [1, 2, 3, 9], [1, 2, 3, 4, 5, 7]])
    assert shape(levels) == [[(0, 3, [0, 1, 2])], [(3, 5, [0, 2])]]
    assert levels[0][0].own_rows == [1]


@pytest.mark.parametrize("prompts", [[[1]] * 3, [[1, 2], [2, 2]], [[1, 2, 3]], [], [None, [1, 2, 3], None]])
def test_nothing_in_common_is_no_tree(prompts: list[list[int] | None]) -> None:
    assert prefix_levels(prompts) == []


def test_rows_that_take_no_part_are_in_no_node() -> None:
    assert shape(prefix_levels([[1, 2, 3], None, [1, 2, 4]])) == [[(0, 2, [0, 2])]]


def test_what_is_too_short_for_a_node_goes_to_the_nodes_below() -> None:
    prompts = [[1, 2, 3, 4, 0], [1, 2, 3, 4, 1], [1, 5, 6, 0], [1, 5, 6, 1]]
    assert shape(prefix_levels(prompts, shortest=2)) == [[(0, 4, [0, 1]), (0, 3, [2, 3])]]
    assert shape(prefix_levels(prompts, shortest=4)) == [[(0, 4, [0, 1])]]


def test_nodes_end_at_whole_pages() -> None:
    prompts = [[*range(35), 1], [*range(35), 2], [*range(20), 3], [*range(20), 4]]
    levels = prefix_levels(prompts, shortest=16, multiple=16)
    assert shape(levels) == [[(0, 16, [0, 1, 2, 3])], [(16, 32, [0, 1])]]


def test_no_more_levels_than_asked_for() -> None:
    prompts = [[1, 2, 3, 0], [1, 2, 3, 1], [1, 4, 0], [1, 4, 1]]
    assert shape(prefix_levels(prompts, most=1)) == [[(0, 1, [0, 1, 2, 3])]]
    assert len(prefix_levels(prompts, most=2)) == 2


def test_common_length() -> None:
    assert common_length([[1, 2, 3], [1, 2], [1, 2, 9]]) == 2
    assert common_length([[1], [2]]) == 0


def test_random_trees_spell_their_rows() -> None:
    """Along the nodes of a row stands its text, unbroken from position 0; a node's rows are all that begin so."""
    rng = random.Random(0)
    for _ in range(200):
        prompts = [[rng.randrange(2) for _ in range(rng.randrange(1, 9))] for _ in range(rng.randrange(1, 8))]
        levels = prefix_levels(prompts)
        for row, prompt in enumerate(prompts):
            nodes = [node for level in levels for node in level if row in node.rows]
            text = [token for node in nodes for token in node.tokens]
            assert text == prompt[: len(text)] and len(text) < len(prompt)
            assert [node.start for node in nodes] == [0, *(node.stop for node in nodes)][: len(nodes)]
            others = [prompt[:-1] for other, prompt in enumerate(prompts) if other != row]
            longest = max((common_length([prompt[:-1], other]) for other in others), default=0)
            assert len(text) == longest


def test_a_node_pays_by_what_branches_off_it() -> None:
    """Where the children do not pay, their rows branch off the root."""
    prompts = [[1, 2, 3, 0], [1, 2, 3, 1], [1, 4, 5, 0], [1, 4, 5, 1], [1, 4, 5, 2]]
    levels = prefix_levels(prompts)
    (root,), (left, right) = levels
    asked: list[tuple[int, int, int]] = []

    def pays(branches: int, tokens: int, nodes: int) -> bool:
        asked.append((branches, tokens, nodes))
        return branches > 2

    assert worthwhile(levels, pays) == {root, right}
    assert asked == [(2, 2, 2), (3, 2, 2), (3, 1, 1)]
    assert worthwhile(levels, lambda *_: True) == {root, left, right}
    assert worthwhile(levels, lambda *_: False) == set()
