"""The verifier's rule is exact: whatever was drafted, what is emitted has the target's law; two wrong rules have not.

Laws are compared by total variation. With n draws over K outcomes of law p, the distance of the empirical law has an
expectation of at most sum sqrt(p(1 - p) / n) / 2, and exceeds it by t with probability at most exp(-2nt²) (McDiarmid:
one draw moves it by 1/n). `bound` takes t for one failure in 100,000.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fewer.decoding import tree as trees
from fewer.decoding.sampling import Sampler, SamplingConfig, warp
from fewer.decoding.verifier import accept, acceptance, residual, without
from fewer.slots import DraftTree, Origin

VOCAB, DRAWS, ROOT = 6, 6000, 2
PLAIN = SamplingConfig(temperature=1.0, seed=3)
Counts = dict[tuple[int, ...], float]


def table(seed: int, sharpness: float) -> Tensor:
    """Logits after each token [V, V]."""
    return sharpness * torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed))


TARGET = table(0, 1.5)
Q = table(4, 1.5).softmax(-1)  # the draft's law after each token, far from the target's


def bound(law: list[float], draws: int) -> float:
    spread = sum(math.sqrt(p * (1 - p) / draws) for p in law) / 2
    return spread + math.sqrt(math.log(1e5) / (2 * draws))


def exact_pairs(config: SamplingConfig) -> Counts:
    """The target's joint law of two tokens after ROOT."""
    first = warp(TARGET[ROOT], config, [ROOT]).double()
    second = [warp(TARGET[token], config, [ROOT, token]).double() for token in range(VOCAB)]
    return {(x, y): float(first[x] * second[x][y]) for x in range(VOCAB) for y in range(VOCAB)}


def distance(counts: Counts, law: Counts, draws: int) -> float:
    return sum(abs(counts.get(key, 0) / draws - p) for key, p in law.items()) / 2


# ── drafters: a tree of up to 3 children below the root and 2 below each of them ─────────────────────────────────────


def grow(pick: Callable[[random.Random, int, int], list[int]], widths: tuple[int, int], dice: random.Random):  # type: ignore[no-untyped-def]
    tokens, parents = [ROOT], [-1]
    level = [0]
    for width in widths:
        below = []
        for node in level:
            for token in pick(dice, tokens[node], width):
                below.append(len(tokens))
                tokens.append(token)
                parents.append(node)
        level = below
    return tokens, parents


def draw_iid(dice: random.Random, after: int, count: int) -> list[int]:
    return dice.choices(range(VOCAB), Q_LISTS[after], k=count)


def draw_without_replacement(dice: random.Random, after: int, count: int) -> list[int]:
    weights, drawn = list(Q_LISTS[after]), []
    for _ in range(count):
        drawn += dice.choices(range(VOCAB), weights)
        weights[drawn[-1]] = 0.0
    return drawn


def take_top(dice: random.Random, after: int, count: int) -> list[int]:
    return Q[after].topk(count).indices.tolist()


Q_LISTS = Q.tolist()


def drafted(origin: Origin, widths: tuple[int, int], dice: random.Random) -> DraftTree:
    pick = {"deterministic": take_top, "iid": draw_iid, "without-replacement": draw_without_replacement}[origin]
    tokens, parents = grow(pick, widths, dice)
    law = None if origin == "deterministic" else Q[torch.tensor(tokens)]
    tree = DraftTree(tokens, parents, origin, law)
    trees.check(tree, VOCAB)
    return tree


Rule = Callable[[DraftTree, Tensor, Sampler], list[int]]


def exact_rule(tree: DraftTree, logits: Tensor, sampler: Sampler) -> list[int]:
    path, token = accept(tree, logits, sampler, [ROOT])
    return [*(tree.tokens[node] for node in path[1:]), token]


def measure(
    origin: Origin, widths: tuple[int, int], config: SamplingConfig = PLAIN, rule: Rule = exact_rule
) -> tuple[Counts, float]:
    """How often each pair of tokens came (where a round yields one, a plain draw follows), and the share of rounds that
    accepted."""
    dice, sampler, second = random.Random(5), Sampler(config), Sampler(replace(config, seed=9))
    counts: Counts = {}
    accepted = 0
    for _ in range(DRAWS):
        tree = drafted(origin, widths, dice)
        tokens = rule(tree, TARGET[torch.tensor(tree.tokens)], sampler)
        accepted += len(tokens) > 1
        if len(tokens) == 1:
            tokens.append(second.token(TARGET[tokens[0]], [ROOT, *tokens]))
        pair = tokens[0], tokens[1]
        counts[pair] = counts.get(pair, 0) + 1
    return counts, accepted / DRAWS


def firsts(counts: Counts) -> Counts:
    """The law of the first token alone."""
    return {(x,): sum(n for pair, n in counts.items() if pair[0] == x) for x in range(VOCAB)}


WARPED = SamplingConfig(temperature=0.7, top_k=4, repetition_penalty=1.6, seed=4)
CASES: list[tuple[Origin, tuple[int, int], SamplingConfig]] = [
    ("deterministic", (1, 1), PLAIN),
    ("deterministic", (3, 2), WARPED),
    ("iid", (1, 1), PLAIN),
    ("iid", (3, 2), PLAIN),
    ("without-replacement", (3, 2), PLAIN),
    ("without-replacement", (2, 2), WARPED),
]


@pytest.mark.parametrize(("origin", "widths", "config"), CASES)
def test_one_token_and_two_tokens_have_the_targets_law(
    origin: Origin, widths: tuple[int, int], config: SamplingConfig
) -> None:
    counts, accepted = measure(origin, widths, config)
    law = exact_pairs(config)
    assert distance(counts, law, DRAWS) < bound(list(law.values()), DRAWS)
    first = firsts(law)
    assert distance(firsts(counts), first, DRAWS) < bound(list(first.values()), DRAWS)
    if origin == "deterministic":  # accepted exactly as often as the target's mass on the children
        mass = sum(first[token,] for token in take_top(random.Random(), ROOT, widths[0]))
        assert accepted == pytest.approx(mass, abs=4.5 * math.sqrt(mass * (1 - mass) / DRAWS))


def fresh_sample_for_each_row(tree: DraftTree, logits: Tensor, sampler: Sampler) -> list[int]:
    """WRONG: every leaf's path draws its own samples, and the row that agrees with its draws the longest wins."""
    below = trees.children(tree)
    best: list[int] = []
    for leaf in (node for node in range(len(tree.tokens)) if not below[node]):
        path = [leaf]
        while path[0]:
            path.insert(0, tree.parents[path[0]])
        emitted = []
        for place, node in enumerate(path):
            emitted.append(sampler.token(logits[node], []))
            if place + 1 == len(path) or tree.tokens[path[place + 1]] != emitted[-1]:
                break
        best = emitted if len(emitted) > len(best) else best
    return best


def soft_q_for_top_children(tree: DraftTree, logits: Tensor, sampler: Sampler) -> list[int]:
    """WRONG: the children were taken without chance, but are judged as if they had been drawn from q."""
    return exact_rule(replace(tree, origin="iid", probabilities=Q[torch.tensor(tree.tokens)]), logits, sampler)


def unchanged_q_without_replacement(tree: DraftTree, logits: Tensor, sampler: Sampler) -> list[int]:
    """WRONG: a rejected child is not struck out of q, though it could not be drawn again."""
    return exact_rule(replace(tree, origin="iid"), logits, sampler)


WRONG: list[tuple[Rule, Origin]] = [
    (fresh_sample_for_each_row, "deterministic"),
    (soft_q_for_top_children, "deterministic"),
    (unchanged_q_without_replacement, "without-replacement"),
]


@pytest.mark.parametrize(("rule", "origin"), WRONG)
def test_the_wrong_rules_fail_the_same_bound(rule: Rule, origin: Origin) -> None:
    counts, _ = measure(origin, (3, 2), PLAIN, rule)
    law = exact_pairs(PLAIN)
    first = firsts(law)
    assert distance(counts, law, DRAWS) > 2 * bound(list(law.values()), DRAWS)
    assert distance(firsts(counts), first, DRAWS) > 2 * bound(list(first.values()), DRAWS)


# ── the rule written out, without chance: every sequence of children with its probability ────────────────────────────


@pytest.mark.parametrize("origin", ["iid", "without-replacement"])
@pytest.mark.parametrize("children", [1, 2, 3])
def test_the_emitted_law_summed_over_all_drafts_is_the_targets(origin: Origin, children: int) -> None:
    p, q = TARGET[ROOT].double().softmax(-1), Q[ROOT].double()
    q[1] = 0.0  # the draft never guesses this token
    q = q / q.sum()
    emitted = torch.zeros(VOCAB, dtype=torch.float64)
    for draft in itertools.product(range(VOCAB), repeat=children):
        law, draft_law, weight, reached = p, q, 1.0, 1.0
        for token in draft:
            weight *= float(draft_law[token])
            if origin == "without-replacement":
                draft_law = without(draft_law, torch.tensor(token))
        if weight == 0:
            continue
        draft_law = q
        for token in draft:
            chance = float(acceptance(law, draft_law, torch.tensor(token)))
            emitted[token] += weight * reached * chance
            reached *= 1 - chance
            law = residual(law, draft_law)
            if origin == "without-replacement":
                draft_law = without(draft_law, torch.tensor(token))
        emitted += weight * reached * law
    torch.testing.assert_close(emitted, p, atol=1e-12, rtol=0)


def test_equal_laws_leave_the_residual_defined() -> None:
    p = torch.tensor([0.25, 0.75, 0.0])
    assert torch.equal(residual(p, p), p)
    assert without(torch.tensor([0.0, 1.0, 0.0]), torch.tensor(1)).tolist() == [0.0, 0.0, 0.0]


def test_target_mass_on_rejected_children_only_still_yields_a_token() -> None:
    """All of the target's mass sits on a drafted token, and top-k leaves nothing else."""
    logits = torch.tensor([[0.0, 9.0, 0.0, 0.0]]).repeat(3, 1)
    tree = DraftTree([0, 1, 1], [-1, 0, 0], "iid", torch.full((3, 4), 0.25))
    config = SamplingConfig(temperature=1.0, top_k=1, seed=0)
    for seed in range(50):
        assert exact_rule(tree, logits, Sampler(replace(config, seed=seed)))[0] == 1
