"""Growing a draft tree level by level from a drafter's own probabilities, no wider than pays.

The scheme is EAGLE-2's (arXiv 2406.16858): a node is worth the product of the probabilities on its path; the best few
of a level are expanded, and in the end the best nodes of all levels are kept. A child is never worth more than its
parent, so what is kept is a tree. Ours is the gate: on a CPU each further token of a pass costs about a third of a
plain pass, so probabilities are corrected by what became of earlier guesses, and a level, or a node, that does not pay
by the measured times is left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from fewer.decoding import tree
from fewer.decoding.draft_gate import Chances, PassCost, best_length
from fewer.slots import DraftTree

FIRST_STAGE = 0.1  # of a plain pass: a level's own cost, until it is measured
FADE = 0.9  # of what was measured of a level, for each new time
MOST_IDLE = 12  # rounds without a draft before one is tried again, where none of the last ones paid

Level = list[list[tuple[int, float]]]  # for each node that was expanded, its children: (token, probability)
Expand = Callable[[list[int], list[int]], Level]  # children of tokens, each below the node expanded as number `parent`


def children(logits: Tensor, tokens: Callable[[Tensor], Tensor], width: int) -> Level:
    """The `width` likeliest children of each node: logits [m, V'], `tokens` names classes."""
    top, classes = logits.topk(min(width, logits.shape[-1]), dim=-1)
    chances = (top - logits.logsumexp(-1, keepdim=True)).exp().tolist()
    return [list(zip(*row, strict=True)) for row in zip(tokens(classes).tolist(), chances, strict=True)]


@dataclass(frozen=True)
class Shape:
    """How large a tree may grow."""

    nodes: int  # below the root
    depth: int  # levels
    width: int  # children of a node that are looked at
    frontier: int  # nodes of a level that are expanded


class Gate:
    """What is known about this model and machine: the cost of passes and levels, and how good probabilities are.
    `opened=False` lets everything through."""

    def __init__(self, opened: bool = True) -> None:
        self.opened = opened
        self.cost, self.chances = PassCost(), Chances()
        self.stage: float | None = None  # seconds of a level

    def chance(self, depth: int, probability: float) -> float:
        """That a guess of this probability is right when its parent is."""
        return self.chances.of(_kind(depth, probability), probability) if self.opened else probability

    def learn(self, depth: int, probability: float, right: bool) -> None:
        self.chances.learn(_kind(depth, probability), right)

    def timed(self, seconds: float) -> None:
        self.stage = seconds if self.stage is None else FADE * self.stage + (1 - FADE) * seconds

    def pays(self, chance: float) -> bool:
        """Whether a level may pay whose parent becomes text with this chance."""
        if not self.opened:
            return True
        costs, plain = self.cost.relative(2), self._plain()
        stage = FIRST_STAGE if self.stage is None or plain is None else self.stage / plain
        return chance > stage + costs[1] - costs[0]

    def _plain(self) -> float | None:
        """Seconds of a pass over one token."""
        for width, times in sorted(self.cost.times.items()):
            return min(seconds for _, seconds in times) / self.cost.relative(width)[width - 1]
        return None


def _kind(depth: int, probability: float) -> tuple[int, int]:
    return depth, int(9.99 * probability)


class Grower:
    """Grows the trees of one sequence."""

    def __init__(self, gate: Gate, shape: Shape):
        self.gate, self.shape = gate, shape
        self.grown: DraftTree | None = None  # all nodes that were looked at
        self.guessed: list[tuple[int, float]] = []  # of each of them: depth and probability
        self.began, self.width = 0.0, 0  # of the pass under way
        self.idle, self.pause = 0, 0  # rounds in a row that did not pay; rounds to leave out now

    def grow(self, root: int, limit: int, expand: Expand) -> DraftTree:
        """`expand([-1], [root])` gives the first level."""
        draft, self.grown = tree.root(root), None
        if self.pause > 0:
            self.pause -= 1
        elif limit > 0:
            self.grown, worth = self._grown(root, min(limit, self.shape.depth), expand)
            draft = self._kept(self.grown, worth, min(limit, self.shape.nodes))
            self.idle = self.idle + 1 if len(draft.tokens) == 1 else 0
            self.pause = min(self.idle, MOST_IDLE) if self.gate.opened else 0
        self.width, self.began = len(draft.tokens), time.perf_counter()
        return draft

    def accepted(self, tokens: Sequence[int]) -> None:
        """The pass is over: what it cost, and which guesses were right, kept or not."""
        if self.width:
            self.gate.cost.record(self.width, time.perf_counter() - self.began)
            self.width = 0
        if self.grown is None:
            return
        below, node = tree.children(self.grown), 0
        for token in tokens:
            moved = None
            for child in below[node]:
                right = self.grown.tokens[child] == token
                self.gate.learn(*self.guessed[child], right)
                moved = child if right else moved
            if moved is None:
                break
            node = moved
        self.grown = None

    def _grown(self, root: int, levels: int, expand: Expand) -> tuple[DraftTree, list[float]]:
        """All nodes that were looked at, and what each is worth."""
        shape, gate = self.shape, self.gate
        tokens, parents, worth, guessed = [root], [-1], [1.0], [(0, 1.0)]
        frontier, above = [0], [-1]  # nodes to expand, and the numbers of their parents among those expanded before
        expanded = 0
        for depth in range(1, levels + 1):
            began = time.perf_counter()
            level = expand(above, [tokens[node] for node in frontier])
            gate.timed(time.perf_counter() - began)
            candidates = []
            for place, (node, found) in enumerate(zip(frontier, level, strict=True)):
                for token, probability in found:
                    candidates.append((len(tokens), expanded + place))
                    tokens.append(token)
                    parents.append(node)
                    worth.append(worth[node] * gate.chance(depth, probability))
                    guessed.append((depth, probability))
            expanded += len(frontier)
            candidates.sort(key=lambda each: -worth[each[0]])
            best = [each for each in candidates[: shape.frontier] if gate.pays(worth[each[0]])]
            if not best:
                break
            frontier, above = [node for node, _ in best], [parent for _, parent in best]
        self.guessed = guessed
        return DraftTree(tokens, parents), worth

    def _kept(self, grown: DraftTree, worth: list[float], count: int) -> DraftTree:
        """The nodes worth most, those of the likeliest path right behind the root."""
        order = sorted(range(1, len(grown.tokens)), key=lambda node: (-worth[node], self.guessed[node][0], node))
        order = order[:count]
        if self.gate.opened:
            costs = self.gate.cost.relative(len(order) + 1)
            order = order[: best_length([worth[node] for node in order], costs)]
        place = {0: 0} | {node: at for at, node in enumerate(order, 1)}
        tokens = [grown.tokens[0], *(grown.tokens[node] for node in order)]
        return tree.depth_first(DraftTree(tokens, [-1, *(place[grown.parents[node]] for node in order)]))
