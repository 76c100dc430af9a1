"""The runner: the fastest way and the general way agree, and output that is not finite is named, never handed on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fewer.cache import FullCache, SinkWindowCache, SinkWindowConfig
from fewer.engine.runner import Runner
from fewer.errors import NumericalError
from fewer.model.step import Step
from fewer.model.transformer import Transformer
from fewer.slots import DraftTree
from tests.random_model import CONFIG, CPU, config_of, new_session, random_tokens, random_transformer

TEXT = random_tokens(40, seed=2)


def embedding(model: Transformer) -> None:
    model.embed.weight[:, 0] = torch.nan  # type: ignore[attr-defined]


def output_projection(model: Transformer) -> None:
    model.layers[1].attention.o.format.weight[0, 0] = torch.inf  # type: ignore[attr-defined]


def values(model: Transformer) -> None:
    model.layers[2].attention.qkv.format.weight[-1] = torch.nan  # type: ignore[attr-defined]


def first_norm(model: Transformer) -> None:
    norm = model.layers[0].attention_norm
    assert norm is not None
    norm[3] = torch.nan


def final_norm(model: Transformer) -> None:
    model.norm[0] = torch.nan


DAMAGES = [
    (embedding, "already in the embeddings"),
    (first_norm, "first in layer 0"),
    (output_projection, "first in layer 1"),
    (values, "first in layer 2"),
    (final_norm, "in the final norm or the output head"),
]
every_damage = pytest.mark.parametrize(("damage", "place"), DAMAGES)


@every_damage
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("sliding", [None, 8])
def test_the_place_of_the_damage_is_named_in_every_kind_of_step(
    damage: Callable[[Transformer], None], place: str, batch: int, sliding: int | None
) -> None:
    model = random_transformer(config_of(sliding_window=sliding))
    session = new_session(model, batch)
    session.prefill([TEXT[:6]] * batch)
    damage(model)
    tree = DraftTree([1, 2, 3], [-1, 0, 0])
    steps: list[Callable[[], object]] = [
        lambda: session.prefill([TEXT[:4]] * batch),
        lambda: session.decode([2] * batch),
        lambda: session.verify([tree] * batch),
    ]
    for step in steps:
        with pytest.raises(NumericalError, match=f"not finite \\({place}\\)"):
            step()
        assert session.lengths == [6] * batch  # nothing of the failed step is kept


@pytest.mark.parametrize("batch", [1, 2])
def test_damage_is_found_in_a_long_prompt_whichever_chunk_meets_it(batch: int) -> None:
    for token in (TEXT[0], TEXT[-1]):
        model = random_transformer()
        model.embed.weight[token] = torch.nan  # type: ignore[attr-defined]
        session = new_session(model, batch)
        session.runner.chunk = 8
        with pytest.raises(NumericalError, match="not finite"):
            session.prefill([TEXT] * batch)
        session.rollback([0] * batch)  # the session can be used again
        clean = [t for t in range(CONFIG.vocab_size) if t != token][: 3 + batch]
        rows = [clean, clean[:2]][:batch]
        torch.testing.assert_close(session.prefill(rows), new_session(random_transformer(), batch).prefill(rows))


@pytest.mark.parametrize("windowed", [False, True])
def test_decode_one_equals_a_step_of_one_token(windowed: bool) -> None:
    model = random_transformer()
    runner = Runner(model)

    def cache() -> FullCache | SinkWindowCache:
        if windowed:
            return SinkWindowCache(CONFIG, 1, 64, torch.float32, CPU, SinkWindowConfig(2, 6))
        return FullCache(CONFIG, 1, 64, torch.float32, CPU)

    one, other = cache(), cache()
    for position, token in enumerate(TEXT[:20]):
        logits = runner.decode_one(token, position, one)
        step = Step(torch.tensor([[token]]), torch.tensor([[position]]), role="generated")
        output = runner.step(step, other)
        other.commit([1])
        assert output.logits is not None
        torch.testing.assert_close(logits, output.logits, atol=1e-4, rtol=1e-4)
    assert one.lengths == other.lengths == [20]


def test_a_step_may_ask_for_all_logits_none_or_hidden_states() -> None:
    model = random_transformer()
    runner = Runner(model)

    def step(logits: str, taps: tuple[int, ...] = ()):  # type: ignore[no-untyped-def]
        cache = FullCache(CONFIG, 2, 64, torch.float32, CPU)
        tokens = torch.tensor([TEXT[:5], TEXT[5:10]])
        positions = torch.arange(5).expand(2, -1)
        return runner.step(Step(tokens, positions, lengths=[5, 3], logits=logits, taps=taps), cache)  # type: ignore[arg-type]

    every, last, none = step("all", (0, 2)), step("last"), step("none", (3,))
    assert every.logits.shape == (2, 5, CONFIG.vocab_size)
    torch.testing.assert_close(last.logits, torch.stack([every.logits[0, 4], every.logits[1, 2]]))
    assert none.logits is None and none.hidden is None
    assert {layer: tap.shape for layer, tap in every.taps.items()} == {0: (2, 5, 32), 2: (2, 5, 32)}
    torch.testing.assert_close(every.taps[0][0], model.embed.rows(torch.tensor(TEXT[:5])))
    assert set(none.taps) == {3} and not last.taps
