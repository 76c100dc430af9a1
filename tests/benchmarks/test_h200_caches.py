"""What the run on the GPU says is arithmetic on its JSON: floors, ratios, targets and tables, without a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import h200_caches_bytes as reads
from benchmarks.figures import block
from benchmarks.h200_caches_bytes import Shape, length_name
from benchmarks.h200_caches_tables import METHODS, h200_caches
from benchmarks.h200_caches_targets import Target, prefill_seconds, targets

LLAMA = Shape(layers=32, heads=32, kv_heads=8, head_dim=128)
LONG = 262144
SETTINGS = {
    "context": LONG, "medium": 65536, "short": 16384, "shortest": 4096, "many_heads": 102400, "budget": 4096,
    "small_budget": 256, "kept": 1024, "layers": 32,
}  # fmt: skip


def section(seconds: float, context: int = LONG, attention: float | None = None, nbytes: float = 1e9) -> dict[str, Any]:
    """A cache's section, with a step of this many seconds."""
    result = {"context": context, "decode": {"seconds": seconds, "ran": {"captured": 72}}, "cache_bytes": nbytes}
    result["attention"] = None if attention is None else {"seconds": attention}
    result["prefill"] = {"tokens": context, "seconds": 50.0, "at": {str(context // 2): 14.0, str(context): 50.0}}
    return {"result": result, "seconds": 60.0}


def report(**sections: Any) -> dict[str, Any]:
    rates = {"read_bytes_per_second": 4.3e12, "copy_bytes_per_second": 4.2e12, "bf16_flops": 7.5e14}
    return {"settings": SETTINGS, "bandwidth": rates, "environment": {"gpu": "NVIDIA H200"}} | sections


def by_name(found: dict[str, Any]) -> dict[tuple[str, str], Target]:
    return {(target.method, target.what): target for target in targets(found)}


def test_a_token_of_llama_3_has_131_kilobytes_and_256k_of_them_are_read_in_eight_milliseconds() -> None:
    assert LLAMA.token_bytes == 131072
    assert reads.everything(LLAMA, LONG) == LONG * 131072
    assert reads.floor_seconds(15e9, reads.everything(LLAMA, LONG), 4.5e12) == pytest.approx(0.01097, rel=1e-3)


def test_half_of_the_heads_streaming_reads_half_and_their_windows() -> None:
    dense = reads.everything(LLAMA, LONG)
    assert reads.split_heads(LLAMA, LONG, 0.5, 320) == pytest.approx(dense * (0.5 + 0.5 * 320 / LONG))
    assert reads.split_heads(LLAMA, 100, 0.5, 320) == reads.everything(LLAMA, 100)


def test_chosen_pages_are_flat_in_the_context_but_for_the_bounds() -> None:
    def read(context: int, interval: int = 4, row_bytes: int = 512) -> float:
        return reads.chosen_pages(LLAMA, context, 0.5, 384, 4096, 32, row_bytes, 16, interval)

    bounds = 16 * 8 * 512 / 16 / 4  # bytes a token
    assert read(LONG) - read(16384) == pytest.approx(bounds * (LONG - 16384))
    assert read(LONG, interval=1) > read(LONG) > read(LONG, row_bytes=136)


def test_sparse_layers_read_their_budget_for_every_list() -> None:
    some = reads.chosen_tokens(LLAMA, LONG, 4096, 4, 32)
    assert some == 4 * LONG * 8 * 512 + 28 * 32 * 4096 * 512
    assert reads.chosen_by_bounds(LLAMA, LONG, 4096, 4, 16) - some == 28 * 8 * LONG / 16 * 512
    assert reads.kept_tokens(LLAMA, LONG, 1024) == reads.kept_tokens(LLAMA, 16384, 1024) == 1024 * 131072


def test_a_decline_that_the_added_operations_explain_is_one() -> None:
    added = (reads.prefix_flops(LLAMA, 1024, 16384) - reads.prefix_flops(LLAMA, 1024, 1024)) / 7.5e14
    assert reads.unexplained_decline((0.03, 0.03 + added), (1024, 16384), 1024, LLAMA, 7.5e14) == pytest.approx(1.0)
    assert reads.unexplained_decline((0.03, 0.06), (1024, 16384), 1024, LLAMA, 7.5e14) > 1.25


def test_an_interval_averages_one_choice_and_the_steps_behind_it() -> None:
    assert reads.over_interval(8.0, 4.0, 4) == 5.0


@pytest.mark.parametrize(("tokens", "name"), [(LONG, "256k"), (1024, "1k"), (102400, "100k"), (160, "160")])
def test_lengths_are_named(tokens: int, name: str) -> None:
    assert length_name(tokens) == name


def test_targets_are_met_missed_or_not_measured() -> None:
    sections = {
        "dense 256k": section(12e-3, attention=8e-3, nbytes=34e9),
        "duo-attention 256k": section(8e-3, attention=4.2e-3, nbytes=17.2e9),
        "tidal-decode 4096 256k": section(7e-3),
        "lserve 4-bit 256k": {"result": {"failed": "OutOfMemoryError"}, "seconds": 3.0},
        "a2sf 64k": "skipped: out of time",
    }
    found = by_name(report(**sections))
    assert found["duo-attention", "step at 256k, times faster than dense"].met is True
    assert found["duo-attention", "KV bytes, share of dense"].found == pytest.approx(17.2 / 34)
    assert found["duo-attention", "chunked prefill of 256k, times faster than dense"].met is False
    assert found["tidal-decode", "budget 4,096: step at 256k, times faster than dense"].met is False
    unmeasured = [target for target in found.values() if target.method in ("lserve", "a2sf", "hydragen")]
    assert len(unmeasured) > 8 and all(target.met is None for target in unmeasured)


def test_no_ratio_is_taken_between_unequal_contexts() -> None:
    early = {"dense 256k": section(12e-3), "duo-attention 256k": section(2e-3, context=65536)}
    found = by_name(report(**early))
    assert found["duo-attention", "step at 256k, times faster than dense"].found is None


def test_a_prompts_beginning_was_timed_with_it() -> None:
    found = report(**{"dense 256k": section(12e-3)})
    assert prefill_seconds(found, "dense 256k", LONG // 2) == 14.0
    assert prefill_seconds(found, "dense 256k", LONG // 4) is None


def test_what_scoring_costs_is_relative_to_the_dense_step() -> None:
    sections = {
        "a2sf 64k": section(4.9e-3, 65536), "dense 64k": section(6e-3, 65536), "dense 1k": section(4.1e-3, 1024),
        "a2sf 4k": section(4.8e-3, 4096),
    }  # fmt: skip
    found = by_name(report(**sections))
    assert found["a2sf", "scoring, share of the dense step at 64k"].found == pytest.approx(0.8 / 6)
    assert found["a2sf", "step at 64k, times that at 4k"].met is True


def test_the_tables_show_steps_with_how_they_ran_and_prefixes_that_did_not_fit(tmp_path: Path) -> None:
    sections = {
        "dense 256k": section(12e-3, attention=8e-3),
        "duo-attention 256k": section(8e-3),
        "full 1024 rows 16k": {"result": {"failed": "out of memory"}, "seconds": 1.0},
    }
    (tmp_path / "h200_caches.json").write_text(json.dumps(report(**sections)))
    drawn = block("h200_caches", "", tmp_path)
    assert "| duo-attention | 262,144 | 50.0 | 8.00 | 1.50 |" in drawn and "| 72 captured |" in drawn
    assert "| `full` | 1,024 | 16k | out of memory | – |" in drawn
    page = block("h200_caches-duo-attention", "", tmp_path)
    assert "| dense | 262,144 |" in page and "lserve" not in page and "rows × own" not in page


@pytest.mark.parametrize("name", ["h200_caches", *(f"h200_caches-{method}" for method in METHODS)])
def test_a_page_says_so_where_nothing_was_measured(name: str, tmp_path: Path) -> None:
    assert "`benchmarks/results/h200_caches.json`" in block(name, "", tmp_path)
    assert h200_caches({}).count("not measured") > 10
