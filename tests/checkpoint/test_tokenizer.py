"""GGUF metadata and a Hugging Face folder of one vocabulary make the same tokenizer, before and after saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Reference

from fewer.checkpoint import tokenizer_folder, tokenizer_gguf
from fewer.checkpoint.pre_tokenizers import build_pre_tokenizer, find_rule
from fewer.checkpoint.tokenizer import Tokenizer
from fewer.errors import CheckpointError, UsageError
from tests.checkpoint.vocabularies import SPECIAL, TEXTS, byte_level, metadata_of, sentencepiece, write_folder

KINDS = ["gpt-2", "smollm", "llama-bpe", "qwen2", "gpt-4o", "tekken", "deepseek-v3", "falcon", "default", "olmo"]
CHATS = ["<s>user: hi</s>\n<s>", "</s></s>", "a<s>b c</s> d", "<unk> <s"]


def both(kind: str, folder: Path) -> tuple[Tokenizer, Tokenizer, Reference]:
    """One vocabulary of this kind from GGUF, from a folder, and as the library's own tokenizer."""
    if kind in ("llama", "gemma"):
        model, scores = sentencepiece(adds_space=kind == "llama")
        metadata = metadata_of(model, scores, add_space_prefix=kind == "llama", add_bos_token=True)
    else:
        rule = find_rule(kind)
        model = byte_level(build_pre_tokenizer(rule), rule.nfc)
        model.model.ignore_merges = rule.whole_words
        metadata = metadata_of(model, pre=kind, add_bos_token=True)
    write_folder(folder, model, add_bos_token=True)
    return tokenizer_gguf.read_tokenizer(metadata), tokenizer_folder.read_tokenizer(folder), model


@pytest.mark.parametrize("kind", [*KINDS, "llama", "gemma"])
def test_gguf_and_folder_encode_as_the_reference_and_decode_back(kind: str, tmp_path: Path) -> None:
    gguf, folder, reference = both(kind, tmp_path)
    for text in TEXTS:
        expected = reference.encode(text, add_special_tokens=False).ids
        assert gguf.encode(text, bos=False) == folder.encode(text, bos=False) == expected, text
        assert gguf.encode(text) == folder.encode(text) == [1, *expected]
        if not (find_rule(kind).nfc if kind in KINDS else False):
            assert gguf.decode(expected) == folder.decode(expected) == text
    assert (gguf.vocab_size, gguf.bos_token, gguf.eos_tokens) == (folder.vocab_size, 1, folder.eos_tokens)
    assert [gguf.piece(token) for token in range(gguf.vocab_size)] == [
        folder.piece(token) for token in range(folder.vocab_size)
    ]


@pytest.mark.parametrize("kind", ["smollm", "gemma"])
def test_special_tokens_in_a_text_are_recognised_or_spelled_out(kind: str, tmp_path: Path) -> None:
    gguf, folder, reference = both(kind, tmp_path)
    for text in CHATS:
        expected = reference.encode(text, add_special_tokens=False).ids
        assert gguf.encode(text, bos=False) == folder.encode(text, bos=False) == expected, text
        spelled = gguf.encode(text, special=False, bos=False)
        assert spelled == folder.encode(text, special=False, bos=False)
        assert not set(spelled) & {0, 1, 2} and gguf.decode(spelled) == text
    assert gguf.decode([1, *gguf.encode("cat", bos=False), 2]) == "cat"
    assert gguf.decode([1, 2], skip_special=False) == "<s></s>"


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Tokenizer, Tokenizer, Reference]]:
    return [both(kind, tmp_path_factory.mktemp(kind)) for kind in ("llama-bpe", "gpt-4o", "llama", "gemma")]


@settings(max_examples=80, deadline=None)
@given(st.text(st.characters(codec="utf-8") | st.sampled_from("  \n▁'s09Aé日"), min_size=1, max_size=40))
def test_any_text_encodes_as_the_reference(families: list[tuple[Tokenizer, Tokenizer, Reference]], text: str) -> None:
    for gguf, folder, reference in families:
        expected = reference.encode(text, add_special_tokens=False).ids
        assert gguf.encode(text, bos=False) == folder.encode(text, bos=False) == expected


def test_a_bos_that_the_text_brings_is_not_added_twice(tmp_path: Path) -> None:
    gguf, _, _ = both("smollm", tmp_path)
    assert gguf.encode("<s>cat") == gguf.encode("cat")
    assert gguf.encode("cat", bos=False) == gguf.encode("cat")[1:]


@pytest.mark.parametrize("kind", ["smollm", "llama-bpe", "llama", "gemma"])
def test_a_saved_tokenizer_loads_back_the_same(kind: str, tmp_path: Path) -> None:
    for number, tokenizer in enumerate(both(kind, tmp_path / "source")[:2]):
        saved = tmp_path / str(number)
        saved.mkdir()
        tokenizer.save(saved)
        again = tokenizer_folder.read_tokenizer(saved)
        assert again.vocabulary == tokenizer.vocabulary
        assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


@pytest.mark.parametrize("kind", ["smollm", "llama"])
def test_a_stream_never_splits_a_character_and_adds_up_to_the_text(kind: str, tmp_path: Path) -> None:
    tokenizer, _, _ = both(kind, tmp_path)
    for text in TEXTS:
        stream = tokenizer.stream()
        pieces = [stream.feed(token) for token in tokenizer.encode(text, bos=False)]
        assert all("\ufffd" not in piece for piece in pieces)
        assert "".join(pieces) + stream.finish() == text
    stream = tokenizer.stream()
    half = tokenizer.encode("😀", bos=False)[:-1]
    assert "".join(map(stream.feed, half)).strip() == "" and stream.finish() == "\ufffd"


def test_sentencepiece_spells_unknown_characters_in_bytes(tmp_path: Path) -> None:
    tokenizer, _, _ = both("gemma", tmp_path)
    tokens = tokenizer.encode("😀", bos=False)
    assert [tokenizer.vocabulary.tokens[token] for token in tokens] == ["<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]
    assert tokenizer.decode(tokens) == "😀"


def test_half_of_a_surrogate_pair_is_a_wrong_request(tmp_path: Path) -> None:
    for tokenizer in both("llama", tmp_path)[:2]:
        with pytest.raises(UsageError, match="half of a surrogate pair"):
            tokenizer.encode("a\ud83d")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, "holds no tokenizer"),
        ({"model": "bert"}, "'bert' is not supported"),
        ({"tokens": None}, "tokens is missing"),
        ({"tokens": [1, 2]}, "not a list of texts"),
        ({"pre": "unheard-of"}, "'unheard-of' is not known"),
        ({"merges": ["no such"]}, "merges does not fit"),
        ({"token_type": [1]}, "token_type has 1 entries"),
        ({"eos_token_id": 10**6}, "eos_token_id is 1000000, outside the vocabulary"),
    ],
)
def test_metadata_that_contradicts_itself_is_named(change: dict[str, Any], message: str) -> None:
    metadata = metadata_of(byte_level(build_pre_tokenizer(find_rule("smollm"))), pre="smollm")
    metadata.update({f"tokenizer.ggml.{key}": value for key, value in change.items()})
    kept = {key: value for key, value in metadata.items() if value is not None}
    with pytest.raises(CheckpointError, match=message):
        tokenizer_gguf.read_tokenizer(kept)


def test_a_folder_without_a_tokenizer_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no tokenizer.json: .*save_pretrained"):
        tokenizer_folder.read_tokenizer(tmp_path)


def test_special_names_end_a_text_only_where_the_vocabulary_marks_them(tmp_path: Path) -> None:
    gguf, _, _ = both("smollm", tmp_path)
    assert gguf.eos_tokens == {SPECIAL.index("</s>")}
