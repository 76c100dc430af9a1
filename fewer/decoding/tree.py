"""Building draft trees: from guessed sequences, without duplicate siblings, within a number of nodes.

A `DraftTree` is two lists in topological order (`parents[i] < i`). The session turns them into positions
(committed length + depth) and an ancestor mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from fewer.slots import DraftTree


def root(token: int) -> DraftTree:
    """The tree that guesses nothing."""
    return DraftTree([token], [-1])


def chain(token: int, guesses: Sequence[int]) -> DraftTree:
    """One guessed continuation of `token`."""
    return DraftTree([token, *guesses], list(range(-1, len(guesses))))


def from_sequences(token: int, sequences: Sequence[Sequence[int]]) -> DraftTree:
    """Several guessed continuations of `token`, their shared beginnings merged. Earlier sequences come first."""
    tokens, parents = [token], [-1]
    known: dict[tuple[int, int], int] = {}  # (parent, token) -> node
    for sequence in sequences:
        node = 0
        for guess in sequence:
            if (node, guess) not in known:
                known[node, guess] = len(tokens)
                tokens.append(guess)
                parents.append(node)
            node = known[node, guess]
    return DraftTree(tokens, parents)


def children(tree: DraftTree) -> list[list[int]]:
    """The children of each node, in the order they were drafted."""
    below: list[list[int]] = [[] for _ in tree.tokens]
    for node in range(1, len(tree.tokens)):
        below[tree.parents[node]].append(node)
    return below


def merge_duplicates(tree: DraftTree) -> DraftTree:
    """Siblings that carry one token become one node with the children of both.

    Only for "deterministic" trees, whose rule takes distinct siblings; duplicates of an i.i.d. tree carry meaning.
    """
    if tree.origin != "deterministic" or tree.is_chain:
        return tree
    tokens, parents = [tree.tokens[0]], [-1]
    known: dict[tuple[int, int], int] = {}
    new_name = [0] * len(tree.tokens)
    for node in range(1, len(tree.tokens)):
        key = new_name[tree.parents[node]], tree.tokens[node]
        if key not in known:
            known[key] = len(tokens)
            tokens.append(key[1])
            parents.append(key[0])
        new_name[node] = known[key]
    return replace(tree, tokens=tokens, parents=parents) if len(tokens) < len(tree.tokens) else tree


def cut(tree: DraftTree, limit: int) -> DraftTree:
    """The first `limit` nodes below the root. Parents come before children, so what stays is a tree.

    Leaving out the last siblings of an i.i.d. or without-replacement draft keeps the rule exact: they are taken in
    order.
    """
    if len(tree.tokens) <= limit + 1:
        return tree
    kept = slice(limit + 1)
    law = None if tree.probabilities is None else tree.probabilities[kept]
    return replace(tree, tokens=tree.tokens[kept], parents=tree.parents[kept], probabilities=law)


def depth_first(tree: DraftTree) -> DraftTree:
    """The same deterministic tree, each node right behind its parent or an elder sibling's descendants.

    The path of first children then lies behind the root without holes, as a chain does, and a pass over it sums in the
    order of plain decoding.
    """
    below = children(tree)
    tokens, parents, waiting = [tree.tokens[0]], [-1], [(child, 0) for child in reversed(below[0])]
    while waiting:
        node, parent = waiting.pop()
        waiting += [(child, len(tokens)) for child in reversed(below[node])]
        tokens.append(tree.tokens[node])
        parents.append(parent)
    return DraftTree(tokens, parents)


def check(tree: DraftTree, vocab_size: int) -> None:
    """Raise ValueError when a drafter broke the contract of `DraftTree`."""
    if len(tree.tokens) != len(tree.parents) or not tree.tokens or tree.parents[0] != -1:
        raise ValueError("a draft tree has one parent a token and starts with a root whose parent is -1")
    for node in range(1, len(tree.tokens)):
        if not 0 <= tree.parents[node] < node:
            raise ValueError(f"node {node} of a draft tree has parent {tree.parents[node]}: parents come first")
        if not 0 <= tree.tokens[node] < vocab_size:
            raise ValueError(f"node {node} of a draft tree is token {tree.tokens[node]} of {vocab_size}")
    if tree.origin != "deterministic" and len(tree.tokens) > 1:
        if tree.probabilities is None or tree.probabilities.shape != (len(tree.tokens), vocab_size):
            raise ValueError(f"a draft tree of origin '{tree.origin}' needs its law [nodes, {vocab_size}]")
        parents = torch.tensor(tree.parents[1:], device=tree.probabilities.device)
        tokens = torch.tensor(tree.tokens[1:], device=tree.probabilities.device)
        if not bool((tree.probabilities[parents, tokens] > 0).all()):
            raise ValueError("a drafted token has probability 0 under the law it was drawn from")
