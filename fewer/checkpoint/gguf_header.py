"""GGUF's header as bytes: a cursor that never leaves the file, and the metadata, decoded when asked for.

Every count and length is held against what is left of the file before it is used. Opening a file only walks over
its values; arrays (49,152 tokens and their merges in the default model) become lists on request.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from fewer.errors import CheckpointError

MAX_KEY_BYTES = (1 << 16) - 1
MAX_ARRAY_ITEMS = 1 << 22  # the largest vocabularies have about 2^18 tokens and 2^19 merges
SHOWN = 80  # characters of a name from the file that a message quotes

_STRING, _ARRAY = 8, 9
_SCALARS = {
    number: struct.Struct("<" + letter)
    for number, letter in zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True)
}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclass(frozen=True)
class Header:
    """The mapped file behind a cursor."""

    path: Path
    map: mmap.mmap
    size: int

    def fail(self, fault: str) -> NoReturn:
        raise CheckpointError(f"'{self.path}' is damaged or not a valid GGUF file: {fault}; download it again")


class Cursor:
    """A position in the file's header that moves forward and refuses to leave the file."""

    def __init__(self, header: Header, position: int = 0):
        self.header = header
        self.position = position

    def take(self, form: struct.Struct) -> int | float | bool:
        if self.position + form.size > self.header.size:
            self.header.fail(f"it ends inside its header, at byte {self.header.size}")
        (value,) = form.unpack_from(self.header.map, self.position)
        self.position += form.size
        return value

    def u32(self) -> int:
        return int(self.take(_U32))

    def u64(self) -> int:
        return int(self.take(_U64))

    def text(self, what: str, limit: int | None = None) -> str:
        """A string that must be valid UTF-8."""
        length = self.u64()
        rest = self.header.size - self.position
        if length > min(rest, limit if limit is not None else rest):
            self.header.fail(f"{what} claims {length} bytes, but at most {min(rest, limit or rest)} are possible there")
        data = self.header.map[self.position : self.position + length]
        self.position += length
        try:
            return data.decode()
        except UnicodeDecodeError:
            self.header.fail(f"{what} is not valid UTF-8: {data[:40]!r}")

    def skip(self, kind: int, what: str) -> None:
        """Walk over one value, checking that it lies inside the file."""
        if kind in _SCALARS:
            self._skip_bytes(_SCALARS[kind].size, what)
        elif kind == _STRING:
            self._skip_bytes(self.u64(), what)
        elif kind != _ARRAY:
            self.header.fail(f"{what} has the unknown value type {kind}")
        else:
            item, count = self.u32(), self.u64()
            if item not in _SCALARS and item != _STRING:
                wrong = "arrays" if item == _ARRAY else f"items of the unknown type {item}"
                self.header.fail(f"{what} is an array of {wrong}, and only numbers and strings are allowed in one")
            least = _SCALARS[item].size if item in _SCALARS else 8
            most = min(MAX_ARRAY_ITEMS, (self.header.size - self.position) // least)
            if count > most:
                self.header.fail(f"{what} claims an array of {count} items, and at most {most} are possible there")
            if item in _SCALARS:
                self._skip_bytes(count * least, what)
            else:
                self._skip_strings(count, what)

    def _skip_bytes(self, count: int, what: str) -> None:
        if count > self.header.size - self.position:
            self.header.fail(
                f"{what} claims {count} bytes, but {self.header.size - self.position} are left in the file"
            )
        self.position += count

    def _skip_strings(self, count: int, what: str) -> None:
        position, buffer, unpack = self.position, self.header.map, _U64.unpack_from
        try:
            for _ in range(count):
                position += 8 + unpack(buffer, position)[0]
        except (struct.error, OverflowError):
            position = self.header.size + 1
        if position > self.header.size:
            self.header.fail(f"a string of {what} reaches beyond the end of the file")
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
            values = form.unpack_from(self.header.map, self.position)
            self.position += form.size
            return list(values)
        return self._strings(count)

    def _strings(self, count: int) -> list[str]:
        """Strings of the model (tokens, templates): bytes that are not UTF-8 become replacement characters."""
        position, buffer, unpack, texts = self.position, self.header.map, _U64.unpack_from, []
        for _ in range(count):
            start = position + 8
            position = start + unpack(buffer, position)[0]
            texts.append(buffer[start:position].decode(errors="replace"))
        self.position = position
        return texts


class Metadata(Mapping[str, object]):
    """The key-value part of the header. Numbers and strings come as int, float, bool, str; arrays as lists."""

    def __init__(self, cursor: Cursor, count: int):
        self._header = cursor.header
        self._places: dict[str, tuple[int, int]] = {}  # key -> (type of the value, where it starts)
        for _ in range(count):
            key = cursor.text("a metadata key", limit=MAX_KEY_BYTES)
            kind = cursor.u32()
            if key in self._places:
                self._header.fail(f"the metadata key {key[:SHOWN]!r} appears twice")
            self._places[key] = kind, cursor.position
            cursor.skip(kind, f"the metadata key {key[:SHOWN]!r}")

    def __getitem__(self, key: str) -> object:
        kind, position = self._places[key]
        return Cursor(self._header, position).value(kind)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def scalar(self, key: str) -> object:
        """The one value of `key`, None where it is absent. An array in its place is refused, not decoded."""
        length = self.array_length(key)
        if length is not None:
            self._header.fail(f"the metadata key {key[:SHOWN]!r} holds an array of {length} items instead of one value")
        return self.get(key)

    def array_length(self, key: str) -> int | None:
        """Elements of an array without decoding it; None where `key` is absent or no array."""
        kind, position = self._places.get(key, (None, 0))
        return Cursor(self._header, position + 4).u64() if kind == _ARRAY else None
