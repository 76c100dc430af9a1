"""The verifier: one target pass over a draft tree, and the exact rule for how the draft was made.

Sources: Leviathan et al., arXiv 2211.17192, and Chen et al., arXiv 2302.01318 (chains); SpecInfer, arXiv 2305.09781
(trees). With p the target's warped law at a node, q the law its children were drawn from, and C the children:

    deterministic         draw s ~ p; when s is in C move there, else emit s
    iid                   for c in C: accept with min(1, p(c)/q(c)); on rejection p <- norm(max(p - q, 0))
    without-replacement   the same, and q(c) <- 0, q <- norm(q) after a rejection
    all                   no child accepted, or no child at all: emit a draw from the current p

Each emitted token then has the target's law, whatever q is. Greedy decoding is p = one-hot: walk along the argmax.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewer.decoding.sampling import Sampler, argmax, log_probability, penalise, warp
from fewer.decoding.tree import children
from fewer.engine.session import Session
from fewer.slots import DraftTree


def acceptance(p: Tensor, q: Tensor, token: Tensor) -> Tensor:
    """min(1, p(token)/q(token)): p and q [.., V], token [..] drawn from q -> [..]."""
    index = token[..., None]
    return (p.gather(-1, index) / q.gather(-1, index))[..., 0].clamp(max=1.0)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """The law after a rejection, norm(max(p - q, 0)) [.., V]; p itself where p = q, when none can happen."""
    rest = (p - q).clamp(min=0.0)
    total = rest.sum(-1, keepdim=True)
    return torch.where(total > 0, rest / total, p)


def without(q: Tensor, token: Tensor) -> Tensor:
    """q [.., V] with `token` [..] struck out and the rest scaled to one; zeros where nothing is left."""
    rest = q.scatter(-1, token[..., None], 0.0)
    total = rest.sum(-1, keepdim=True)
    return torch.where(total > 0, rest / total, torch.zeros_like(rest))


def accept(tree: DraftTree, logits: Tensor, sampler: Sampler, context: Sequence[int]) -> tuple[list[int], int]:
    """Walk down the tree: (accepted nodes with the root first, the next token).

    logits [n + 1, V]: row i predicts the children of node i. `context` ends with the root's token; a repetition penalty
    sees it and the tokens of the path walked so far.
    """
    if sampler.greedy:
        return _follow_argmax(tree, logits, sampler, context)
    below = children(tree)
    path, node = [0], 0
    history = list(context) if sampler.config.reads_history else []
    while True:
        law = warp(logits[node], sampler.config, history)
        moved, token = _choose(tree, node, below[node], law, sampler)
        if moved is None:
            return path, token
        node = moved
        path.append(node)
        history.append(token)


def _choose(tree: DraftTree, node: int, below: list[int], p: Tensor, sampler: Sampler) -> tuple[int | None, int]:
    """One node of the walk: (the accepted child or None, the token emitted)."""
    if tree.origin == "deterministic" or not below:
        token = sampler.draw(p)
        return next((child for child in below if tree.tokens[child] == token), None), token
    assert tree.probabilities is not None
    q = tree.probabilities[node].to(p.device, p.dtype)
    for child in below:
        guess = torch.tensor(tree.tokens[child], device=p.device)
        if sampler.uniform() < float(acceptance(p, q, guess)):
            return child, tree.tokens[child]
        p = residual(p, q)
        if tree.origin == "without-replacement":
            q = without(q, guess)
    return None, sampler.draw(p)


def _follow_argmax(tree: DraftTree, logits: Tensor, sampler: Sampler, context: Sequence[int]) -> tuple[list[int], int]:
    penalty = sampler.config.repetition_penalty
    best = argmax(logits).tolist() if penalty == 1 else []
    below = children(tree)
    path, node = [0], 0
    history = list(context) if penalty != 1 else []
    while True:
        token = best[node] if penalty == 1 else int(argmax(penalise(logits[node], history, penalty)))
        moved = next((child for child in below[node] if tree.tokens[child] == token), None)
        if moved is None:
            return path, token
        node = moved
        path.append(node)
        history.append(token)


Rule = Callable[[DraftTree, Tensor, Sampler, Sequence[int]], tuple[list[int], int]]
"""What `accept` is called with and answers."""


@dataclass(slots=True)
class Verdict:
    """What one row's round yields: `tokens[i]` was predicted by node `path[i]`."""

    path: list[int]
    tokens: list[int]  # accepted draft tokens, then the target's own: always len(path) of them
    logprobs: list[float] | None = None


class Verifier:
    """Runs draft trees through the target. The pass stays tentative: the caller commits what it keeps of the path."""

    def __init__(self, session: Session, logprobs: bool = False, rule: Rule = accept):
        """`rule`: the exact one above, or that of a lossy way of decoding."""
        self.session, self.logprobs, self.rule = session, logprobs, rule

    def verify(
        self,
        trees: Sequence[DraftTree | None],
        samplers: Sequence[Sampler],
        contexts: Sequence[Sequence[int]],
    ) -> list[Verdict | None]:
        """One target pass for all rows; None for a row without a tree."""
        verdicts: list[Verdict | None] = []
        logits = self.session.verify(trees)
        for tree, rows, sampler, context in zip(trees, logits, samplers, contexts, strict=True):
            if tree is None or rows is None:
                verdicts.append(None)
                continue
            path, token = self.rule(tree, rows, sampler, context)
            tokens = [*(tree.tokens[node] for node in path[1:]), token]
            scores = [log_probability(rows[n], t) for n, t in zip(path, tokens, strict=True)] if self.logprobs else None
            verdicts.append(Verdict(path, tokens, scores))
        return verdicts
