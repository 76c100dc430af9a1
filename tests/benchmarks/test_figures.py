"""The pages' generated blocks are what the generator makes, and say plainly what was not measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.figure_tables import h200, peers, table
from benchmarks.figures import BLOCK, MEASURED, PAGES, ROOT, block, regenerate
from fewer.evaluation.compare import compare
from fewer.evaluation.comparison import Settings
from fewer.recipe import Recipe
from fewer.registry import methods
from tests.tiny_model import write_model


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_committed_pages_are_what_the_generator_makes(page: Path) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert text == regenerate(text, PAGES[page]), f"{page} is out of date: run make docs"


def test_the_readme_has_every_block_once() -> None:
    names = [name for _, name, _ in BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))]
    assert sorted(names) == sorted([*MEASURED, "methods", "models"])


def test_every_registered_method_is_in_the_table_with_a_link_that_leads_somewhere() -> None:
    drawn = block("methods", "docs/methods/")
    for method in methods():
        assert f"[`{method.name}`](docs/methods/{method.name}.md)" in drawn
        assert (ROOT / "docs/methods" / f"{method.name}.md").is_file()


def test_writing_a_page_again_changes_nothing_and_keeps_the_text_around() -> None:
    page = "before\n<!-- figures:models -->\nold\n<!-- end -->\nafter <!-- end -->\n"
    once = regenerate(page, "")
    assert once.startswith("before\n") and once.endswith("\nafter <!-- end -->\n") and "old" not in once
    assert "`smollm2` (default)" in once and regenerate(once, "") == once


@pytest.mark.parametrize("name", MEASURED)
def test_a_file_that_is_not_there_is_named(name: str, tmp_path: Path) -> None:
    assert f"`benchmarks/results/{name}.json`" in block(name, "", tmp_path)


def test_h200_shows_what_was_measured_and_names_what_failed_or_was_skipped(tmp_path: Path) -> None:
    report: dict[str, Any] = {
        "environment": {"device": "NVIDIA H200", "torch": "2.13.0", "triton": "3.9.0"},
        "llama bf16 decode": {"result": {"tokens_per_second": 250.0, "runs": [249.0, 250.0, 252.0]}, "seconds": 9},
        "llama int4 decode": {"result": {"tokens_per_second": 650.0, "runs": [650.0]}, "seconds": 9},
        "smollm2 bf16 decode": {"result": {"failed": "RuntimeError('no memory')"}, "seconds": 1},
        "peer transformers eager": "skipped: out of time",
        "attention": {"result": {"32768 x1": {"(1,)": {"of_read": 0.7}, "(2,)": {"of_read": 0.83}, "(3,)": "too big"}}},
    }
    (tmp_path / "h200.json").write_text(json.dumps(report))
    rows = dict(line[2:-2].split(" | ") for line in block("h200", "", tmp_path).splitlines() if line.startswith("| "))
    assert rows["Llama-3-8B, bf16, decode"] == "250 (249–252) tokens/s"
    assert rows["Llama-3-8B, int4 of group 128, decode"] == "650 tokens/s (2.60 × bf16)"
    assert rows["attention of one new token, 32,768 keys"] == "83.0% of the read bandwidth"
    absent = ("SmolLM2-135M, bf16, decode", "… transformers, eager", "attention of one new token, 131,072 keys")
    assert all(rows[name] == "not measured" for name in absent)
    assert h200({}).count("not measured") == 12


def test_peers_ratios_and_memory_are_shown_with_their_spread() -> None:
    def of(median: float) -> dict[str, float]:
        return {"median": median, "low": median / 2, "high": median * 2}

    rates = {"decode_tokens_per_second": of(200.0), "prefill_tokens_per_second": of(4000.0)}
    report = {
        "machine": {"processor": "X", "cores": 2, "threads": 2, "torch": "2.13.0"},
        "versions": {"transformers": "5"},
        "file": "model.gguf",
        "settings": {"rounds": 5, "threads": 2, "prompt": 128, "prefill": 1024},
        "engines": {"fewer": rates, "llama.cpp": rates},
        "ratios": {"llama.cpp": {"decode": of(1.5)}},
        "memory": {
            "file_bytes": 98e6,
            "peak_bytes": {"fewer": 500e6, "llama.cpp": 200e6},
            "fewer_over_import_torch_bytes": 250e6,
        },
        "bandwidth_bytes_per_second": of(20e9),
        "bandwidth_fraction": of(0.5),
    }
    drawn = peers(report)
    assert "| decode after 128 tokens, tokens/s | 200 (100–400) | 200 (100–400) | 1.50 (0.75–3.00) |" in drawn
    assert "250.0 MB over `import torch`" in drawn and "50.0% (25.0%–100%) of the 40.0 GB/s" in drawn


def test_a_comparison_becomes_a_row_a_recipe_and_names_what_failed(tmp_path: Path) -> None:
    recipes = [Recipe.parse(text) for text in ("weights=dense", "weights=int8", "weights=int4:group=128")]
    settings = Settings(max_tokens=4, rounds=1, prompt_tokens=8, device="cpu")
    result = compare(str(write_model(tmp_path / "tiny")), recipes, settings, ["the cat", "def add"])
    (tmp_path / "compare.json").write_text(json.dumps(result.to_json()))
    drawn = block("compare", "", tmp_path)
    rows = {line.split(" | ")[0]: line.strip("| ").split(" | ") for line in drawn.splitlines() if line[0:3] == "| `"}
    assert rows["| `dense` (baseline)"][5] == "1.00" and rows["| `dense` (baseline)"][-1] == "100%"
    assert float(rows["| `int8`"][1]) < float(rows["| `dense` (baseline)"][1])
    assert set(rows["| `int4:group=128`"][1:]) == {"–"}  # the tiny model is too narrow for such groups
    assert "`int4:group=128` was not measured: " in drawn


def test_a_bar_in_a_cell_does_not_end_it() -> None:
    assert table(("a",), [("x|y",)]).splitlines()[-1] == "| x\\|y |"
