"""Every registered way of decoding, at the edges: where the context ends, at stops, in batches, over strict caches.

Methods are found in the registry: a new one is tested without a change here, with its default settings until `SETTINGS`
has others. What is learnt from a model is not here: those methods have tests of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fewer.decoding.counts import Counts
from fewer.decoding.generate import generate
from fewer.decoding.sampling import SamplingConfig
from fewer.errors import UsageError
from fewer.language_model import Generation, LanguageModel, load
from fewer.recipe import Recipe
from fewer.registry import methods
from tests.tiny_model import write_model

CONTEXT = 96
SETTINGS = {"draft-model": "model={folder},tokens=6"}
METHODS = [each.name for each in methods("decoding") if each.learnt_by is None]
LOSSLESS = [each.name for each in methods("decoding") if each.learnt_by is None and each.lossless]
STRICT = [each.name for each in methods("cache") if getattr(each.target, "slack", None) == 0]
PROMPT = "the cat sat on the mat and the cat sat on the"
GREEDY = SamplingConfig()


class Models:
    """The same weights under every way of decoding; the model says again and again what it has just read."""

    def __init__(self, folder: Path):
        self.folder = write_model(folder, seed=4, context=CONTEXT, layers=4, spread=1.4)
        self.plain = load(self.folder, weights="dense", dtype="float32")
        self.known = {"plain": self.plain}

    def spec(self, name: str) -> str:
        return f"{name}:{SETTINGS.get(name, '').format(folder=self.folder)}".rstrip(":")

    def __getitem__(self, name: str) -> LanguageModel:
        if name not in self.known:
            recipe = Recipe("dense", decoding=self.spec(name), dtype="float32")
            self.known[name] = self.plain.with_recipe(recipe)
        return self.known[name]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    with pytest.MonkeyPatch.context() as patch:
        made = Models(tmp_path_factory.mktemp("models") / "tiny")
        patch.setenv("FEWER_HOME", str(tmp_path_factory.mktemp("home")))
        yield made


@pytest.mark.parametrize("name", METHODS)
def test_the_contexts_end_ends_the_text_also_inside_a_draft(models: Models, name: str) -> None:
    """For every distance to the end, so that some draft reaches over it; the last token needs no room."""
    model = models[name]
    for length in range(CONTEXT - 9, CONTEXT + 1):
        prompt = (model.encode(PROMPT, raw=True) * 9)[:length]
        session, text, finished = model.session(), list[int](), None
        for event in generate(session, [prompt], GREEDY, model.strategy, 40):
            text, finished = text + event.tokens, event.finished
        assert (len(text), finished, session.lengths) == (CONTEXT - length + 1, "length", [CONTEXT])
        if name in LOSSLESS:
            plain = generate(models.plain.session(), [prompt], GREEDY, None, 40)
            assert text == [token for event in plain for token in event.tokens]


@pytest.mark.parametrize("name", LOSSLESS)
def test_a_stop_string_ends_the_text_where_it_does_in_plain_decoding(models: Models, name: str) -> None:
    whole = models.plain.generate(PROMPT, raw=True, max_tokens=48).text
    for start in range(0, len(whole) - 4, 5):
        stop = whole[start : start + 4]
        expected, result = models.plain.generate(PROMPT, True, 48, stop=[stop]), Generation()
        pieces = list(models[name].stream(PROMPT, True, 48, stop=[stop], result=result))
        assert "".join(pieces) == result.text == expected.text
        assert (result.tokens, result.finish_reason) == (expected.tokens, "stop")
        assert all(stop <= len(result.tokens) for _, stop, _ in result.drafts)


@pytest.mark.parametrize("name", LOSSLESS)
def test_rows_that_finish_at_different_times_are_what_they_are_alone(models: Models, name: str) -> None:
    """By stop tokens, by the context's end and by max_tokens; a row that is over changes nothing for the others."""
    model = models[name]
    words = model.encode(PROMPT, raw=True)
    prompts = [words * 2, words[:7], (words * 9)[: CONTEXT - 20], words[3:] * 3]
    plain = [list(generate(models.plain.session(), [prompt], GREEDY, None, 36)) for prompt in prompts]
    texts = [[token for event in events for token in event.tokens] for events in plain]
    stops = {texts[0][12], texts[3][25]}
    expected = [text[: next((n for n, token in enumerate(text, 1) if token in stops), len(text))] for text in texts]
    assert len({len(text) for text in expected}) >= 3
    session, counts = model.session(len(prompts)), Counts()
    found: list[list[int]] = [[] for _ in prompts]
    for event in generate(session, prompts, GREEDY, model.strategy, 36, stops, counts=counts):
        assert found[event.row] != expected[event.row] and event.guessed <= len(event.tokens)
        found[event.row] += event.tokens
    assert found == expected
    assert session.lengths == [len(p) + len(text) - 1 for p, text in zip(prompts, expected, strict=True)]
    assert counts.emitted == sum(map(len, expected)) - len(prompts)


@pytest.mark.parametrize("cache", STRICT)
@pytest.mark.parametrize("name", [name for name in METHODS if name != "plain"])
def test_a_cache_that_cannot_roll_back_is_refused_before_a_file_is_opened(
    models: Models, name: str, cache: str
) -> None:
    with pytest.raises(UsageError, match=f"cache={cache} can take back none: use decoding=plain or cache=full"):
        Recipe(cache=cache, decoding=models.spec(name))
