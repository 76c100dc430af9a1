"""Drafters that read the target's hidden states: exact whatever they have learnt, and trained as they draft."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fewer.decoding import draft_growth
from fewer.decoding.chimera import TrigramMemo, trigram_at
from fewer.decoding.chimera_network import leading_trigrams
from fewer.decoding.counts import Counts
from fewer.decoding.draft_layer import branch_attention
from fewer.decoding.draft_training import load_network
from fewer.decoding.frozen_target import FrozenTarget, frequent_tokens
from fewer.decoding.generate import generate
from fewer.decoding.sampling import SamplingConfig
from fewer.errors import CheckpointError, UsageError
from fewer.model.transformer import Transformer
from fewer.slots import DraftTree, HiddenDrafter
from tests.decoding.test_sampled_speculation import DRAWS, MODEL, PROMPT, ROWS, SAMPLING, exact_law
from tests.decoding.trained_drafters import CONFIGS, FITS, STRATEGIES, Target, adapter_of, fresh, lesson_of, strategy_of
from tests.decoding.trained_drafters import trained as train
from tests.random_model import CONFIG, config_of, new_session, random_tokens, random_transformer

METHODS = ("chimera", "medusa", "eagle")
PROMPTS = [random_tokens(3 + index % 17, seed=index) for index in range(50)]
TOKENS, GREEDY = 40, SamplingConfig()
STEPS = {"chimera": 60, "medusa": 250, "eagle": 100}  # of training
Found = dict[str, Any]

every_method = pytest.mark.parametrize("method", METHODS)


def answers(model: Transformer, prompts: list[list[int]], strategy: Any = None, counts: Counts | None = None) -> Any:
    session = new_session(model, len(prompts))
    texts: list[list[int]] = [[] for _ in prompts]
    for event in generate(session, prompts, GREEDY, strategy, TOKENS, counts=counts):
        texts[event.row] += event.tokens
    return texts


@pytest.fixture(scope="module")
def plain() -> tuple[Transformer, list[list[int]]]:
    model = random_transformer(spread=1.0)  # whose texts can be learnt
    return model, answers(model, PROMPTS)


@pytest.fixture(scope="module")
def trained(plain: tuple[Transformer, list[list[int]]]) -> Found:
    model, expected = plain
    rows = [(prompt + text)[-TOKENS:] for prompt, text in zip(PROMPTS, expected, strict=True)]
    return {method: train(model, method, rows, steps) for method, steps in STEPS.items()}


# ── exactness ────────────────────────────────────────────────────────────────────────────────────────────────────────


def contrary(strategy: Any) -> Any:
    """Names every class one higher than it is: what the network is surest of is never what it says."""
    target: FrozenTarget = strategy.network.target
    strategy.network.target.tokens = lambda classes: (classes + 1) % target.classes
    return strategy


SHAPES = [
    {"gate": False, "tokens": 4, "width": 1},
    {"gate": False, "tokens": 12, "width": 3, "branches": 3},
    {"tokens": 6},
]


@every_method
@pytest.mark.parametrize("kind", ["trained", "untrained", "contrary"])
@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_greedy_text_is_that_of_plain_decoding(plain: Any, trained: Found, method: str, kind: str, shape: int) -> None:
    model, expected = plain
    network = trained[method] if kind != "untrained" else fresh(model, method, seed=3)
    strategy = strategy_of(network, method, **SHAPES[shape])
    if kind == "contrary":
        strategy = contrary(strategy)
    counts = Counts()
    assert answers(model, PROMPTS, strategy, counts) == expected
    assert counts.emitted == len(PROMPTS) * (TOKENS - 1)
    if not SHAPES[shape].get("gate", True):
        assert counts.drafted > 0
        assert counts.tau > 1.25 if kind == "trained" else counts.tau < 1.25


@every_method
def test_a_row_alone_drafts_and_says_the_same(plain: Any, trained: Found, method: str) -> None:
    model, expected = plain
    for row in (0, 9, 31):
        assert answers(model, [PROMPTS[row]], strategy_of(trained[method], method)) == [expected[row]]


@every_method
@pytest.mark.parametrize("config", [{"kv_heads": 4}, {"qk_norm": "head", "embedding_scale": 5.0, "rotary_dim": 4}])
def test_other_shapes_of_models_have_their_text(method: str, config: dict[str, Any]) -> None:
    model = random_transformer(config_of(**config))
    network = fresh(model, method, vocabulary=torch.arange(3, 40))
    strategy = strategy_of(network, method, gate=False, tokens=9, branches=2)
    assert answers(model, PROMPTS[:6], strategy) == answers(model, PROMPTS[:6])


@every_method
def test_a_second_turn_of_a_session_drafts_from_what_it_is_told(plain: Any, trained: Found, method: str) -> None:
    """The drafter is told nothing of the tokens that the session held before."""
    model, expected = plain
    session, counts = new_session(model), Counts()
    history = [*PROMPTS[5], *expected[5]]
    session.prefill([history])
    again = [[*history, *PROMPTS[6]]]
    strategy = strategy_of(trained[method], method, gate=False)
    found = [
        token
        for event in generate(session, [PROMPTS[6]], GREEDY, strategy, TOKENS, counts=counts, history=[history])
        for token in event.tokens
    ]
    assert [found] == answers(model, again) and counts.accepted > 0


@every_method
def test_three_sampled_tokens_have_the_targets_joint_law(method: str) -> None:
    law, seen = exact_law(), dict[tuple[int, ...], int]()
    network = fresh(MODEL, method)
    for batch in range(DRAWS // ROWS):
        sampling = SamplingConfig(temperature=0.9, top_k=4, repetition_penalty=1.2, seed=SAMPLING.seed + ROWS * batch)
        texts: list[list[int]] = [[] for _ in range(ROWS)]
        strategy = strategy_of(network, method, gate=False, tokens=6, width=3, branches=2)
        for event in generate(new_session(MODEL, ROWS), [PROMPT] * ROWS, sampling, strategy, 3):
            texts[event.row] += event.tokens
        for text in texts:
            seen[tuple(text)] = seen.get(tuple(text), 0) + 1
    assert set(seen) <= set(law)
    distance = sum(abs(seen.get(text, 0) / DRAWS - p) for text, p in law.items()) / 2
    bound = sum(math.sqrt(p * (1 - p) / DRAWS) for p in law.values()) / 2 + math.sqrt(math.log(1e5) / (2 * DRAWS))
    assert distance < bound


# ── what is trained is what drafts ───────────────────────────────────────────────────────────────────────────────────


@every_method
@pytest.mark.parametrize("settings", [{}, {"head": "own"}, {"mask": "branch", "trigram_rank": 0}, {"trigram": False}])
def test_every_row_of_training_guesses_what_a_drafter_drafts_there(method: str, settings: dict[str, Any]) -> None:
    """The mask of all branches at once against one branch after the other, for every place of a text."""
    if not set(settings) <= set(FITS[method].__dataclass_fields__):
        pytest.skip(f"{method} has no such settings")
    model, text = random_transformer(), random_tokens(24, seed=5)
    network = fresh(model, method, seed=1, vocabulary=torch.arange(1, 47, 2), **settings)
    lesson = lesson_of(model, [text])
    guesses = torch.stack(network.guesses(lesson))[:, 0]  # [offsets, R]
    for row in range(lesson.rows):
        drafter = strategy_of(network, method, gate=False, tokens=4, width=1).drafter(GREEDY, 0)
        assert isinstance(drafter, HiddenDrafter)
        drafter.start(text[: row + 1])
        drafter.observe(lesson.hidden[0, : row + 1])
        draft = drafter.propose(text[: row + 2], 10)
        assert draft.is_chain and draft.tokens == [text[row + 1], *guesses[:, row].tolist()]


@every_method
def test_drafts_do_not_depend_on_how_the_text_came_about(plain: Any, trained: Found, method: str) -> None:
    """Rounds with rejected guesses leave nothing behind: a drafter that is new to the text proposes the same."""
    model, expected = plain
    text = [*PROMPTS[4], *expected[4]]
    lesson = lesson_of(model, [text])
    make = strategy_of(trained[method], method, gate=False, tokens=8, width=2, branches=2).drafter
    drafter, held = make(GREEDY, 0), len(PROMPTS[4])
    drafter.start(PROMPTS[4])
    drafter.observe(lesson.hidden[0, :held])
    for step in (1, 3, 1, 2, 4, 1):
        new = make(GREEDY, 0)
        new.start(text[:held])
        new.observe(lesson.hidden[0, :held])
        draft, same = (each.propose(text[: held + 1], 9) for each in (drafter, new))
        assert (draft.tokens, draft.parents) == (same.tokens, same.parents) and len(draft.tokens) > 4
        drafter.accept(text[held + 1 : held + 1 + step])
        drafter.observe(lesson.hidden[0, held : held + step])
        held += step


def explicit(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    repeat = q.shape[1] // keys.shape[1]
    keys, values = (part.repeat_interleave(repeat, dim=1) for part in (keys, values))
    scores = (q @ keys.transpose(-1, -2) * scale).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ values


@pytest.mark.parametrize(("causal", "own"), [(1, 0), (2, 0), (2, 3), (1, 4)])
def test_attention_of_branches_is_that_of_the_block_mask(causal: int, own: int) -> None:
    """[C, .., C, D, .., D]: the card's row of a stage, written out."""
    torch.manual_seed(0)
    rows, blocks = 9, [(torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)) for _ in range(causal + own)]
    q = torch.randn(2, 4, rows, 8)
    lower, diagonal = torch.ones(rows, rows, dtype=torch.bool).tril(), torch.eye(rows, dtype=torch.bool)
    mask = torch.cat([lower] * causal + [diagonal] * own, dim=1)
    keys, values = (torch.cat(parts, dim=2) for parts in zip(*blocks, strict=True))
    found = branch_attention(q, blocks[:causal], blocks[causal:], 0.3)
    torch.testing.assert_close(found, explicit(q, keys, values, mask, 0.3))


@pytest.mark.parametrize(("mask", "sees"), [("branch", True), ("paper", True), ("code", False)])
def test_later_guesses_see_the_stand_ins_unless_the_released_code_is_followed(mask: Any, sees: bool) -> None:
    model = random_transformer()
    network, lesson = fresh(model, "chimera", mask=mask), lesson_of(model, [random_tokens(12)])
    before = [logits.detach() for logits, _ in network.stages(lesson)]
    original = network.layer.keys_values
    calls = 0

    def shifted(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return original(x if calls == 1 else x.roll(3, -1) * 2)  # the first are the true hidden states

    network.layer.keys_values = shifted
    after = [logits.detach() for logits, _ in network.stages(lesson)]
    assert torch.equal(before[0], after[0])
    assert torch.allclose(before[1], after[1]) != sees


def test_trigrams_begin_as_the_card_says() -> None:
    text = [7, 8, 9, 10]
    found = leading_trigrams(torch.tensor([text]))[0].tolist()
    assert found == [[7, 7, 7], [7, 8, 8], [7, 8, 9], [8, 9, 10]]
    assert [list(trigram_at(text, place)) for place in range(4)] == found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_remembered_g_is_the_computed_one_bit_for_bit(dtype: torch.dtype) -> None:
    model = random_transformer(dtype=dtype)
    network = strategy_of(fresh(model, "chimera"), "chimera").network
    memo, trigrams = TrigramMemo(network), [tuple(random_tokens(3, seed=place)) for place in range(21)]
    with torch.inference_mode():
        together = memo(trigrams)
        assert all(torch.equal(one, other) for one, other in zip(together, memo(trigrams), strict=True))
        for place, trigram in enumerate(trigrams):
            alone = TrigramMemo(network)([trigram])
            assert torch.equal(together[0][:, place], alone[0][:, 0])
            assert torch.equal(together[1][:, place], alone[1][:, 0])


def test_the_memo_is_emptied_when_it_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewer.decoding.chimera.REMEMBERED", 10)
    memo = TrigramMemo(strategy_of(fresh(random_transformer(), "chimera"), "chimera").network)
    with torch.inference_mode():
        for size in (4, 5, 6, 30, 2):
            trigrams = [tuple(random_tokens(3, seed=size + place)) for place in range(size)]
            found = memo(trigrams)[0]
            torch.testing.assert_close(found[0], memo.network.encode(torch.tensor(trigrams)), atol=1e-5, rtol=1e-4)


# ── learning ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@every_method
def test_training_lowers_the_loss_and_raises_what_is_accepted(plain: Any, trained: Found, method: str) -> None:
    model, expected = plain
    history = trained[method].history
    assert math.isfinite(history[0]) and min(history[1:5]) < history[0] and history[-1] < 0.8 * history[0]
    tau = []
    for network in (fresh(model, method), trained[method]):
        counts = Counts()
        answers(model, PROMPTS, strategy_of(network, method, gate=False, tokens=4, width=1), counts)
        tau.append(counts.tau)
    assert tau[1] > tau[0] + 0.2


@pytest.mark.parametrize("method", ["chimera", "medusa"])
def test_heads_begin_as_the_targets(method: str) -> None:
    """Own heads are copies, and zeros stand where the papers have them."""
    model = random_transformer()
    lesson = lesson_of(model, [random_tokens(12)])
    target = FrozenTarget(model, None, training=True)
    network = type(fresh(model, method))(target, FITS[method](head="own"))
    h = lesson.hidden[:, :-1]
    with torch.no_grad():
        if method == "medusa":
            torch.testing.assert_close(network(2, h), target.logits(h))
        else:
            torch.testing.assert_close(network.heads(1, h, h * 2), target.logits(3 * h))
            assert not network.w1.any() and not network.b1.any()
        losses = network.losses(lesson)
    assert all(math.isfinite(float(loss)) for loss in losses.values())


def test_later_guesses_train_nothing_through_earlier_ones() -> None:
    """Stand-ins are detached: the loss of the second guess alone leaves the first head untouched."""
    model = random_transformer()
    network = fresh(model, "chimera", heads=2)
    stages = list(network.stages(lesson_of(model, [random_tokens(12)])))
    (heads,) = torch.autograd.grad(stages[1][0].sum(), network.heads.down, allow_unused=True)
    assert not heads[0].any() and heads[1].any()


def test_ablations_have_less() -> None:
    model = random_transformer()
    counts = [sum(p.numel() for p in fresh(model, "chimera", **s).parameters()) for s in ({}, {"trigram": False})]
    assert counts[1] < counts[0]
    without = fresh(model, "chimera", layer=False)
    assert len(without.guesses(lesson_of(model, [random_tokens(9)]))) == 4
    with pytest.raises(CheckpointError, match="without its layer"):
        strategy_of(without, "chimera")


# ── vocabulary, gate, refusals ───────────────────────────────────────────────────────────────────────────────────────


def test_frequent_tokens_are_the_most_frequent_ones() -> None:
    texts = [[5, 5, 5, 2], [2, 9, 9, 7]]
    assert frequent_tokens(texts, 3, 20).tolist() == [2, 5, 9]  # type: ignore[union-attr]
    assert frequent_tokens(texts, 6, 20).tolist() == [0, 1, 2, 5, 7, 9]  # type: ignore[union-attr]
    assert frequent_tokens(texts, 0, 20) is None and frequent_tokens(texts, 20, 20) is None


@every_method
def test_only_tokens_of_the_vocabulary_are_guessed(method: str) -> None:
    model, vocabulary = random_transformer(), torch.tensor([1, 4, 9, 30])
    network = fresh(model, method, vocabulary=vocabulary)
    target = FrozenTarget(model, vocabulary)
    full, reduced = FrozenTarget(model), torch.randn(3, CONFIG.hidden_size)
    torch.testing.assert_close(target.logits(reduced), full.logits(reduced)[:, vocabulary])
    drafts: list[DraftTree] = []
    strategy = strategy_of(network, method, gate=False, tokens=9, branches=2)
    drafter = strategy.drafter(GREEDY, 0)
    lesson = lesson_of(model, [PROMPTS[7]])
    drafter.start(PROMPTS[7])
    drafter.observe(lesson.hidden[0])
    drafts.append(drafter.propose([*PROMPTS[7], 3], 20))
    assert len(drafts[0].tokens) == 10 and set(drafts[0].tokens[1:]) <= set(vocabulary.tolist())


@every_method
def test_an_adapter_that_does_not_fit_is_refused(method: str) -> None:
    model = random_transformer()
    adapter = adapter_of(fresh(model, method), method)
    other = random_transformer(config_of(hidden_size=64, head_dim=16))
    with pytest.raises(CheckpointError, match="do not fit"):
        STRATEGIES[method](None, Target(other), adapter=adapter)
    network = fresh(model, method)
    with pytest.raises(CheckpointError, match="do not fit"):
        load_network(network, {"strange": torch.zeros(2)})


@every_method
def test_settings_out_of_range_are_refused(method: str) -> None:
    for name in ("tokens", "width", "branches"):
        with pytest.raises(UsageError, match=f"{method}: {name}=0"):
            CONFIGS[method](**{name: 0})
    with pytest.raises(UsageError, match="steps=0"):
        FITS[method](steps=0)


def test_a_tree_grows_where_the_chances_are() -> None:
    """The best nodes of all levels, and the likeliest path first."""
    levels = [[[(1, 0.6), (2, 0.3)]], [[(3, 0.9), (4, 0.05)], [(5, 0.5), (6, 0.4)]]]
    asked = []

    def expand(parents: list[int], tokens: list[int]) -> draft_growth.Level:
        asked.append((parents, tokens))
        return levels[len(asked) - 1]

    grower = draft_growth.Grower(draft_growth.Gate(False), draft_growth.Shape(4, 2, 2, 2))
    draft = grower.grow(0, 9, expand)
    assert asked == [([-1], [0]), ([0, 0], [1, 2])]
    assert (draft.tokens, draft.parents) == ([0, 1, 3, 2, 5], [-1, 0, 1, 0, 3])
    assert grower.grow(0, 1, lambda parents, tokens: levels[0]).tokens == [0, 1]


def test_the_gate_closes_on_guesses_that_are_never_right_and_opens_again() -> None:
    gate = draft_growth.Gate()
    grower = draft_growth.Grower(gate, draft_growth.Shape(4, 3, 2, 1))
    right, drafted, expanded = False, [], 0

    def expand(parents: list[int], tokens: list[int]) -> draft_growth.Level:
        nonlocal expanded
        expanded += 1
        return [[(1, 0.8), (2, 0.1)]]

    for round_number in range(400):
        right = round_number >= 150
        drafted.append(len(grower.grow(0, 9, expand).tokens) - 1)
        grower.began -= 0.02 * (1 + 0.3 * drafted[-1])  # what the pass takes
        grower.accepted([1, 1, 1] if right else [3])
        if round_number == 149:
            assert sum(drafted[-40:]) == 0 and expanded < 150  # and most rounds do not even ask
    assert sum(drafted[-20:]) >= 40
