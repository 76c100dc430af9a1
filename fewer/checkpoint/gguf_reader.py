"""The GGUF container: metadata and tensor directory of a memory-mapped file, read without trusting it.

Every count, length and offset is held against the file's size before it is used, so a damaged or hostile file costs
one sentence and no memory. Versions 2 and 3, little-endian, as in ggml's docs/gguf.md.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fewer.checkpoint.gguf_blocks import BLOCKS, KIND_NUMBERS
from fewer.checkpoint.gguf_header import MAX_KEY_BYTES, SHOWN, Cursor, Header, Metadata
from fewer.errors import CheckpointError

MAX_METADATA = 1 << 16  # entries; real files have dozens
MAX_TENSORS = 1 << 18  # an old per-expert layout of a large mixture has thousands
MAX_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One line of the directory: `shape` in the order of PyTorch, `offset` from the start of the file."""

    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def shown(self) -> str:
        """The name as messages quote it: short, and without anything that a terminal would obey."""
        return repr(self.name[:SHOWN])


class GGUFFile:
    """An open GGUF file: `metadata`, `tensors` by name, and their bytes, mapped and read on demand."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        header = self._open()
        self.map, self.size, self.fail = header.map, header.size, header.fail
        cursor = Cursor(header)
        self.version, tensor_count, metadata_count = _read_counts(cursor)
        self.metadata = Metadata(cursor, metadata_count)
        alignment = self.metadata.scalar("general.alignment")
        if alignment is None:
            alignment = DEFAULT_ALIGNMENT
        if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            self.fail(f"general.alignment is {str(alignment)[:40]!r}, which is not a power of two up to {1 << 20}")
        entries = [_read_entry(cursor) for _ in range(tensor_count)]
        self.data_offset = -(-cursor.position // alignment) * alignment
        self.tensors = self._place(entries, alignment)

    def _open(self) -> Header:
        if self.path.exists() and not self.path.is_file():
            raise CheckpointError(f"'{self.path}' is not a file: give the path of a GGUF file")
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, 2)
                if size < 24:
                    raise CheckpointError(
                        f"'{self.path}' is no GGUF file: it has {size} bytes, and a GGUF header has at least 24"
                    )
                # A private mapping: writable for torch's sake, never written, so pages stay those of the file cache.
                return Header(self.path, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), size)
        except OSError as error:
            reason = error.strerror or error
            raise CheckpointError(f"cannot open '{self.path}': {reason}; give the path of a GGUF file") from None

    def _place(self, entries: list[TensorEntry], alignment: int) -> dict[str, TensorEntry]:
        """Offsets from the start of the file, once every tensor is known to lie inside it and beside the others."""
        tensors: dict[str, TensorEntry] = {}
        for entry in entries:
            start = self.data_offset + entry.offset
            if entry.offset % alignment:
                self.fail(f"tensor {entry.shown} starts at {entry.offset}, which is no multiple of {alignment}")
            if start + entry.nbytes > self.size:
                self.fail(
                    f"tensor {entry.shown} ({entry.kind} {list(entry.shape)}) ends at byte {start + entry.nbytes}, "
                    f"but the file has {self.size} bytes"
                )
            if entry.name in tensors:
                self.fail(f"tensor {entry.shown} is listed twice")
            tensors[entry.name] = replace(entry, offset=start)
        previous = None
        for entry in sorted(tensors.values(), key=lambda each: each.offset):
            if previous is not None and entry.offset < previous.offset + previous.nbytes:
                self.fail(f"tensors {previous.shown} and {entry.shown} overlap at byte {entry.offset}")
            previous = entry
        return tensors

    def bytes_of(self, entry: TensorEntry) -> Tensor:
        """The tensor as stored: uint8 [nbytes], a view of the mapping. Never write to it."""
        return torch.frombuffer(self.map, dtype=torch.uint8, count=entry.nbytes, offset=entry.offset)

    def header_bytes(self) -> bytes:
        """Everything before the data of the tensors."""
        return self.map[: min(self.data_offset, self.size)]

    def release(self, start: int, end: int) -> None:
        """Let go of resident pages between two bytes (the file cache keeps them): the peak stays near what is built."""
        first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first and hasattr(mmap, "MADV_DONTNEED"):
            self.map.madvise(mmap.MADV_DONTNEED, first, last - first)


def _read_counts(cursor: Cursor) -> tuple[int, int, int]:
    """(version, tensors, metadata entries), each plausible."""
    file = cursor.header
    magic = file.map[:4]
    if magic != b"GGUF":
        raise CheckpointError(
            f"'{file.path}' is no GGUF file: it starts with {magic!r} instead of b'GGUF'; give a .gguf file"
        )
    cursor.position = 4
    version = cursor.u32()
    if version & 0xFFFF == 0 and version:
        raise CheckpointError(f"'{file.path}' is a big-endian GGUF file: convert it to little-endian first")
    if version not in (2, 3):
        raise CheckpointError(
            f"'{file.path}' has GGUF version {version}: versions 2 and 3 can be read; convert it again"
        )
    tensor_count, metadata_count = cursor.u64(), cursor.u64()
    # The smallest entry of the directory has 24 bytes, the smallest metadata entry 13.
    for what, count, least, limit in (
        ("tensors", tensor_count, 24, MAX_TENSORS),
        ("metadata entries", metadata_count, 13, MAX_METADATA),
    ):
        if count > min(limit, file.size // least):
            file.fail(f"it claims {count} {what}, and at most {min(limit, file.size // least)} are possible")
    return version, tensor_count, metadata_count


def _read_entry(cursor: Cursor) -> TensorEntry:
    file = cursor.header
    name = cursor.text("a tensor's name", limit=MAX_KEY_BYTES)
    shown = repr(name[:SHOWN])
    dimensions = cursor.u32()
    if dimensions > MAX_DIMENSIONS:
        file.fail(f"tensor {shown} claims {dimensions} dimensions, at most {MAX_DIMENSIONS} are allowed")
    shape = tuple(reversed([cursor.u64() for _ in range(dimensions)]))
    number, offset = cursor.u32(), cursor.u64()
    kind = KIND_NUMBERS.get(number)
    if kind is None:
        raise CheckpointError(
            f"tensor {shown} in '{file.path}' has the type number {number}, which cannot be read: "
            f"allowed are {', '.join(BLOCKS)}"
        )
    elements = 1
    for size in shape:
        elements *= size
    block = BLOCKS[kind]
    if elements == 0 or (shape and shape[-1] % block.columns):
        file.fail(f"tensor {shown} has the shape {list(shape)}, but {kind} rows are multiples of {block.columns}")
    if block.columns > 1 and not shape:
        file.fail(f"tensor {shown} is a scalar of the block type {kind}")
    return TensorEntry(name, kind, shape, offset, elements // block.columns * block.nbytes)
