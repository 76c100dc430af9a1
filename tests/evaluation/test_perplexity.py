"""Perplexity: which tokens count, and the same figure as one prefix at a time in float64."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewer.errors import UsageError
from fewer.evaluation.perplexity import perplexity, windows
from fewer.language_model import LanguageModel, load
from tests.evaluation.conftest import TEXT


def direct_nll(model: LanguageModel, rows: list[tuple[list[int], int]]) -> tuple[float, int]:
    """Each row's tokens from the given place on, every one from a session of its own, summed in float64."""
    nll, count = 0.0, 0
    for row, first in rows:
        for place in range(first, len(row)):
            law = model.session(1, place).prefill([row[:place]])[0].double().log_softmax(-1)
            nll, count = nll - float(law[row[place]]), count + 1
    return nll, count


def test_perplexity_equals_one_prefix_at_a_time_in_float64(model: LanguageModel) -> None:
    tokens = model.tokenizer.encode(TEXT)[:40]
    result = perplexity(model, TEXT, window=16, limit=40)
    nll, count = direct_nll(model, [(tokens[0:16], 1), (tokens[16:32], 1), (tokens[32:40], 1)])
    assert (result.tokens, result.windows) == (count, 3) == (37, 3)
    assert result.nll == pytest.approx(nll, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nll / count), rel=1e-5)


def test_overlapping_windows_give_later_tokens_more_context(model: LanguageModel) -> None:
    tokens = model.tokenizer.encode(TEXT)[:30]
    result = perplexity(model, TEXT, window=16, stride=8, limit=30)
    # The second window scores only what the first has not, with eight tokens before it; and so on.
    nll, count = direct_nll(model, [(tokens[0:16], 1), (tokens[8:24], 8), (tokens[16:30], 8)])
    assert (result.tokens, count) == (29, 29)
    assert result.nll == pytest.approx(nll, rel=1e-5)


def test_a_bos_of_the_models_own_makes_the_first_token_count(folder_with_bos: Path) -> None:
    model = load(folder_with_bos, weights="dense", dtype="float32", device="cpu")
    tokens, bos = model.tokenizer.encode(TEXT, bos=False)[:20], model.tokenizer.bos_token
    assert bos is not None and model.tokenizer.adds_bos
    result = perplexity(model, TEXT, window=11, limit=20)
    nll, count = direct_nll(model, [([bos, *tokens[0:10]], 1), ([bos, *tokens[10:20]], 1)])
    assert (result.tokens, count) == (20, 20)
    assert result.nll == pytest.approx(nll, rel=1e-5)


def test_decode_path_equals_prefill_where_the_cache_keeps_everything(model: LanguageModel) -> None:
    by_prefill = perplexity(model, TEXT, window=32, stride=20, limit=70)
    by_decoding = perplexity(model, TEXT, window=32, stride=20, limit=70, decode_path=True)
    assert by_decoding.tokens == by_prefill.tokens
    assert by_decoding.nll == pytest.approx(by_prefill.nll, rel=1e-4)


def test_a_cache_that_forgets_shows_in_both_paths(folder: Path, model: LanguageModel) -> None:
    forgetful = load(folder, weights="dense", cache="sink-window:sinks=1,window=4", dtype="float32", device="cpu")
    whole = perplexity(model, TEXT, window=60, limit=60).nll
    by_prefill = perplexity(forgetful, TEXT, window=60, limit=60).nll
    by_decoding = perplexity(forgetful, TEXT, window=60, limit=60, decode_path=True).nll
    assert by_prefill == pytest.approx(by_decoding, rel=1e-4)
    assert abs(by_prefill - whole) > 0.1


@settings(max_examples=200, deadline=None)
@given(length=st.integers(2, 200), window=st.integers(2, 60), stride=st.integers(1, 60), known=st.booleans())
def test_windows_score_every_token_once_but_those_nothing_predicts(
    length: int, window: int, stride: int, known: bool
) -> None:
    stride = min(stride, window)
    parts = list(windows(length, window, stride, known))
    scored = [token for part in parts for token in range(part.scored, part.end)]
    assert scored == sorted(set(scored))
    unpredicted = set() if known else {0} if stride < window else set(range(0, length, window))
    assert set(range(length)) - set(scored) == unpredicted
    assert all(part.end - part.begin <= window and part.begin <= part.scored for part in parts)


def test_progress_ends_at_the_total(model: LanguageModel) -> None:
    seen: list[tuple[int, int]] = []
    perplexity(model, TEXT, window=16, stride=8, limit=30, on_progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize(
    ("text", "changes", "words"),
    [
        ("a", {}, "1 token"),
        (TEXT, {"window": 1}, "window is 1"),
        (TEXT, {"window": 16, "stride": 17}, "stride is 17"),
        (TEXT, {"window": 16, "stride": 0}, "stride is 0"),
        (TEXT, {"limit": 1}, "limit is 1"),
        (TEXT * 9, {"window": 300}, "context holds 256"),
    ],
)
def test_senseless_windows_are_refused(model: LanguageModel, text: str, changes: dict[str, int], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        perplexity(model, text, **changes)
