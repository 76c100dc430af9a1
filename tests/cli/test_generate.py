"""`fewer generate`: the answer on stdout, the rest on stderr, and figures as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fewer as package
from tests.cli.conftest import Fewer

SHORT = ("-n", "12")


def answer(fewer: Fewer, *words: str, stdin: str = "") -> Any:
    result = fewer("generate", *words, "--json", stdin=stdin)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_the_answer_goes_to_stdout_and_its_figures_to_stderr(fewer: Fewer, tiny: str) -> None:
    result = fewer("generate", "the cat", "-m", tiny, *SHORT)
    assert result.exit_code == 0
    assert result.stdout == package.load(tiny).generate("the cat", max_tokens=12).text + "\n"
    assert "12 tokens at" in result.stderr and "keys and values" in result.stderr


def test_json_has_the_promised_keys(fewer: Fewer, tiny: str) -> None:
    figures = answer(fewer, "the cat", "-m", tiny, *SHORT)
    promised = {
        "text": str,
        "tokens": int,
        "decode_tokens_per_second": float,
        "prefill_tokens_per_second": float,
        "load_seconds": float,
        "kv_bytes": int,
        "weight_bytes": int,
    }
    assert {key: type(figures[key]) for key in promised} == promised
    assert figures["tokens"] == len(figures["token_ids"]) == 12
    assert all(figures[key] > 0 for key in promised if key != "text")


def test_raw_leaves_the_chat_template_out(fewer: Fewer, tiny: str) -> None:
    tokenizer = package.load(tiny).tokenizer
    raw, chat = (answer(fewer, "the cat", "-m", tiny, *SHORT, *more) for more in (["--raw"], []))
    assert raw["prompt_tokens"] == len(tokenizer.encode("the cat"))
    assert chat["prompt_tokens"] == len(tokenizer.chat([{"role": "user", "content": "the cat"}]))
    assert raw["token_ids"] != chat["token_ids"]


def test_a_dash_reads_the_prompt_from_stdin(fewer: Fewer, tiny: str) -> None:
    piped = answer(fewer, "-", "-m", tiny, *SHORT, stdin="the cat")
    assert piped["token_ids"] == answer(fewer, "the cat", "-m", tiny, *SHORT)["token_ids"]


def test_a_stop_text_ends_the_answer_and_is_not_printed(fewer: Fewer, tiny: str) -> None:
    whole = answer(fewer, "the cat", "-m", tiny, *SHORT)["text"]
    stop = whole[5:7]
    cut = answer(fewer, "the cat", "-m", tiny, *SHORT, "--stop", "never said", "--stop", stop)
    assert cut["text"] == whole[: whole.index(stop)]
    assert cut["finish_reason"] == "stop" and cut["tokens"] < 12


def test_logprobs_are_natural_logarithms_one_a_token(fewer: Fewer, tiny: str) -> None:
    figures = answer(fewer, "the cat", "-m", tiny, *SHORT, "--logprobs")
    assert len(figures["logprobs"]) == 12 and all(score <= 0 for score in figures["logprobs"])
    shown = fewer("generate", "the cat", "-m", tiny, *SHORT, "--logprobs")
    assert f"{figures['logprobs'][0]:.4f}" in shown.stdout and "log-probability" in shown.stdout


def test_sampling_with_a_seed_repeats_and_another_seed_differs(fewer: Fewer, tiny: str) -> None:
    sampled = ("the cat", "-m", tiny, "-n", "24", "--temperature", "1", "--top-k", "50", "--top-p", "0.95")
    first, again, other = (answer(fewer, *sampled, "--seed", seed)["token_ids"] for seed in ("3", "3", "4"))
    assert first == again != other
    assert first != answer(fewer, "the cat", "-m", tiny, "-n", "24")["token_ids"]


@pytest.mark.parametrize("spec", ["prompt-lookup", "prompt-lookup:tokens=3", "draft-model:model={tiny},tokens=3"])
def test_speculation_from_the_command_line_emits_the_plain_tokens(fewer: Fewer, tiny: str, spec: str) -> None:
    plain = answer(fewer, "the cat sat the cat sat", "-m", tiny, *SHORT)
    drafted = answer(fewer, "the cat sat the cat sat", "-m", tiny, *SHORT, "--decoding", spec.format(tiny=tiny))
    assert drafted["token_ids"] == plain["token_ids"]
    if spec.startswith("draft-model"):  # a draft that is the target itself is nearly always right
        assert drafted["tokens_per_pass"] > 2


def test_a_recipe_file_is_used_and_options_override_it(fewer: Fewer, tiny: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("weights: int4\ncache: sink-window:window=64\n")
    base = ("the cat", "-m", tiny, *SHORT, "--recipe", str(tmp_path / "r.yaml"))
    assert answer(fewer, *base)["recipe"] == "int4 + sink-window:window=64"
    assert answer(fewer, *base, "--weights", "int8")["recipe"] == "int8 + sink-window:window=64"


def test_int4_weights_are_smaller_than_the_file(fewer: Fewer, tiny: str) -> None:
    plain, small = (answer(fewer, "a", "-m", tiny, "-n", "1", "--weights", spec) for spec in ("auto", "int4"))
    assert small["weight_bytes"] < 0.6 * plain["weight_bytes"]


def test_a_prompt_fills_the_context_and_the_answer_stops_at_its_end(fewer: Fewer, tiny: str) -> None:
    figures = answer(fewer, "a" * 20, "-m", tiny, "--raw", "-n", "500", "--context", "32")
    assert figures["finish_reason"] == "length"
    assert figures["prompt_tokens"] + figures["tokens"] in (32, 33)  # the last token need not be fed again
