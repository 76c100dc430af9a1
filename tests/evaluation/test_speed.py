"""Rates, spreads, bytes and prompts."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewer.errors import UsageError
from fewer.evaluation.bandwidth import BandwidthProbe
from fewer.evaluation.bench import bench
from fewer.evaluation.memory import kv_bytes_read, peak_rss, weight_bytes_read
from fewer.evaluation.prompts import built_in_prompts, read_prompts, repeat_to, split_prompts
from fewer.evaluation.speed import Run, Spread, decode_rate, prefill_seconds, read_rate, run, run_batch, tokens_a_pass
from fewer.language_model import LanguageModel
from fewer.recipe import Recipe
from tests.evaluation.conftest import TEXT


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=9))
def test_a_spread_is_the_middle_and_both_ends(values: list[float]) -> None:
    spread, ordered = Spread.of(values), sorted(values)
    assert (spread.low, spread.high) == (ordered[0], ordered[-1])
    middle = len(ordered) // 2
    assert spread.median in (ordered[middle], (ordered[middle - 1] + ordered[middle]) / 2)


def test_rates_are_sums_over_answers_and_leave_out_the_first_token() -> None:
    runs = [Run([1] * 11, 0.1, 2.0, 5, 1000), Run([1] * 21, 0.1, 3.0, 10, 1000)]
    assert decode_rate(runs) == 30 / 5.0
    assert read_rate(runs) == 15 * 1000 / 5.0
    assert tokens_a_pass(runs) == 2.0


def test_an_answer_of_one_token_has_no_rate() -> None:
    assert decode_rate([Run([1], 0.1, 0.0, 0, 1000)]) == 0.0
    assert tokens_a_pass([Run([1], 0.1, 0.0, 0, 1000)]) == 1.0


def test_a_run_writes_what_generate_writes(model: LanguageModel) -> None:
    prompt = model.tokenizer.encode(TEXT)[:20]
    found = run(model, prompt, 16)
    assert found.tokens == [token for event in model.events([prompt], 16) for token in event.tokens]
    assert found.passes == len(found.tokens) - 1
    assert found.first_seconds > 0 and found.decode_seconds > 0


def test_a_run_may_ignore_the_end_of_an_answer(model: LanguageModel) -> None:
    prompts = [model.tokenizer.encode(TEXT)[start : start + 9] for start in range(40)]
    assert any(len(run(model, prompt, 16).tokens) < 16 for prompt in prompts)
    assert all(len(run(model, prompt, 16, stop=False).tokens) == 16 for prompt in prompts)


def test_a_batch_writes_what_each_prompt_gets_alone(model: LanguageModel) -> None:
    prompts = [model.tokenizer.encode(TEXT)[start : start + 12] for start in (0, 5, 40)]
    alone = [run(model, prompt, 12).tokens for prompt in prompts]
    found = run_batch(model, prompts, 12)
    assert sorted(found.tokens) == sorted(token for tokens in alone for token in tokens)
    assert found.decoded == sum(map(len, alone)) - 3
    assert found.passes == max(map(len, alone)) - 1
    assert math.isnan(read_rate([found]))  # rows may share what they read


def test_speculation_takes_fewer_passes_for_the_same_tokens(model: LanguageModel) -> None:
    prompt = model.tokenizer.encode(TEXT)[:60]
    plain = run(model, prompt, 48, stop=False)
    guessed = run(
        model.with_recipe(Recipe("dense", decoding="prompt-lookup", dtype=model.recipe.dtype)), prompt, 48, stop=False
    )
    assert guessed.tokens == plain.tokens
    assert guessed.passes < plain.passes


def test_prefill_weighs_the_cache_of_exactly_its_tokens(model: LanguageModel) -> None:
    seconds, nbytes = prefill_seconds(model, [5] * 100)
    assert seconds > 0
    assert nbytes == 100 * model.config.kv_bytes_per_token(4)


def test_a_token_reads_all_weights_of_a_tied_model_and_every_key(model: LanguageModel) -> None:
    assert model.config.tied_embeddings
    assert weight_bytes_read(model) == model.weight_bytes
    assert kv_bytes_read(model, 50) == 50 * model.config.kv_bytes_per_token(4)


def test_the_probe_keeps_its_best_reading() -> None:
    probe = BandwidthProbe(torch.device("cpu"), 1 << 20)
    readings = [probe.measure(2) for _ in range(3)]
    assert min(readings) > 0
    assert probe.best == max(readings)


def test_the_process_is_at_least_as_large_as_torch() -> None:
    assert 50 << 20 < peak_rss() < 64 << 30


def test_a_benchmark_measures_each_length_and_depth(model: LanguageModel) -> None:
    seen: list[int] = []
    found = bench(model, [16, 64], [8, 100], tokens=6, rounds=2, on_progress=lambda done, total: seen.append(done))
    assert [figure.tokens for figure in found.prefill] == [16, 64]
    assert [figure.depth for figure in found.decode] == [8, 100]
    assert found.prefill[1].kv_bytes == 4 * found.prefill[0].kv_bytes
    for figure in found.decode:
        assert 0 < figure.rate.low <= figure.rate.median <= figure.rate.high
        assert figure.bandwidth_fraction.median > 0
    assert seen == [0, 1, 2, 3]  # a round to warm up, two that count


@pytest.mark.parametrize(
    ("lengths", "depths", "changes", "words"),
    [
        ([257], [], {}, "prefill of 257"),
        ([], [255], {}, "depth of 255"),
        ([], [0], {}, "depth of 0"),
        ([8], [8], {"rounds": 0}, "rounds is 0"),
        ([8], [8], {"tokens": 1}, "tokens is 1"),
    ],
)
def test_a_benchmark_refuses_what_the_context_cannot_hold(
    model: LanguageModel, lengths: list[int], depths: list[int], changes: dict[str, int], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        bench(model, lengths, depths, **{"tokens": 6, "rounds": 1, **changes})


def test_our_prompts_are_eight_and_some_invite_copying() -> None:
    prompts = built_in_prompts()
    assert len(prompts) == 8 and len(set(prompts)) == 8
    assert max(map(len, prompts)) > 1500  # a passage


def test_prompts_are_lines_or_parts_between_dashes(tmp_path: Path) -> None:
    assert split_prompts("one\n\n two \n") == ["one", "two"]
    assert split_prompts("one\nmore\n---\n\n---\ntwo\n") == ["one\nmore", "two"]
    for content, words in ((b"\n \n", "holds no prompt"), (b"\xff\xfe", "no UTF-8")):
        path = tmp_path / "prompts.txt"
        path.write_bytes(content)
        with pytest.raises(UsageError, match=words):
            read_prompts(path)
    with pytest.raises(UsageError, match="No such file"):
        read_prompts(tmp_path / "nothing.txt")


@given(st.lists(st.integers(0, 9), min_size=1, max_size=7), st.integers(1, 40))
def test_repeated_tokens_have_the_length_asked_for(tokens: list[int], length: int) -> None:
    repeated = repeat_to(tokens, length)
    assert len(repeated) == length
    assert all(token == tokens[place % len(tokens)] for place, token in enumerate(repeated))
