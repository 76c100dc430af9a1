"""Which continuations a trigram table would try first: the tree search of ADED, and what it is compared with.

Every search is a generator of paths below the last pair (w_{L-2}, w_{L-1}), the most promising first; a path comes
after the one that it continues. A node is a pair of tokens with n visits, score W and prior P, its weight in the table.
With N visits of the parent, selection takes the child of the largest

    W/n + (c1 + ln((N + c2 + 1) / c2)) · P · sqrt(N) / (1 + n)        (infinite where n = 0)

and each iteration adds R = 1, and what the reward says about the pairs on the path, to all of it.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from fewer.decoding.trigram_table import TrigramTable

Path = tuple[int, ...]
Pair = tuple[int, int]
Reward = Literal["intended", "reference"]
BREADTH = 4  # children of a node in the breadth-first tree


@dataclass(frozen=True)
class SearchSettings:
    iterations: int = 150
    depth: int = 3  # tokens below the root
    c1: float = 32.0  # how much a prior weighs beside the mean reward
    c2: float = 8.0
    reward: Reward = "intended"


@dataclass(slots=True)
class Node:
    pair: Pair
    prior: float
    path: Path
    rank: tuple[int, ...]  # of the node and its ancestors among their siblings
    visits: int = 0
    score: float = 0.0
    children: list[Node] = field(default_factory=list)


def search_tree(table: TrigramTable, pair: Pair, settings: SearchSettings, dice: random.Random) -> list[Node]:
    """The Monte-Carlo search of the paper, step by step -> every node but the root, the most visited first."""
    root, nodes = Node(pair, 0.0, (), ()), []
    for _ in range(settings.iterations):
        node, path = root, [root]
        while node.children and len(path) <= settings.depth:
            node = _best_child(node, settings)
            path.append(node)
        if len(path) <= settings.depth:
            for place, (token, weight) in enumerate(table.successors(*node.pair)):
                below = Node((node.pair[1], token), weight, (*node.path, token), (*node.rank, place))
                node.children.append(below)
            if node.children:
                nodes += node.children
                path.append(node.children[-1])
        pairs = [each.pair for each in path]
        while len(pairs) <= settings.depth and (successors := table.successors(*pairs[-1])):
            tokens, weights = zip(*successors, strict=True)
            pairs.append((pairs[-1][1], dice.choices(tokens, weights)[0]))
        reward = _reward(table, pairs, settings.reward)
        for node in path:
            node.visits += 1
            node.score += reward
    return sorted((node for node in nodes if node.visits), key=_order)


def _order(node: Node) -> tuple[int, int, tuple[int, ...]]:
    return -node.visits, len(node.rank), node.rank


def _best_child(parent: Node, settings: SearchSettings) -> Node:
    scale = settings.c1 + math.log((parent.visits + settings.c2 + 1) / settings.c2)
    scale *= math.sqrt(parent.visits)
    best, chosen = -math.inf, parent.children[0]
    for child in parent.children:
        if not child.visits:
            return child
        score = child.score / child.visits + scale * child.prior / (1 + child.visits)
        if score > best:
            best, chosen = score, child
    return chosen


def _reward(table: TrigramTable, pairs: Sequence[Pair], kind: Reward) -> float:
    """`reference` is what the paper's code computes: it looks up the first token of the next pair, not the second, so
    only a token that follows itself adds anything."""
    step = 1 if kind == "intended" else 0
    return 1.0 + sum(table.weight(*here, there[step]) for here, there in zip(pairs, pairs[1:], strict=False))


def monte_carlo(table: TrigramTable, pair: Pair, settings: SearchSettings, dice: random.Random) -> Iterator[Path]:
    return (node.path for node in search_tree(table, pair, settings, dice))


def visits(table: TrigramTable, pair: Pair, settings: SearchSettings, dice: random.Random) -> Iterator[Path]:
    """`monte_carlo` where every iteration is worth the same, worked out only as far as it is asked for."""
    return (path for path, _ in flat_visits(table, pair, settings))


def flat_visits(table: TrigramTable, pair: Pair, settings: SearchSettings) -> Iterator[tuple[Path, int]]:
    """(path, visits) of the search with R = 1 throughout, in its order.

    W/n is then 1 for all siblings and the rest of the score is P / (1 + n) times what siblings share. So how a node's
    visits are divided among its children depends on their number alone: each child has one, the last child first, and
    every other goes to the largest P / (1 + n), as d'Hondt's rule gives seats.
    """
    # (-visits, depth, ranks), then what the node is: heap order is the order of the search's result.
    waiting: list[tuple[int, int, tuple[int, ...], Path, Pair, int]] = []

    def expand(path: Path, ranks: tuple[int, ...], pair: Pair, passed: int) -> None:
        """`passed`: visits that went on to the children."""
        successors = table.successors(*pair)
        if not (successors and passed and len(path) < settings.depth):
            return
        shares = apportion([weight for _, weight in successors], passed)
        last = len(shares) - 1
        for place, (token, count) in enumerate(zip((token for token, _ in successors), shares, strict=True)):
            if count:
                # The last child's first visit is its parent's expansion, and ends there.
                on = count - (place == last)
                entry = -count, len(path) + 1, (*ranks, place), (*path, token), (pair[1], token), on
                heapq.heappush(waiting, entry)

    expand((), (), pair, settings.iterations)
    while waiting:
        negative, _, ranks, path, below, passed = heapq.heappop(waiting)
        yield path, -negative
        expand(path, ranks, below, passed)


def apportion(priors: Sequence[float], total: int) -> list[int]:
    """Visits of siblings after `total` of them."""
    count = len(priors)
    if total <= count:
        return [*(int(place < total - 1) for place in range(count - 1)), 1]
    # Whatever is above a common threshold comes before whatever is below it, so most can be given at once.
    threshold = (total - count) / sum(priors)
    given = [max(1, int(prior * threshold - 1e-9)) for prior in priors]
    scores = [(-prior / (1 + visits), place) for place, (prior, visits) in enumerate(zip(priors, given, strict=True))]
    heapq.heapify(scores)
    for _ in range(total - sum(given)):
        place = scores[0][1]
        given[place] += 1
        heapq.heapreplace(scores, (-priors[place] / (1 + given[place]), place))
    return given


def product(table: TrigramTable, pair: Pair, settings: SearchSettings, dice: random.Random) -> Iterator[Path]:
    """Best first by the product of normalised weights along the path."""
    waiting: list[tuple[float, int, Path, Pair]] = []

    def expand(value: float, path: Path, pair: Pair) -> None:
        successors = table.successors(*pair) if len(path) < settings.depth else ()
        total = sum(weight for _, weight in successors)
        for token, weight in successors:
            heapq.heappush(waiting, (-value * weight / total, len(path) + 1, (*path, token), (pair[1], token)))

    expand(1.0, (), pair)
    while waiting:
        value, _, path, below = heapq.heappop(waiting)
        yield path
        expand(-value, path, below)


def breadth_first(table: TrigramTable, pair: Pair, settings: SearchSettings, dice: random.Random) -> Iterator[Path]:
    """The heaviest few children of every node, level by level."""
    level: list[tuple[Path, Pair]] = [((), pair)]
    for _ in range(settings.depth):
        level = [
            ((*path, token), (end[1], token)) for path, end in level for token, _ in table.successors(*end)[:BREADTH]
        ]
        yield from (path for path, _ in level)


def chain(table: TrigramTable, pair: Pair, settings: SearchSettings, dice: random.Random) -> Iterator[Path]:
    """The heaviest successor, again and again."""
    path: Path = ()
    while len(path) < settings.depth and (successors := table.successors(*pair)):
        path, pair = (*path, successors[0][0]), (pair[1], successors[0][0])
        yield path


SearchName = Literal["visits", "monte-carlo", "product", "breadth-first", "chain"]
Search = Callable[[TrigramTable, Pair, SearchSettings, random.Random], Iterator[Path]]
SEARCHES: dict[SearchName, Search] = {
    "visits": visits,
    "monte-carlo": monte_carlo,
    "product": product,
    "breadth-first": breadth_first,
    "chain": chain,
}
