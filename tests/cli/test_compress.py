"""`fewer compress`: the folder loads back bit for bit, and is there whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fewer import load
from fewer.checkpoint.open import open_checkpoint
from tests.cli.conftest import Fewer


@pytest.mark.parametrize("spec", ["int4:group=64", "int8", "int4:head=dense", "dense"])
def test_a_compressed_folder_loads_back_with_the_same_tensors_and_logits(
    fewer: Fewer, tiny: str, tmp_path: Path, spec: str
) -> None:
    folder = tmp_path / "small"
    result = fewer("compress", "-m", tiny, "-o", str(folder), "--weights", spec)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip() == str(folder)
    made, loaded = load(tiny, weights=spec), load(folder)
    pairs = list(zip(made.transformer.matrices(), loaded.transformer.matrices(), strict=True))
    for (name, left), (other, right) in pairs:
        assert (name, left.name) == (other, right.name)
        stored = right.state_dict()
        for field, value in left.state_dict().items():
            assert value.dtype == stored[field].dtype and torch.equal(value, stored[field]), (name, field)
    tokens = made.encode("the cat sat")
    assert tokens == loaded.encode("the cat sat")
    assert torch.equal(made.session().prefill([tokens]), loaded.session().prefill([tokens]))


def test_json_tells_where_and_how_large(fewer: Fewer, tiny: str, tmp_path: Path) -> None:
    result = fewer("compress", "-m", tiny, "-o", str(tmp_path / "small"), "-w", "int4", "--json")
    facts = json.loads(result.stdout)
    assert facts == {"path": str(tmp_path / "small"), "bytes": facts["bytes"], "weights": "int4"}
    assert facts["bytes"] == sum(path.stat().st_size for path in (tmp_path / "small").iterdir())


def test_a_compressed_folder_can_be_compressed_again_to_the_same(fewer: Fewer, tiny: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert fewer("compress", "-m", tiny, "-o", str(first), "-w", "int4").exit_code == 0
    assert fewer("compress", "-m", str(first), "-o", str(second)).exit_code == 0
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_an_output_folder_that_holds_something_is_refused_and_left_as_it_was(
    fewer: Fewer, tiny: str, tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "keep.txt").write_text("mine")
    result = fewer("compress", "-m", tiny, "-o", str(tmp_path / "full"))
    assert result.exit_code == 2 and "exists and is not empty" in result.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "keep.txt"]


def test_an_empty_output_folder_is_filled(fewer: Fewer, tiny: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert fewer("compress", "-m", tiny, "-o", str(tmp_path / "empty")).exit_code == 0
    assert open_checkpoint(tmp_path / "empty").kind == "fewer"
    modes = {path.stat().st_mode for path in (tmp_path / "empty").iterdir()}
    assert len(modes) == 1  # whoever may read one file of it may read all
