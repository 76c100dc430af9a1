"""Each cutting rule against the expression its model publishes, run by another engine (the `regex` package)."""

from __future__ import annotations

import pytest
import regex

from fewer.checkpoint.pre_tokenizers import build_normalizer, build_pre_tokenizer, find_rule
from fewer.errors import CheckpointError
from tests.checkpoint.vocabularies import TEXTS

# As the tokenizer.json or tiktoken file of a model of that kind spells them.
GPT2 = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
GPT4O = "|".join([
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+",
])  # fmt: skip
TEKKEN = GPT4O.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "").replace(r"\p{N}{1,3}", r"\p{N}")
PUBLISHED = {
    "gpt-2": GPT2,
    "llama-bpe": LLAMA3,
    "dbrx": LLAMA3,
    "qwen2": LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),
    "gpt-4o": GPT4O,
    "tekken": TEKKEN,
}


def cuts(kind: str, text: str) -> list[str]:
    """The words that a rule makes of a text, as text."""
    places = build_pre_tokenizer(find_rule(kind)).pre_tokenize_str(text)
    return [text[start:stop] for _, (start, stop) in places]


@pytest.mark.parametrize("kind", PUBLISHED)
def test_words_are_those_of_the_published_expression(kind: str) -> None:
    for text in TEXTS:
        expected = regex.findall(PUBLISHED[kind], text)
        assert "".join(expected) == text and cuts(kind, text) == expected, text


def test_smollm_cuts_every_digit_alone_and_then_as_gpt2() -> None:
    for text in TEXTS:
        pieces = [piece for piece in regex.split(r"(\p{N})", text) if piece]
        expected = [word for piece in pieces for word in regex.findall(GPT2, piece)]
        assert cuts("smollm", text) == expected, text


def test_deepseek_cuts_numbers_and_han_before_words() -> None:
    assert cuts("deepseek-v3", "In 12345 日本語, done!") == ["In", " ", "123", "45", " ", "日本語", ",", " done", "!"]


def test_falcon_cuts_signs_and_threes_of_digits() -> None:
    assert cuts("falcon", "a+b 1234") == ["a", "+", "b", " ", "123", "4"]


@pytest.mark.parametrize("kind", ["default", "olmo", "qwen35", "deepseek-v3", "falcon", "command-r", "llama4"])
def test_no_rule_loses_a_character(kind: str) -> None:
    for text in TEXTS:
        assert "".join(cuts(kind, text)) == text


def test_only_the_rules_that_say_so_compose_characters() -> None:
    composed = {kind for kind in ("qwen2", "olmo", "llama-bpe", "gpt-2") if build_normalizer(find_rule(kind))}
    assert composed == {"qwen2", "olmo"}


def test_an_unknown_rule_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(CheckpointError, match="'gpt-9' is not known: known are .*llama-bpe.*qwen2"):
        find_rule("gpt-9")
