"""Checks the header of a safetensors file before the safetensors library maps it.

Layout: 8 bytes (little-endian) with the header's length, the header as JSON, then the data. Each tensor names its
dtype, shape and byte range; the ranges must cover the data exactly, without holes and without overlaps.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from fewer.errors import CheckpointError

MAX_HEADER_BYTES = 25_000_000  # about 250,000 tensors; the library's 100 MB of JSON could become gigabytes of objects
SHOWN = 100  # characters of a name from the file that a message quotes
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class HeaderEntry:
    """One tensor of the file: `start` and `end` count from the first byte of the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def check_safetensors(path: Path) -> dict[str, HeaderEntry]:
    """The tensors that the file's header describes; a header that lies raises `CheckpointError`."""
    if path.exists() and not path.is_file():
        raise CheckpointError(f"'{path}' is not a file: give the path of a safetensors file")
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            if size < 8:
                _fail(path, f"it has {size} bytes and cannot even hold the length of its header")
            length = int.from_bytes(file.read(8), "little")
            if length > min(MAX_HEADER_BYTES, size - 8):
                allowed = min(MAX_HEADER_BYTES, size - 8)
                _fail(path, f"its header claims {length} bytes, and at most {allowed} are possible in {size} bytes")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot open '{path}': {error.strerror or error}; check the path") from None
    header = _parse(path, text)
    notes = header.pop("__metadata__", {})  # free text of the writer
    if not isinstance(notes, dict) or not all(isinstance(value, str) for value in notes.values()):
        _fail(path, "its __metadata__ is not an object of strings")
    entries = {name: _entry(path, name, fields, size - 8 - length) for name, fields in header.items()}
    _check_cover(path, entries, size - 8 - length)
    return entries


def _fail(path: Path, fault: str) -> NoReturn:
    raise CheckpointError(f"'{path}' is damaged or not a valid safetensors file: {fault}; download it again")


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for name, value in pairs:
            if name in fields:
                _fail(path, f"its header names {name[:SHOWN]!r} twice")
            fields[name] = value
        return fields

    if not text.startswith(b"{"):
        _fail(path, f"its header starts with {text[:16]!r}, which is no JSON object")
    try:
        header = json.loads(text.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, absurd numbers, absurd nesting
        _fail(path, f"its header is not JSON ({str(error)[:100]})")
    assert isinstance(header, dict)  # it starts with a brace
    for name in header:
        if any("\ud800" <= character <= "\udfff" for character in name):
            _fail(path, f"its header names {name[:SHOWN]!r}, which is not valid Unicode")
    return header


def _entry(path: Path, name: str, fields: Any, data_bytes: int) -> HeaderEntry:
    shown = repr(name[:SHOWN])
    if not isinstance(fields, dict) or not {"dtype", "shape", "data_offsets"} <= fields.keys():
        _fail(path, f"tensor {shown} lacks one of dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        _fail(path, f"tensor {shown} has the unknown dtype {str(dtype)[:40]!r}")
    if not _counts(shape) or len(shape) > 64:
        _fail(path, f"tensor {shown} has the shape {repr(shape)[:100]}, which is no list of sizes")
    if not _counts(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= data_bytes:
        _fail(path, f"tensor {shown} claims the bytes {repr(offsets)[:100]} of {data_bytes} bytes of data")
    start, end = offsets
    # Sizes are bounded by the data before they are multiplied: no product grows without limit.
    fits = 0 in shape or max(shape, default=1) <= 8 * data_bytes
    bits = math.prod(shape) * DTYPE_BITS[dtype] if fits else -1
    if bits != 8 * (end - start):
        _fail(path, f"tensor {shown} of dtype {dtype} and shape {repr(shape)[:100]} cannot be {end - start} bytes long")
    return HeaderEntry(dtype, tuple(shape), start, end)


def _counts(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_cover(path: Path, entries: dict[str, HeaderEntry], data_bytes: int) -> None:
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            fault = "overlaps the one before it" if entry.start < position else "leaves a hole before it"
            _fail(path, f"tensor {name[:SHOWN]!r} at byte {entry.start} of the data {fault} (byte {position})")
        position = entry.end
    if position != data_bytes:
        _fail(path, f"its tensors end at byte {position} of {data_bytes} bytes of data")
