"""Comparing recipes end to end on a tiny model: rows, order, ratios, faults, Ctrl-C."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fewer.errors import CheckpointError, UsageError
from fewer.evaluation.compare import OWN_TEXT, compare
from fewer.evaluation.comparison import Comparison, Settings, unique
from fewer.evaluation.perplexity import perplexity
from fewer.evaluation.report import to_json
from fewer.language_model import LanguageModel
from fewer.recipe import Recipe
from tests.evaluation.conftest import PROMPTS, TEXT

RECIPES = [
    Recipe(weights="dense"),
    Recipe(weights="int4"),
    Recipe(weights="int4", decoding="prompt-lookup"),
    Recipe(weights="dense", cache="sink-window:sinks=1,window=8"),
    Recipe(decoding="draft-model:model=/there/is/nothing"),
]
SETTINGS = Settings(max_tokens=12, rounds=3, prompt_tokens=100, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def comparison(folder: Path) -> Comparison:
    return compare(str(folder), RECIPES, SETTINGS, PROMPTS)


def test_every_recipe_is_a_row_with_a_round_for_each_round(comparison: Comparison) -> None:
    assert [row.recipe for row in comparison.rows] == RECIPES
    assert [len(row.rounds) for row in comparison.rows] == [3, 3, 3, 3, 0]
    assert len(comparison.bandwidths) == 4  # before each round and after the last
    assert not comparison.interrupted


def test_recipes_take_turns(folder: Path) -> None:
    order: list[tuple[str, int]] = []
    settings = replace(SETTINGS, rounds=2, max_tokens=2)
    compare(str(folder), RECIPES[:2], settings, PROMPTS[:1], on_progress=lambda label, n, of: order.append((label, n)))
    rounds = [entry for entry in order if entry[0].startswith("round")]
    assert rounds == [(f"round {number} of 2", done) for number in (1, 2) for done in (0, 1, 2)]


def test_the_uncompressed_row_is_the_baseline_and_differs_in_nothing(comparison: Comparison) -> None:
    row = comparison.rows[0]
    assert comparison.baseline is row
    ratio = comparison.ratio(row)
    assert ratio is not None and (ratio.low, ratio.median, ratio.high) == (1.0, 1.0, 1.0)
    assert row.quality is not None
    assert row.quality.kl < 1e-6 and row.quality.unchanged == 1.0  # threads may round differently from run to run


def test_without_it_the_first_measured_row_is_the_baseline(comparison: Comparison) -> None:
    rows = [comparison.rows[4], *comparison.rows[1:4]]  # the first has failed
    assert replace(comparison, rows=rows).baseline is rows[1]


def test_ratios_are_paired_round_by_round(comparison: Comparison) -> None:
    baseline, row = comparison.rows[0], comparison.rows[1]
    slow = [replace(each, decode_rate=rate) for each, rate in zip(baseline.rounds, (100.0, 10.0, 50.0), strict=True)]
    fast = [replace(each, decode_rate=rate) for each, rate in zip(row.rounds, (200.0, 20.0, 150.0), strict=True)]
    rows = [replace(baseline, rounds=slow), replace(row, rounds=fast)]
    ratio = replace(comparison, rows=rows).ratio(rows[1])
    assert ratio is not None and (ratio.low, ratio.median, ratio.high) == (2.0, 2.0, 3.0)


def test_fewer_bits_take_less_memory_and_cost_quality(comparison: Comparison) -> None:
    dense, int4 = comparison.rows[0], comparison.rows[1]
    assert dense.weight_bytes and int4.weight_bytes and int4.weight_bytes < dense.weight_bytes / 3
    assert int4.quality is not None and int4.quality.kl is not None and int4.quality.kl > 0
    assert dense.kv_bytes == int4.kv_bytes == 100 * 2 * 2 * 2 * 16 * 4  # tokens, k and v, layers, heads, width, bytes


def test_forgotten_keys_cost_quality(comparison: Comparison) -> None:
    quality = comparison.rows[3].quality
    assert quality is not None and quality.kl is not None and quality.kl > 0.01


def test_lossless_decoding_shares_the_quality_of_its_weights(comparison: Comparison) -> None:
    assert comparison.rows[2].quality == comparison.rows[1].quality
    assert comparison.rows[1].spread(lambda each: each.tokens_per_pass) is not None


def test_a_failing_recipe_says_why_and_the_others_go_on(comparison: Comparison) -> None:
    failed = comparison.rows[4]
    assert failed.failure is not None and "/there/is/nothing" in failed.failure
    assert not failed.measured
    assert all(row.measured for row in comparison.rows[:4])


def test_a_batch_shares_what_its_prompts_begin_with(folder: Path) -> None:
    """Two prompts, four at once: each comes twice."""
    prompts = [TEXT[:200] + end for end in (" one", " two")]
    recipes = [Recipe(cache="full"), Recipe(cache="hydragen:shortest=2,split=always")]
    found = compare(str(folder), recipes, replace(SETTINGS, batch=4, rounds=1), prompts)
    full, hydragen = found.rows
    assert full.measured and hydragen.measured, (full.failure, hydragen.failure)
    assert full.kv_bytes is not None and hydragen.kv_bytes is not None
    assert hydragen.kv_bytes < 0.75 * full.kv_bytes
    assert found.bandwidth_fraction(hydragen) is None


def test_perplexity_on_a_given_text_is_that_of_the_decode_path(folder: Path, model: LanguageModel) -> None:
    settings = replace(SETTINGS, rounds=1, max_tokens=2, text_tokens=60, window=32)
    found = compare(str(folder), RECIPES[:1], settings, PROMPTS[:1], TEXT, "essay.txt")
    quality = found.rows[0].quality
    expected = perplexity(model, TEXT, 32, limit=60, decode_path=True)
    assert quality is not None and quality.scored_tokens == expected.tokens
    assert quality.perplexity == pytest.approx(expected.perplexity, rel=1e-5)
    assert found.text == "essay.txt"


def test_it_says_what_perplexity_was_measured_on(comparison: Comparison) -> None:
    quality = comparison.rows[0].quality
    assert comparison.text == OWN_TEXT
    assert quality is not None and quality.scored_tokens > quality.compared_tokens > 0


def test_ctrl_c_after_a_whole_round_keeps_it(folder: Path) -> None:
    def stop(label: str, done: int, total: int) -> None:
        if label.startswith("round 2") and done == 1:
            raise KeyboardInterrupt

    found = compare(str(folder), RECIPES[:2], SETTINGS, PROMPTS[:1], on_progress=stop)
    assert found.interrupted
    assert [len(row.rounds) for row in found.rows] == [1, 1]


def test_ctrl_c_before_that_ends_it(folder: Path) -> None:
    def stop(label: str, done: int, total: int) -> None:
        if label.startswith("round 1") and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(str(folder), RECIPES[:2], SETTINGS, PROMPTS[:1], on_progress=stop)


def test_the_json_is_strict_and_complete(comparison: Comparison) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    found = json.loads(to_json(comparison), parse_constant=refuse)
    assert found["baseline"] == "dense"
    assert found["machine"]["threads"] >= 1 and found["fingerprint"]
    row = found["rows"][1]
    assert row["slots"]["weights"] == "int4"
    for figure in (
        "first_token_seconds",
        "prefill_tokens_per_second",
        "decode_tokens_per_second",
        "bandwidth_fraction",
    ):
        assert 0 < row[figure]["low"] <= row[figure]["median"] <= row[figure]["high"]
    assert found["rows"][4]["failure"] and found["rows"][4]["decode_tokens_per_second"] is None


def test_a_recipe_given_twice_is_one_row() -> None:
    assert unique([*RECIPES, Recipe(weights="int4")]) == RECIPES


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rounds": 0}, "rounds is 0"),
        ({"max_tokens": 1}, "max_tokens is 1"),
        ({"max_tokens": 250}, "leaves room for 5"),
    ],
)
def test_what_cannot_be_measured_is_refused(folder: Path, changes: dict[str, int], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        compare(str(folder), RECIPES[:1], replace(SETTINGS, **changes), PROMPTS)


def test_a_model_that_is_not_there_is_the_whole_answer(tmp_path: Path) -> None:
    with pytest.raises((CheckpointError, UsageError), match="nowhere"):
        compare(str(tmp_path / "nowhere"), RECIPES, SETTINGS, PROMPTS)
