"""Sessions: chunks, ragged batches, trees, commits and rollbacks equal one plain forward pass over the text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fewer.cache import FullCache, SinkWindowCache, SinkWindowConfig
from fewer.engine.runner import Runner
from fewer.engine.session import Session, ancestors
from fewer.errors import NumericalError, UsageError
from fewer.model.config import ModelConfig
from fewer.model.step import Step
from fewer.model.transformer import Transformer
from fewer.slots import DraftTree
from tests.random_model import CONFIG, config_of, new_session, random_tokens, random_transformer


@dataclass(frozen=True)
class Case:
    """A model and the cache it runs with."""

    name: str
    config: ModelConfig
    make: Callable[..., object] = FullCache
    settings: tuple[object, ...] = ()

    def __str__(self) -> str:
        return self.name

    def session(self, batch: int = 1, chunk: int | None = None) -> Session:
        runner = Runner(self.model())
        runner.chunk = chunk or runner.chunk
        return new_session(runner.model, batch, self.make, *self.settings, runner=runner)  # type: ignore[arg-type]

    def model(self) -> Transformer:
        if self.name not in MODELS:
            MODELS[self.name] = random_transformer(self.config)
        return MODELS[self.name]


MODELS: dict[str, Transformer] = {}
GEMMA = config_of(sliding_window=20, sliding_layers=(True, False, True), attention_softcap=8.0, local_rope_theta=500.0)
CASES = [
    Case("gqa", CONFIG),
    Case("mha", config_of(kv_heads=4)),
    Case("mqa-nope", config_of(kv_heads=1, rope_layers=(True, False, True))),
    Case("windows", config_of(sliding_window=20)),
    Case("local-and-global", GEMMA),
    Case("sink-window", CONFIG, SinkWindowCache, (SinkWindowConfig(3, 17),)),
    Case("renumbered", CONFIG, SinkWindowCache, (SinkWindowConfig(3, 17, True),)),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
TEXT = random_tokens(220, seed=5)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@every_case
def test_chunked_prefill_equals_one_shot(case: Case) -> None:
    expected = case.session(chunk=512).prefill([TEXT])
    for chunk in (1, 7, 64):
        close(case.session(chunk=chunk).prefill([TEXT]), expected)


@every_case
def test_decoding_equals_prefill_of_the_same_text(case: Case) -> None:
    session = case.session()
    session.prefill([TEXT[:10]])
    for end in range(11, 60):
        logits = session.decode([TEXT[end - 1]])
        if end % 8 == 0:
            close(logits, case.session().prefill([TEXT[:end]]))
    assert session.lengths == [59] and session.passes == 49


@every_case
def test_batches_of_unequal_lengths_equal_single_runs(case: Case) -> None:
    lengths = [41, 3, 90]
    batch = case.session(3, chunk=16)
    logits = batch.prefill([TEXT[:length] for length in lengths])
    singles = [case.session() for _ in lengths]
    for row, (single, length) in enumerate(zip(singles, lengths, strict=True)):
        close(logits[row], single.prefill([TEXT[:length]])[0])
    for offset in range(4):
        tokens = [TEXT[length + offset] for length in lengths]
        logits = batch.decode(tokens)
        for row, single in enumerate(singles):
            close(logits[row], single.decode([tokens[row]])[0])
    assert batch.lengths == [45, 7, 94]


@every_case
def test_inactive_rows_stay_as_they_were(case: Case) -> None:
    batch, alone = case.session(3), case.session()
    batch.prefill([TEXT[:30], TEXT[:30], TEXT[:5]])
    alone.prefill([TEXT[:30]])
    for _ in range(3):
        batch.decode([1, 0, 2], [True, False, False])
    assert batch.lengths == [33, 30, 5]
    for token in (4, 9):
        close(batch.decode([0, token, 0], [False, True, False])[1], alone.decode([token])[0])


def test_a_row_that_holds_nothing_yet_may_be_inactive() -> None:
    batch, alone = new_session(random_transformer(), 2), new_session(random_transformer())
    close(batch.decode([7, 0], [True, False])[0], alone.decode([7])[0])
    assert batch.lengths == [1, 0]


def test_soft_tokens_that_are_the_embeddings_give_the_same_logits() -> None:
    model = random_transformer()
    rows = [TEXT[:9], TEXT[:4]]
    soft = [model.embed.rows(torch.tensor(row)) for row in rows]
    close(new_session(model, 2).prefill_embeddings(soft), new_session(model, 2).prefill(rows))


# ── trees ────────────────────────────────────────────────────────────────────────────────────────────────────────────

PARENTS = [-1, 0, 0, 1, 1, 2, 5, 5, 4, 6]  # two branches from the root, of four levels


def tree_of(root: int, seed: int) -> DraftTree:
    return DraftTree([root, *random_tokens(len(PARENTS) - 1, seed=seed)], list(PARENTS))


def path_to(tree: DraftTree, node: int) -> list[int]:
    path = [node]
    while path[0]:
        path.insert(0, tree.parents[path[0]])
    return path


@every_case
@pytest.mark.parametrize("length", [4, 30, 150])
def test_logits_of_tree_nodes_equal_a_fresh_forward_over_their_path(case: Case, length: int) -> None:
    session, tree = case.session(), tree_of(TEXT[length], length)
    session.prefill([TEXT[:length]])
    (logits,) = session.verify([tree])
    assert logits is not None
    for node in (0, 3, 8, 7, 9):
        path = [tree.tokens[at] for at in path_to(tree, node)]
        close(logits[node], case.session().prefill([[*TEXT[:length], *path]])[0])


@every_case
def test_rows_verify_trees_of_their_own_and_go_on_alone(case: Case) -> None:
    """A tree, nothing, a chain: then each row keeps another number of nodes."""
    batch, lengths = case.session(3), [12, 40, 25]
    batch.prefill([TEXT[:length] for length in lengths])
    tree = tree_of(TEXT[12], 3)
    chain = DraftTree([TEXT[25], 3, 4, 5], [-1, 0, 1, 2])
    logits = batch.verify([tree, None, chain])
    assert logits[1] is None and logits[2] is not None
    path = path_to(tree, 9)
    batch.commit([path, [], [0, 1]])
    assert batch.lengths == [12 + len(path), 40, 27]
    texts = [TEXT[:12] + [tree.tokens[node] for node in path], TEXT[:40], [*TEXT[:26], 3]]
    close(logits[2][1], case.session().prefill([texts[2]])[0])
    after = batch.decode([1, 2, 3])
    for row, text in enumerate(texts):
        close(after[row], case.session().prefill([[*text, row + 1]])[0])


@every_case
def test_after_a_commit_the_cache_equals_a_fresh_prefill(case: Case) -> None:
    """Keys and values of every layer, wherever both caches still hold the position."""
    session = case.session()
    session.prefill([TEXT[:30]])
    text = TEXT[:30]
    for seed in range(12):
        tree = tree_of(TEXT[seed], seed)
        session.verify([tree])
        path = path_to(tree, [9, 8, 0, 7][seed % 4])
        session.commit([path])
        text = text + [tree.tokens[node] for node in path]
    fresh = case.session()
    fresh.prefill([text])
    assert session.lengths == fresh.lengths == [len(text)]
    for index, (mine, other) in enumerate(zip(session.cache.layers, fresh.cache.layers, strict=True)):
        at, places = session.cache.positions(0, index), fresh.cache.positions(0, index)
        both = sorted(set(at.tolist()) & set(places.tolist()))
        assert both[-17:] == list(range(len(text) - 17, len(text)))
        left, right = (torch.tensor([held.tolist().index(p) for p in both]) for held in (at, places))
        close(mine.keys[0][:, left], other.keys[0][:, right])  # type: ignore[attr-defined]
        close(mine.values[0][:, left], other.values[0][:, right])  # type: ignore[attr-defined]


@every_case
def test_rollback_then_the_same_tokens_give_the_same_logits(case: Case) -> None:
    session = case.session()
    session.prefill([TEXT[:150]])
    first = [session.decode([token]) for token in TEXT[150:170]]
    session.rollback([150])
    assert session.lengths == [150]
    for token, expected in zip(TEXT[150:170], first, strict=True):
        close(session.decode([token]), expected)
    session.rollback([400])  # more than there is: nothing happens
    assert session.lengths == [170]


def test_the_ancestor_matrix_follows_parents() -> None:
    mask = ancestors([[-1, 0, 1, 0], [-1]], 4)
    assert mask[0].long().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]]
    assert torch.equal(mask[1], torch.eye(4, dtype=torch.bool))


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_context_overflow_is_one_sentence_and_changes_nothing() -> None:
    session = new_session(random_transformer(), context=40)
    with pytest.raises(UsageError, match=r"^41 tokens do not fit the model's context of 40: .*[^\n]$"):
        session.prefill([TEXT[:41]])
    assert session.lengths == [0]
    session.prefill([TEXT[:39]])
    with pytest.raises(UsageError, match="43 tokens do not fit"):
        session.verify([DraftTree([1, 2, 3, 4], [-1, 0, 1, 2])])
    session.decode([1])
    with pytest.raises(UsageError, match="41 tokens do not fit"):
        session.decode([1])
    assert session.lengths == [40]


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(UsageError, match="a prompt is empty"):
        new_session(random_transformer(), 2).prefill([[1], []])


@pytest.mark.parametrize("batch", [1, 3])
def test_values_that_are_not_finite_are_named_and_the_session_goes_on(batch: int) -> None:
    model = random_transformer()
    session = new_session(model, batch)
    rows = [TEXT[: 9 + 4 * row] for row in range(batch)]
    session.prefill(rows)
    broken = [torch.full((5, CONFIG.hidden_size), torch.nan)] * batch
    with pytest.raises(NumericalError, match=r"not finite \(already in the embeddings\)"):
        session.prefill_embeddings(broken)
    assert session.lengths == [len(row) for row in rows]
    expected = new_session(model, batch)
    expected.prefill(rows)
    close(session.decode([1] * batch), expected.decode([1] * batch))


@pytest.mark.parametrize("one_token", [False, True])
def test_a_damaged_layer_is_named(one_token: bool) -> None:
    model = random_transformer()
    session = new_session(model)
    session.prefill([TEXT[:6]])
    model.layers[1].feed_forward.down.format.weight[0, 0] = torch.inf  # type: ignore[union-attr]
    with pytest.raises(NumericalError, match=r"not finite \(first in layer 1\)"):
        session.decode([3]) if one_token else session.prefill([[3, 4]])
    assert session.lengths == [6]


def test_a_layer_plan_in_one_text_does_not_disturb_the_next() -> None:
    model = random_transformer()
    session = new_session(model)
    plan = torch.ones(1, 4, 3, dtype=torch.bool)
    plan[0, 1, 1] = False
    session.cache.reserve(4)
    model.forward(Step(torch.tensor([TEXT[:4]]), torch.arange(4)[None], layer_plan=plan), session.cache)
    session.cache.commit([4])
    session.rollback([0])
    close(session.prefill([TEXT[:9]]), new_session(model).prefill([TEXT[:9]]))
