"""GGUF files field by field, for tests whose files lie, and the one way to open them that holds faults to a standard.

`RawGGUF` writes whatever it is told. `tiny_file` is a sound model of one layer with the changes a test asks for.
"""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from fewer.checkpoint.gguf import GGUFCheckpoint
from fewer.checkpoint.gguf_blocks import BLOCKS
from fewer.engine.loading import MatrixLoader
from fewer.errors import CheckpointError
from fewer.registry import parse_spec

HUGE = (1 << 64) - 1


def string(text: str | bytes, claimed: int | None = None) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data) if claimed is None else claimed) + data


def entry(key: str | bytes, value_type: int, value: bytes) -> bytes:
    """One metadata entry: its key, the number of its type and its encoded value."""
    return string(key) + struct.pack("<I", value_type) + value


def text_entry(key: str, value: str) -> bytes:
    return entry(key, 8, string(value))


def number_entry(key: str, value: int) -> bytes:
    return entry(key, 4, struct.pack("<I", value))


def array(item_type: int, count: int, items: bytes = b"") -> bytes:
    return struct.pack("<IQ", item_type, count) + items


def tensor_entry(
    name: str, shape: Sequence[int], kind: int = 0, offset: int = 0, dimensions: int | None = None
) -> bytes:
    """One line of the directory; `shape` in the order of PyTorch, `dimensions` what the line claims to have."""
    count = len(shape) if dimensions is None else dimensions
    sizes = struct.pack(f"<{len(shape)}Q", *reversed(shape))
    return string(name) + struct.pack("<I", count) + sizes + struct.pack("<IQ", kind, offset)


@dataclass
class RawGGUF:
    """A file field by field. `tensor_count` and `metadata_count` are what the header claims; None tells the truth."""

    metadata: list[bytes] = field(default_factory=list)
    tensors: list[bytes] = field(default_factory=list)
    data: bytes = b""
    magic: bytes = b"GGUF"
    version: int = 3
    tensor_count: int | None = None
    metadata_count: int | None = None
    alignment: int = 32

    def build(self) -> bytes:
        tensor_count = len(self.tensors) if self.tensor_count is None else self.tensor_count
        metadata_count = len(self.metadata) if self.metadata_count is None else self.metadata_count
        start = self.magic + struct.pack("<IQQ", self.version, tensor_count, metadata_count)
        header = start + b"".join(self.metadata) + b"".join(self.tensors)
        return header + bytes(-len(header) % self.alignment) + self.data


WIDTH, INNER, VOCABULARY, HEADS = 32, 64, 8, 2
BLOCK = "blk.0"
QUERY = f"{BLOCK}.attn_q.weight"
SHAPES: dict[str, tuple[int, ...]] = {
    "token_embd.weight": (VOCABULARY, WIDTH),
    f"{BLOCK}.attn_norm.weight": (WIDTH,),
    QUERY: (WIDTH, WIDTH),
    f"{BLOCK}.attn_k.weight": (WIDTH, WIDTH),
    f"{BLOCK}.attn_v.weight": (WIDTH, WIDTH),
    f"{BLOCK}.attn_output.weight": (WIDTH, WIDTH),
    f"{BLOCK}.ffn_norm.weight": (WIDTH,),
    f"{BLOCK}.ffn_gate.weight": (INNER, WIDTH),
    f"{BLOCK}.ffn_up.weight": (INNER, WIDTH),
    f"{BLOCK}.ffn_down.weight": (WIDTH, INNER),
    "output_norm.weight": (WIDTH,),
}


def metadata_of(architecture: str = "llama") -> dict[str, bytes]:
    counts = {
        "block_count": 1,
        "context_length": 64,
        "embedding_length": WIDTH,
        "feed_forward_length": INNER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": HEADS,
    }
    epsilon = f"{architecture}.attention.layer_norm_rms_epsilon"
    return {
        "general.architecture": text_entry("general.architecture", architecture),
        **{f"{architecture}.{key}": number_entry(f"{architecture}.{key}", count) for key, count in counts.items()},
        epsilon: entry(epsilon, 6, struct.pack("<f", 1e-5)),
    }


def tiny_file(
    metadata: dict[str, bytes | None] | None = None,
    tensors: dict[str, tuple[int, ...] | None] | None = None,
    places: dict[str, int] | None = None,
    kinds: dict[str, int] | None = None,
    **claims: Any,
) -> bytes:
    """A model of one layer, Q8_0 matrices; `metadata` and `tensors` replace, add or (None) drop entries, `places` moves
    tensors, `kinds` sets their type numbers, `claims` are fields of `RawGGUF`."""
    entries = {**metadata_of(), **(metadata or {})}
    shapes = {**SHAPES, **(tensors or {})}
    lines, offset = [], 0
    for name, shape in shapes.items():
        if shape is None:
            continue
        kind = "Q8_0" if len(shape) > 1 and shape[-1] % 32 == 0 else "F32"
        number = (kinds or {}).get(name, BLOCKS[kind].number)
        lines.append(tensor_entry(name, shape, number, (places or {}).get(name, offset)))
        elements = 1
        for size in shape:
            elements *= min(size, 1 << 10)
        offset += -(-(elements // BLOCKS[kind].columns * BLOCKS[kind].nbytes) // 32) * 32
    fields = {"data": bytes(offset), **claims}
    return RawGGUF([line for line in entries.values() if line is not None], lines, **fields).build()


VALID = tiny_file()
HEADER_BYTES = VALID.rindex(b"output_norm.weight") + len("output_norm.weight") + 4 + 8 + 4 + 8
# Numbers at the edges of what fields and sizes can hold
EDGES = [0, 1, 2, 7, 8, 9, 31, 33, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 63, HUGE]


def opened(data: bytes, path: Path) -> GGUFCheckpoint:
    """Open the bytes as a file, and hold what Python allocated meanwhile against their number."""
    path.write_bytes(data)
    tracemalloc.start()
    try:
        return GGUFCheckpoint(path)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 200_000 + 20 * len(data), f"{peak} bytes allocated for a file of {len(data)}"


def is_one_sentence(message: str) -> bool:
    return len(message) < 800 and message.isprintable()


def fault_of(data: bytes, path: Path) -> str:
    """The sentence that opening the bytes gives."""
    with pytest.raises(CheckpointError) as caught:
        opened(data, path)
    message = str(caught.value)
    assert is_one_sentence(message), message
    assert str(path) in message
    return message


def use(data: bytes, path: Path) -> bool:
    """Open the bytes, read every tensor and build the network: True, or False for a CheckpointError of one sentence.

    Anything else (another exception, a hang, a big allocation) fails the test.
    """
    try:
        checkpoint = opened(data, path)
        for name in checkpoint.names():
            checkpoint[name].dense()
        MatrixLoader(checkpoint, parse_spec("weights", "dense"), torch.float32, torch.device("cpu")).transformer(
            torch.float32
        )
    except CheckpointError as error:
        assert is_one_sentence(str(error)), str(error)
        return False
    return True
