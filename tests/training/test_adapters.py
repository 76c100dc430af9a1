"""Adapters: a round trip, and the refusal of every file that is not what it should be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fewer.errors import CheckpointError, UsageError
from fewer.training.adapters import Adapter, Provenance, load_adapter, save_adapter

PROVENANCE = Provenance("early-exit", {"layer": 3}, "a" * 64, "b" * 64, 7, {"kl": 0.25})


def write(path: Path) -> Path:
    save_adapter(path, Adapter({"map": torch.arange(6.0).view(2, 3).bfloat16()}, PROVENANCE))
    return path


def test_an_adapter_comes_back_as_it_was(tmp_path: Path) -> None:
    loaded = load_adapter(write(tmp_path / "a.safetensors"), "early-exit", "a" * 64)
    assert loaded.provenance == PROVENANCE
    assert torch.equal(loaded.tensors["map"], torch.arange(6.0).view(2, 3).bfloat16())
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_an_adapter_of_another_model_or_method_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="fitted to another model"):
        load_adapter(path, model="c" * 64)
    with pytest.raises(CheckpointError, match="method 'early-exit', not of 'duo-attention'"):
        load_adapter(path, "duo-attention")


def test_other_safetensors_and_damaged_descriptions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {"map": torch.zeros(1)}
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="no fewer.adapter"):
        load_adapter(path)
    for text in ("[]", "{", "[" * 100_000, json.dumps({"version": 1, "method": 3}), json.dumps({"version": 9})):
        save_file(tensors, path, metadata={"fewer.adapter": text})
        with pytest.raises(CheckpointError):
            load_adapter(path)


def test_every_truncation_and_flipped_header_byte_is_refused_or_harmless(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.safetensors").read_bytes()
    path = tmp_path / "b.safetensors"
    for length in range(0, len(whole), 17):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            load_adapter(path)
    for place in range(0, len(whole) - 12, 5):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x15]) + whole[place + 1 :])
        try:
            load_adapter(path, "early-exit", "a" * 64)
        except CheckpointError as fault:
            assert "\n" not in str(fault)


def test_metrics_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    provenance = Provenance("early-exit", {}, "a", "b", 0, {"kl": float("nan")})
    with pytest.raises(UsageError, match="'kl' is nan"):
        save_adapter(tmp_path / "a", Adapter({"map": torch.zeros(1)}, provenance))
    assert not list(tmp_path.iterdir())
