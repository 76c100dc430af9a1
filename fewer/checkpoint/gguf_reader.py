"""The GGUF container: metadata and tensor directory of a memory-mapped file, read without trusting it.

Every count, length and offset is held against the file's size before it is used, so a damaged or hostile file costs
one sentence and no memory. Metadata is lazy: opening a file only walks over values; arrays (49,152 tokens and their
merges in the default model) are decoded when asked for. Versions 2 and 3, little-endian, as in ggml's docs/gguf.md.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from fewer.checkpoint.gguf_blocks import BLOCKS, KIND_NUMBERS
from fewer.errors import CheckpointError

MAX_METADATA = 1 << 16  # entries; real files have dozens
MAX_TENSORS = 1 << 18  # an old per-expert layout of a large mixture has thousands
MAX_KEY_BYTES = (1 << 16) - 1
MAX_DIMENSIONS = 4
MAX_ARRAY_DEPTH = 4
DEFAULT_ALIGNMENT = 32

_STRING, _ARRAY = 8, 9
_SCALARS = {
    number: struct.Struct("<" + letter)
    for number, letter in {
        0: "B",
        1: "b",
        2: "H",
        3: "h",
        4: "I",
        5: "i",
        6: "f",
        7: "?",
        10: "Q",
        11: "q",
        12: "d",
    }.items()
}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One line of the directory: `shape` in the order of PyTorch, `offset` from the start of the file."""

    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class GGUFFile:
    """An open GGUF file: `metadata`, `tensors` by name, and their bytes, mapped and read on demand."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                self.size = file.seek(0, 2)
                if self.size < 24:
                    raise CheckpointError(
                        f"'{self.path}' is no GGUF file: it has {self.size} bytes, and a GGUF header has at least 24"
                    )
                # A private mapping: writable for torch's sake, never written, so pages stay those of the file cache.
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            reason = error.strerror or error
            raise CheckpointError(f"cannot open '{self.path}': {reason}; give the path of a GGUF file") from None
        cursor = _Cursor(self)
        self.version, tensor_count, metadata_count = _read_counts(cursor)
        self.metadata = Metadata(cursor, metadata_count)
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
            self.fail(f"general.alignment is {alignment!r}, which is not a power of two up to {1 << 20}")
        entries = [_read_entry(cursor) for _ in range(tensor_count)]
        self.data_offset = -(-cursor.position // alignment) * alignment
        self.tensors = self._place(entries, alignment)

    def fail(self, fault: str) -> NoReturn:
        raise CheckpointError(f"'{self.path}' is damaged or not a valid GGUF file: {fault}; download it again")

    def _place(self, entries: list[TensorEntry], alignment: int) -> dict[str, TensorEntry]:
        """Offsets from the start of the file, once every tensor is known to lie inside it and beside the others."""
        tensors: dict[str, TensorEntry] = {}
        for entry in entries:
            start = self.data_offset + entry.offset
            if entry.offset % alignment:
                self.fail(f"tensor '{entry.name}' starts at {entry.offset}, which is no multiple of {alignment}")
            if start + entry.nbytes > self.size:
                self.fail(
                    f"tensor '{entry.name}' ({entry.kind} {list(entry.shape)}) ends at byte {start + entry.nbytes}, "
                    f"but the file has {self.size} bytes"
                )
            if entry.name in tensors:
                self.fail(f"tensor '{entry.name}' is listed twice")
            tensors[entry.name] = TensorEntry(entry.name, entry.kind, entry.shape, start, entry.nbytes)
        previous = None
        for entry in sorted(tensors.values(), key=lambda each: each.offset):
            if previous is not None and entry.offset < previous.offset + previous.nbytes:
                self.fail(f"tensors '{previous.name}' and '{entry.name}' overlap at byte {entry.offset}")
            previous = entry
        return tensors

    def bytes_of(self, entry: TensorEntry) -> Tensor:
        """The tensor as stored: uint8 [nbytes], a view of the mapping. Never write to it."""
        return torch.frombuffer(self.map, dtype=torch.uint8, count=entry.nbytes, offset=entry.offset)

    def header(self) -> bytes:
        return self.map[: min(self.data_offset, self.size)]

    def release(self, entry: TensorEntry) -> None:
        """Let go of the tensor's resident pages (they stay in the file cache): keeps the peak near what is built."""
        start = -(-entry.offset // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (entry.offset + entry.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
        if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
            self.map.madvise(mmap.MADV_DONTNEED, start, length)


class Metadata(Mapping[str, object]):
    """The key-value part of the header. Numbers and strings come as int, float, bool, str; arrays as lists."""

    def __init__(self, cursor: _Cursor, count: int):
        self._file = cursor.file
        self._places: dict[str, tuple[int, int]] = {}  # key -> (type of the value, where it starts)
        for _ in range(count):
            key = cursor.text("a metadata key", limit=MAX_KEY_BYTES)
            kind = cursor.u32()
            if key in self._places:
                self._file.fail(f"the metadata key '{key}' appears twice")
            self._places[key] = kind, cursor.position
            cursor.skip(kind, f"the metadata key '{key}'")

    def __getitem__(self, key: str) -> object:
        kind, position = self._places[key]
        return _Cursor(self._file, position).value(kind)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def array_length(self, key: str) -> int | None:
        """Elements of an array without decoding it; None where `key` is absent or no array."""
        kind, position = self._places.get(key, (None, 0))
        return _Cursor(self._file, position + 4).u64() if kind == _ARRAY else None


class _Cursor:
    """A position in the file's header that moves forward and refuses to leave the file."""

    def __init__(self, file: GGUFFile, position: int = 0):
        self.file = file
        self.position = position

    def take(self, form: struct.Struct) -> int | float | bool:
        if self.position + form.size > self.file.size:
            self.file.fail(f"it ends inside its header, at byte {self.file.size}")
        (value,) = form.unpack_from(self.file.map, self.position)
        self.position += form.size
        return value

    def u32(self) -> int:
        return int(self.take(_U32))

    def u64(self) -> int:
        return int(self.take(_U64))

    def text(self, what: str, limit: int | None = None) -> str:
        """A string that must be valid UTF-8."""
        length = self.u64()
        rest = self.file.size - self.position
        if length > min(rest, limit if limit is not None else rest):
            self.file.fail(f"{what} claims {length} bytes, but at most {min(rest, limit or rest)} are possible there")
        data = self.file.map[self.position : self.position + length]
        self.position += length
        try:
            return data.decode()
        except UnicodeDecodeError:
            self.file.fail(f"{what} is not valid UTF-8: {data[:40]!r}")

    def skip(self, kind: int, what: str, depth: int = 0) -> None:
        """Walk over one value, checking that it lies inside the file."""
        if kind in _SCALARS:
            self._skip_bytes(_SCALARS[kind].size, what)
        elif kind == _STRING:
            self._skip_bytes(self.u64(), what)
        elif kind != _ARRAY:
            self.file.fail(f"{what} has the unknown value type {kind}")
        else:
            item, count = self.u32(), self.u64()
            if depth == MAX_ARRAY_DEPTH:
                self.file.fail(f"{what} nests arrays deeper than {MAX_ARRAY_DEPTH} levels")
            least = _SCALARS[item].size if item in _SCALARS else 12 if item == _ARRAY else 8
            if count * least > self.file.size - self.position:
                self.file.fail(f"{what} claims an array of {count} items, more than the rest of the file can hold")
            if item in _SCALARS:
                self._skip_bytes(count * least, what)
            elif item == _STRING:
                self._skip_strings(count, what)
            else:
                for _ in range(count):
                    self.skip(item, what, depth + 1)

    def _skip_bytes(self, count: int, what: str) -> None:
        if count > self.file.size - self.position:
            self.file.fail(f"{what} claims {count} bytes, but {self.file.size - self.position} are left in the file")
        self.position += count

    def _skip_strings(self, count: int, what: str) -> None:
        position, buffer, unpack = self.position, self.file.map, _U64.unpack_from
        try:
            for _ in range(count):
                position += 8 + unpack(buffer, position)[0]
        except (struct.error, OverflowError):
            position = self.file.size + 1
        if position > self.file.size:
            self.file.fail(f"a string of {what} reaches beyond the end of the file")
        self.position = position

    def value(self, kind: int) -> object:
        """Decode a value that `skip` has already checked."""
        if kind in _SCALARS:
            return self.take(_SCALARS[kind])
        if kind == _STRING:
            return self._strings(1)[0]
        item, count = self.u32(), self.u64()
        if item in _SCALARS:
            form = struct.Struct(f"<{count}{_SCALARS[item].format[1:]}")
            values = form.unpack_from(self.file.map, self.position)
            self.position += form.size
            return list(values)
        return self._strings(count) if item == _STRING else [self.value(item) for _ in range(count)]

    def _strings(self, count: int) -> list[str]:
        """Strings of the model (tokens, templates): bytes that are not UTF-8 become replacement characters."""
        position, buffer, unpack, texts = self.position, self.file.map, _U64.unpack_from, []
        for _ in range(count):
            start = position + 8
            position = start + unpack(buffer, position)[0]
            texts.append(buffer[start:position].decode(errors="replace"))
        self.position = position
        return texts


def _read_counts(cursor: _Cursor) -> tuple[int, int, int]:
    """(version, tensors, metadata entries), each plausible."""
    file = cursor.file
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


def _read_entry(cursor: _Cursor) -> TensorEntry:
    file = cursor.file
    name = cursor.text("a tensor's name", limit=MAX_KEY_BYTES)
    dimensions = cursor.u32()
    if dimensions > MAX_DIMENSIONS:
        file.fail(f"tensor '{name}' claims {dimensions} dimensions, at most {MAX_DIMENSIONS} are allowed")
    shape = tuple(reversed([cursor.u64() for _ in range(dimensions)]))
    number, offset = cursor.u32(), cursor.u64()
    kind = KIND_NUMBERS.get(number)
    if kind is None:
        raise CheckpointError(
            f"tensor '{name}' in '{file.path}' has the type number {number}, which cannot be read: "
            f"allowed are {', '.join(BLOCKS)}"
        )
    elements = 1
    for size in shape:
        elements *= size
    block = BLOCKS[kind]
    if elements == 0 or (shape and shape[-1] % block.columns):
        file.fail(f"tensor '{name}' has the shape {list(shape)}, but {kind} rows are multiples of {block.columns}")
    if block.columns > 1 and not shape:
        file.fail(f"tensor '{name}' is a scalar of the block type {kind}")
    return TensorEntry(name, kind, shape, offset, elements // block.columns * block.nbytes)
