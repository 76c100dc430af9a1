"""A GGUF file as a checkpoint: described by its header alone, and read as often as one likes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import psutil
import pytest
import torch

from fewer.checkpoint.gguf import GGUFCheckpoint
from fewer.checkpoint.gguf_blocks import BLOCKS
from fewer.errors import CheckpointError
from tests.checkpoint.gguf_files import write_gguf
from tests.checkpoint.raw_gguf import VALID, number_entry, tiny_file
from tests.model.families import tiny_models

GIGABYTE = 1 << 30


def checkpoint_of(data: bytes, path: Path) -> GGUFCheckpoint:
    path.write_bytes(data)
    return GGUFCheckpoint(path)


def test_file_types_are_named_as_people_write_them(tmp_path: Path) -> None:
    for number, name in ((2, "Q4_0"), (15, "Q4_K_M"), (32, "BF16"), (999, "type 999")):
        data = tiny_file({"general.file_type": number_entry("general.file_type", number)})
        assert checkpoint_of(data, tmp_path / f"{number}.gguf").file_type == name
    assert checkpoint_of(VALID, tmp_path / "none.gguf").file_type is None


def test_names_follow_the_network_and_a_missing_one_is_refused(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(VALID, tmp_path / "model.gguf")
    names = checkpoint.names()
    assert names[:2] == ["embed.weight", "layers.0.attention_norm.weight"] and names[-1] == "norm.weight"
    assert checkpoint.config.tied_embeddings
    assert "head.weight" not in checkpoint
    with pytest.raises(CheckpointError, match="has no tensor 'head.weight'"):
        checkpoint["head.weight"]


def test_fingerprints_tell_files_apart_by_header_and_size(tmp_path: Path) -> None:
    first = checkpoint_of(VALID, tmp_path / "a.gguf").fingerprint()
    assert checkpoint_of(VALID, tmp_path / "b.gguf").fingerprint() == first
    longer = checkpoint_of(VALID + bytes(32), tmp_path / "c.gguf").fingerprint()
    other = checkpoint_of(tiny_file({"x": number_entry("general.quantization_version", 2)}), tmp_path / "d.gguf")
    assert len({first, longer, other.fingerprint()}) == 3


def test_reading_changes_neither_the_file_nor_what_is_read_next(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(tiny_models("qwen3")[1], tmp_path, path, "Q8_0")
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    checkpoint = GGUFCheckpoint(path)
    for name in checkpoint.names():
        first = checkpoint[name].dense().clone()
        checkpoint[name].format()
        assert torch.equal(checkpoint[name].dense(), first), name
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before


def test_bits_and_bytes_of_a_tensor_are_those_of_its_rows(tmp_path: Path) -> None:
    write_gguf(tiny_models("phi3")[1], tmp_path, tmp_path / "model.gguf", "Q4_1")
    checkpoint = GGUFCheckpoint(tmp_path / "model.gguf")
    query = checkpoint["layers.0.attention.q.weight"]  # some rows of attn_qkv
    assert (query.kind, query.shape, query.bits_per_weight) == ("Q4_1", (64, 64), 5.0)
    stored = sum(checkpoint[name].nbytes for name in checkpoint.names())
    assert stored == sum(entry.nbytes for entry in checkpoint.file.tensors.values())


def test_a_file_of_gigabytes_costs_only_what_is_read_of_it(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny_file(tensors={"extra.weight": (1 << 20, 1024)}, kinds={"extra.weight": BLOCKS["F32"].number}))
    os.truncate(path, path.stat().st_size + 4 * GIGABYTE)  # a sparse file
    process = psutil.Process()
    before = process.memory_info().rss
    checkpoint = GGUFCheckpoint(path)
    assert checkpoint.file.tensors["extra.weight"].nbytes == 4 * GIGABYTE
    for name in checkpoint.names():
        checkpoint[name].dense()
    assert process.memory_info().rss - before < 64 << 20
