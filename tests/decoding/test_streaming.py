"""Text as it comes: pieces join to the text, characters stay whole, stop strings end it at one place for every way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewer.checkpoint.tokenizer import Tokenizer
from fewer.decoding.sampling import SamplingConfig
from fewer.errors import UsageError
from fewer.language_model import Generation, LanguageModel, load
from tests.tiny_model import write_model, write_tokenizer

PROMPT = "the cat sat on the mat and the"
HOT = SamplingConfig(temperature=1.5, seed=5)
GREEDY = SamplingConfig()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("streaming") / "tiny")


@pytest.fixture(scope="module")
def models(folder: Path) -> dict[str, LanguageModel]:
    """The same weights, decoded in three ways; the draft model is the model itself and guesses right."""
    specs = {"plain": "plain", "prompt-lookup": "prompt-lookup", "draft-model": f"draft-model:model={folder},tokens=6"}
    return {name: load(folder, weights="dense", dtype="float32", decoding=spec) for name, spec in specs.items()}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


every_way = pytest.mark.parametrize("way", ["plain", "prompt-lookup", "draft-model"])


@every_way
@pytest.mark.parametrize("sampling", [GREEDY, HOT], ids=["greedy", "sampled"])
def test_pieces_join_to_the_text_of_the_tokens(
    models: dict[str, LanguageModel], way: str, sampling: SamplingConfig
) -> None:
    model, result = models[way], Generation()
    pieces = list(model.stream(PROMPT, max_tokens=60, sampling=sampling, result=result))
    assert all(pieces)
    assert "".join(pieces) == result.text == model.tokenizer.decode(result.tokens)
    assert len(result.tokens) == 60 or result.finish_reason == "stop"


def test_every_way_gives_the_same_greedy_answer(models: dict[str, LanguageModel]) -> None:
    plain, drafted = (models[way].generate(PROMPT, max_tokens=43, logprobs=True) for way in ("plain", "draft-model"))
    assert models["prompt-lookup"].generate(PROMPT, max_tokens=43).tokens == plain.tokens == drafted.tokens
    assert drafted.logprobs == pytest.approx(plain.logprobs, abs=1e-4)
    assert (plain.target_passes, plain.tokens_per_pass) == (42, 1.0)
    assert (drafted.target_passes, drafted.tokens_per_pass) == (6, 7.0)


@every_way
@pytest.mark.parametrize("start", [0, 3, 8, 21])
def test_a_stop_string_ends_text_tokens_and_scores_at_one_place(
    models: dict[str, LanguageModel], way: str, start: int
) -> None:
    """Also inside an accepted draft: nothing behind the stop string becomes part of the answer."""
    whole = models["plain"].generate(PROMPT, max_tokens=60)
    stop = whole.text[start : start + 3]
    shown, result = "", Generation()
    for piece in models[way].stream(PROMPT, max_tokens=60, stop=["never there", stop], result=result, logprobs=True):
        shown += piece
    assert shown == result.text == whole.text[: whole.text.find(stop)]
    assert result.finish_reason == "stop"
    assert result.tokens == whole.tokens[: len(result.tokens)]
    decode = models[way].tokenizer.decode
    assert stop in decode(result.tokens) and stop not in decode(result.tokens[:-1])
    assert result.logprobs is not None and len(result.logprobs) == len(result.tokens)


@every_way
def test_figures_are_there_when_the_reader_leaves_early(models: dict[str, LanguageModel], way: str) -> None:
    result = Generation()
    stream = models[way].stream(PROMPT, result=result)
    next(stream)
    assert isinstance(stream, Iterator)
    stream.close()  # type: ignore[attr-defined]
    assert result.prefill_seconds > 0 and result.kv_bytes > 0 and result.tokens and result.prompt_tokens > 20


@pytest.mark.parametrize("sampling", [GREEDY, HOT], ids=["greedy", "sampled"])
@pytest.mark.parametrize("way", ["plain", "prompt-lookup"])
def test_a_batch_equals_single_runs(models: dict[str, LanguageModel], way: str, sampling: SamplingConfig) -> None:
    prompts, model = [PROMPT, "a", "def add(left, right):\n"], models[way]
    batch = model.generate_batch(prompts, raw=True, max_tokens=30, sampling=sampling)
    for row, (prompt, answer) in enumerate(zip(prompts, batch, strict=True)):
        own = sampling if sampling.seed is None else SamplingConfig(temperature=1.5, seed=5 + row)
        alone = model.generate(prompt, raw=True, max_tokens=30, sampling=own)
        assert (answer.text, answer.tokens, answer.finish_reason) == (alone.text, alone.tokens, alone.finish_reason)
        assert (answer.prompt_tokens, answer.target_passes) == (alone.prompt_tokens, alone.target_passes)
    assert model.generate_batch([]) == []


@pytest.mark.parametrize("max_tokens", [0, -1, -1000])
def test_max_tokens_below_one_is_refused_in_one_sentence(models: dict[str, LanguageModel], max_tokens: int) -> None:
    words = f"^max_tokens is {max_tokens}: ask for at least 1 token$"
    with pytest.raises(UsageError, match=words):
        models["plain"].generate(PROMPT, max_tokens=max_tokens)
    with pytest.raises(UsageError, match=words):
        models["plain"].generate_batch([PROMPT], max_tokens=max_tokens)
    with pytest.raises(UsageError, match=words):
        list(models["plain"].events([[1]], max_tokens))


def test_prompts_that_are_empty_or_too_long_are_refused(models: dict[str, LanguageModel]) -> None:
    model = models["plain"]
    for prompt in ("", "  \n"):
        with pytest.raises(UsageError, match="the prompt is empty"):
            model.generate(prompt)
    with pytest.raises(UsageError, match="there is no prompt"):
        list(model.events([]))
    with pytest.raises(UsageError, match="a prompt is empty"):
        list(model.events([[]]))
    with pytest.raises(UsageError, match="the prompt has 256 tokens, but the model's context holds 256"):
        list(model.events([[5] * 256]))
    with pytest.raises(UsageError, match="a stop string is empty"):
        model.generate(PROMPT, stop=[""])
    assert len(model.generate("a" * 255, raw=True, max_tokens=9).tokens) == 2  # the context's last place and one more


# ── characters ───────────────────────────────────────────────────────────────────────────────────────────────────────

FAMILY = "a 👩‍👩‍👧 é ß 漢字 नमस्ते 🏳️‍🌈 end"


def test_a_character_is_never_split(tokenizer: Tokenizer) -> None:
    """Every byte of these characters is a token of its own; a piece comes when its last byte has."""
    tokens, stream = tokenizer.encode(FAMILY), tokenizer.stream()
    assert len(tokens) > len(FAMILY)
    pieces = [stream.feed(token) for token in tokens]
    assert "".join(pieces) + stream.finish() == FAMILY
    assert "\ufffd" not in "".join(pieces) and "" in pieces
    for end in range(len(tokens)):
        assert FAMILY.startswith("".join(pieces[:end]))


@given(text=st.text(max_size=30))
def test_any_text_streams_back(tokenizer: Tokenizer, text: str) -> None:
    stream = tokenizer.stream()
    pieces = [stream.feed(token) for token in tokenizer.encode(text, special=False)]
    assert "".join(pieces) + stream.finish() == text


@given(data=st.binary(max_size=24))
def test_any_bytes_stream_as_python_decodes_them(tokenizer: Tokenizer, data: bytes) -> None:
    """Broken UTF-8 too: what a model may emit. What was shown once never changes."""
    bytes_of = {tokenizer.piece(token): token for token in range(tokenizer.vocab_size)}
    stream = tokenizer.stream()
    pieces = [stream.feed(bytes_of[bytes([byte])]) for byte in data]
    assert "".join(pieces) + stream.finish() == data.decode("utf-8", "replace")
