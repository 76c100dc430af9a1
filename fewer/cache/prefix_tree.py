"""What the prompts of a batch begin with in common, as a tree of runs of tokens.

Level 1 holds the common beginnings, level 2 what some of those rows have in common after that, and so on.

Source: Hydragen, arXiv 2402.05099, section 3.3 (hierarchical sharing); here the tree is found by its tokens, as in
SGLang, arXiv 2312.07104, not declared.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Tokens = Sequence[int]


@dataclass(eq=False)
class PrefixNode:
    """Tokens at positions start..stop-1 that two rows or more have in common, as they have all tokens before."""

    start: int
    tokens: list[int]
    rows: list[int]  # ascending
    parent: PrefixNode | None
    children: list[PrefixNode] = field(default_factory=list)

    @property
    def stop(self) -> int:
        return self.start + len(self.tokens)

    @property
    def own_rows(self) -> list[int]:
        """Rows that share nothing beyond this node."""
        deeper = {row for child in self.children for row in child.rows}
        return [row for row in self.rows if row not in deeper]


def prefix_levels(
    prompts: Sequence[Tokens | None], shortest: int = 1, multiple: int = 1, most: int = 0
) -> list[list[PrefixNode]]:
    """The tree of common beginnings of B prompts, by level, each level's nodes in the order of their first rows.

    A node has `shortest` tokens or more and ends at a multiple of `multiple`; there are `most` levels at most (0: any
    number). A row keeps its last token to itself, since that has to be fed to give the row's logits. None: the row
    takes no part.
    """
    levels: list[list[PrefixNode]] = []
    usable = {row: list(prompt[:-1]) for row, prompt in enumerate(prompts) if prompt is not None}

    def grow(rows: list[int], begin: int, at: int, parent: PrefixNode | None, depth: int) -> None:
        """Rows agree on their first `at` tokens; those from `begin` on are in no node yet."""
        if most and depth == most:
            return
        following: dict[int, list[int]] = defaultdict(list)
        for row in rows:
            if len(usable[row]) > at:
                following[usable[row][at]].append(row)
        for group in following.values():
            if len(group) < 2:
                continue
            common = common_length([usable[row] for row in group])
            end = common // multiple * multiple
            if end - begin < shortest:
                grow(group, begin, common, parent, depth)
                continue
            node = PrefixNode(begin, usable[group[0]][begin:end], group, parent)
            if parent is not None:
                parent.children.append(node)
            if depth == len(levels):
                levels.append([])
            levels[depth].append(node)
            grow(group, end, common, node, depth + 1)

    grow(list(usable), 0, 0, None, 0)
    return [sorted(level, key=lambda node: node.rows[0]) for level in levels]


def worthwhile(levels: Sequence[Sequence[PrefixNode]], pays: Callable[[int, int, int], bool]) -> set[PrefixNode]:
    """The nodes that are worth a read of their own; the others are to be folded into what branches off them.

    `pays(branches, tokens, nodes)` is asked from the leaves to the root. Where a node is folded, everything that
    branches off it branches off its parent, so a parent may pay whose children do not. `nodes`: those of the level.
    """
    chosen: set[PrefixNode] = set()
    branches: dict[PrefixNode, int] = {}
    for level in reversed(levels):
        for node in level:
            below = [1 if child in chosen else branches[child] for child in node.children]
            branches[node] = len(node.own_rows) + sum(below)
            if pays(branches[node], len(node.tokens), len(level)):
                chosen.add(node)
    return chosen


def common_length(texts: Sequence[list[int]]) -> int:
    """Tokens that all texts begin with. What the least and the greatest of them share, all share."""
    return len(os.path.commonprefix([min(texts), max(texts)]))
