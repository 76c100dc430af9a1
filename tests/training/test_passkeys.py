"""The haystack and its passkeys: exact lengths, needles where they should be, labels on what is asked for."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from fewer.checkpoint.tokenizer import Tokenizer
from fewer.errors import UsageError
from fewer.training.haystack import Haystack, filler
from fewer.training.passkeys import (
    KINDS,
    NATO,
    ORDINALS,
    PasskeyBatches,
    PasskeyConfig,
    hidden_answer,
    passkey,
    question,
)
from tests.tiny_model import write_tokenizer

SMALL = PasskeyConfig(passkeys=3, words=4, shortest=1200, longest=2000, lengths=5)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def haystack(tokenizer: Tokenizer) -> Haystack:
    return Haystack(filler(0, 300), tokenizer)


def test_the_built_in_text_is_seeded_varied_and_looks_like_no_passkey() -> None:
    text = filler(3, 400)
    assert text == filler(3, 400) != filler(4, 400)
    sentences = [line for line in text.replace("\n\n", " ").split(". ") if line]
    assert len(set(sentences)) > 0.98 * len(sentences)
    words = {word.strip(".,“”").lower() for word in text.split()}
    assert not words & set(NATO) and not any(word.isdigit() for word in words)
    assert "passkey" not in words and text[0].isupper() and "\n\n" in text


def test_pieces_join_to_the_text_and_end_with_its_sentences(haystack: Haystack, tokenizer: Tokenizer) -> None:
    pieces = haystack.pieces(900)
    joined = tokenizer.decode([token for piece in pieces for token in piece])
    assert sum(map(len, pieces)) == 900 and filler(0, 300).startswith(joined)
    assert len(haystack) == 300


def test_a_short_text_starts_again_and_one_without_full_stops_is_cut(tokenizer: Tokenizer) -> None:
    short = Haystack("The cat sat. The dog sat.", tokenizer)
    assert sum(map(len, short.pieces(500, start=1))) == 500
    endless = Haystack("cat " * 600, tokenizer)
    assert max(map(len, endless.pieces(500))) <= 64
    with pytest.raises(UsageError, match="holds no text"):
        Haystack(" \n", tokenizer)


@pytest.mark.parametrize("depth", [0.0, 0.3, 0.5, 1.0])
def test_a_needle_stands_between_sentences_at_its_depth(haystack: Haystack, tokenizer: Tokenizer, depth: float) -> None:
    needle = tokenizer.encode("\n\nNEEDLE\n\n", bos=False)
    tokens = haystack.hide([(depth, needle)], 1500)
    before, after = tokenizer.decode(tokens).split("\n\nNEEDLE\n\n")
    assert len(tokens) == 1500 + len(needle)
    assert before + after == tokenizer.decode(haystack.hide([], 1500))
    share = len(tokenizer.encode(before, bos=False)) / 1500
    assert abs(share - depth) < 0.04  # half a sentence
    assert not before or depth == 1 or before.endswith((".", "”"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [300, 777])
def test_prompt_and_answer_have_the_length_asked_for_and_the_answer_is_hidden_once(
    haystack: Haystack, tokenizer: Tokenizer, kind: str, length: int
) -> None:
    asked = question(kind, random.Random(5), 4)  # type: ignore[arg-type]
    hidden = hidden_answer(haystack, asked, 0.5, length)
    prompt = tokenizer.decode(hidden.prompt)
    assert len(hidden.prompt) + len(hidden.answer) == length
    assert tokenizer.decode(hidden.answer).strip() == asked.answer
    assert prompt.count(asked.answer) == 1 and prompt.endswith(asked.cue)
    assert asked.needle.strip() in prompt
    with pytest.raises(UsageError, match="leaves no room for text"):
        hidden_answer(haystack, asked, 0.5, 60)


def test_a_passkey_is_words_of_the_alphabet() -> None:
    words = passkey(random.Random(0), 8).split()
    assert len(words) == 8 and set(words) <= set(NATO) and len(set(NATO)) == 26
    assert passkey(random.Random(0), 8) == " ".join(words)


def test_training_contexts_hide_every_passkey_in_order_and_ask_for_each(
    haystack: Haystack, tokenizer: Tokenizer
) -> None:
    batch = PasskeyBatches(haystack, SMALL, seed=1).batch(3)
    text = tokenizer.decode(batch.tokens[0].tolist())
    story, tail = text.split("That was the end of the story.")
    places = [story.index(f"The {ordinal} passkey to the vault is ") for ordinal in ORDINALS[:3]]
    assert places == sorted(places)
    for ordinal in ORDINALS[:3]:
        key = story.split(f"The {ordinal} passkey to the vault is ")[1].split(".")[0]
        assert len(key.split()) == 4
        assert f"What is the {ordinal} passkey to the vault? The {ordinal} passkey to the vault is {key}." in tail
    assert tokenizer.decode(batch.tokens[0][batch.labels[0]].tolist()) == tail


def test_labels_may_be_the_answers_alone(haystack: Haystack, tokenizer: Tokenizer) -> None:
    config = PasskeyConfig(passkeys=2, words=4, shortest=1000, longest=1000, lengths=1, labels="answers")
    batch = PasskeyBatches(haystack, config).batch(0)
    labelled = tokenizer.decode(batch.tokens[0][batch.labels[0]].tolist())
    assert [set(part.split()) <= set(NATO) for part in labelled.strip(" .").split(".")] == [True, True]


def test_batches_depend_on_seed_and_number_alone_and_an_epoch_has_each_length_once(haystack: Haystack) -> None:
    batches, again = PasskeyBatches(haystack, SMALL, 7), PasskeyBatches(haystack, SMALL, 7)
    assert torch.equal(batches.batch(6).tokens, again.batch(6).tokens)
    assert batches.fingerprint == again.fingerprint != PasskeyBatches(haystack, SMALL, 8).fingerprint
    sizes = [batches.batch(index).tokens.shape[1] for index in range(10)]
    assert sorted(sizes[:5]) == sorted(sizes[5:]) == batches.lengths
    assert all(size % 16 == 0 for size in sizes) and sizes[:5] != sizes[5:]
    assert not torch.equal(batches.batch(0, 1200).tokens, batches.batch(5, 1200).tokens)  # fresh passkeys


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"passkeys": 0}, "passkeys=0"),
        ({"passkeys": 17}, "1 to 16"),
        ({"words": 0}, "words=0"),
        ({"shortest": 8}, "contexts of 8"),
        ({"shortest": 3000, "longest": 2000}, "contexts of 3000 to 2000"),
        ({"passkeys": 16, "shortest": 320}, "leave no room for text"),
    ],
)
def test_impossible_contexts_are_refused(haystack: Haystack, settings: dict[str, int], part: str) -> None:
    with pytest.raises(UsageError, match=part):
        PasskeyBatches(haystack, PasskeyConfig(**settings))  # type: ignore[arg-type]


def test_a_model_that_wants_a_bos_gets_one_at_the_front_alone(tmp_path: Path) -> None:
    folder = tmp_path / "bos"
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<|endoftext|>", "add_bos_token": true}')
    tokenizer = write_tokenizer(folder)
    hidden = hidden_answer(Haystack(filler(0, 50), tokenizer), question("passkey", random.Random(1), 3), 0.5, 400)
    assert hidden.prompt.count(tokenizer.bos_token) == 1 and hidden.prompt[0] == tokenizer.bos_token
