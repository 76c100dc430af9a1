"""Safetensors headers: what the check accepts, the library opens; what lies is named in one sentence."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save

from fewer.checkpoint.safetensors_header import DTYPE_BITS, MAX_HEADER_BYTES, check_safetensors
from fewer.errors import CheckpointError

TENSORS = {
    "embed": torch.arange(12, dtype=torch.float32).view(3, 4),
    "norm": torch.ones(4, dtype=torch.bfloat16),
    "nothing": torch.empty(0, 4),
    "scalar": torch.tensor(2, dtype=torch.int8),
}
VALID = save(TENSORS, {"format": "pt"})
HEADER_END = 8 + struct.unpack_from("<Q", VALID)[0]


def file_of(header: Any, data: bytes = b"", claimed: int | None = None) -> bytes:
    """A file with that header (text as it stands, anything else as JSON), which claims `claimed` bytes of header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if claimed is None else claimed) + text + data


def tensor(start: int, end: int, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("safetensors") / "model.safetensors"


def accepts(data: bytes, path: Path) -> bool:
    """Whether the check passes. A refusal is one printable sentence and costs little memory."""
    path.write_bytes(data)
    tracemalloc.start()
    try:
        check_safetensors(path)
    except CheckpointError as error:
        message = str(error)
        assert len(message) < 800 and message.isprintable() and str(path) in message, message
        return False
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 200_000 + 40 * len(data), f"{peak} bytes allocated for a file of {len(data)}"
    return True


def test_a_sound_file_is_described_as_it_is(path: Path) -> None:
    assert accepts(VALID, path)
    entries = check_safetensors(path)
    assert {name: entry.shape for name, entry in entries.items()} == {
        name: tuple(value.shape) for name, value in TENSORS.items()
    }
    for name, value in TENSORS.items():
        assert entries[name].end - entries[name].start == value.nbytes
    start = HEADER_END + entries["embed"].start
    assert VALID[start : start + 48] == TENSORS["embed"].numpy().tobytes()


def test_every_dtype_of_the_library_has_its_size(path: Path) -> None:
    for dtype, bits in DTYPE_BITS.items():
        assert accepts(file_of({"a": tensor(0, bits, (8,), dtype)}, bytes(bits)), path), dtype
        with safe_open(path, "pt") as opened:
            assert opened.get_slice("a").get_dtype() == dtype


def test_a_file_cut_anywhere_is_refused(path: Path) -> None:
    assert not any(accepts(VALID[:cut], path) for cut in range(len(VALID)))


def test_a_missing_file_a_folder_and_a_pipe_are_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    places = {tmp_path / "none": "No such file", tmp_path: "is not a file", tmp_path / "pipe": "is not a file"}
    for place, expected in places.items():
        with pytest.raises(CheckpointError, match=expected):
            check_safetensors(place)


HUGE = (1 << 64) - 1
LIES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it has 0 bytes"),
    "length beyond the file": (file_of({}, claimed=HUGE), f"claims {HUGE} bytes, and at most 2 are possible"),
    "length of one too many": (file_of({}, claimed=3), "claims 3 bytes, and at most 2 are possible"),
    "pickle": (b"\x80\x02}q\x00." + bytes(99), "its header claims"),
    "no object": (file_of([1, 2]), "starts with b'[1, 2]', which is no JSON object"),
    "escape codes": (file_of(b"\x1b[2J"), r"starts with b'\x1b[2J'"),
    "no JSON": (file_of(b"{'a': 1}"), "its header is not JSON"),
    "text behind the object": (file_of(b"{}{}"), "its header is not JSON (Extra data"),
    "no UTF-8": (file_of(b'{"\xff": 1}'), "its header is not JSON ('utf-8' codec"),
    "UTF-16": (file_of("{}".encode("utf-16-le")), "its header is not JSON"),
    "number of 5,000 digits": (file_of(b'{"a": ' + b"9" * 5000 + b"}"), "its header is not JSON"),
    "nested 100,000 deep": (file_of(b'{"a": ' + b"[" * 100_000), "its header is not JSON"),
    "no Unicode": (file_of(b'{"\\ud800": 1}'), r"names '\ud800', which is not valid Unicode"),
    "duplicate tensor": (file_of(b'{"a": {}, "a": {}}'), "names 'a' twice"),
    "duplicate field": (file_of(b'{"a": {"dtype": "F32", "dtype": "F16"}}'), "names 'dtype' twice"),
    "metadata of numbers": (file_of({"__metadata__": {"format": 1}}), "__metadata__ is not an object of strings"),
    "metadata of text": (file_of({"__metadata__": "pt"}), "__metadata__ is not an object of strings"),
    "tensor that is a list": (file_of({"a": []}), "tensor 'a' lacks one of dtype, shape and data_offsets"),
    "tensor without shape": (file_of({"a": {"dtype": "F32", "data_offsets": [0, 0]}}), "lacks one of dtype, shape"),
    "name that draws": (file_of({"\n\x1b[31m": {}}), r"tensor '\n\x1b[31m' lacks"),
    "name of 9,000 letters": (file_of({"a" * 9000: {}}), "tensor '" + "a" * 100 + "' lacks"),
    "dtype": (file_of({"a": tensor(0, 8, dtype="F33")}, bytes(8)), "the unknown dtype 'F33'"),
    "dtype that is a list": (file_of({"a": tensor(0, 8, dtype=["F32"])}, bytes(8)), "the unknown dtype"),
    "negative size": (file_of({"a": tensor(0, 8, [-2])}, bytes(8)), "has the shape [-2], which is no list of sizes"),
    "half a size": (file_of({"a": tensor(0, 8, [2.0])}, bytes(8)), "has the shape [2.0], which is no list of sizes"),
    "true as a size": (file_of({"a": tensor(0, 4, [True])}, bytes(4)), "has the shape [True]"),
    "65 dimensions": (file_of({"a": tensor(0, 4, [1] * 65)}, bytes(4)), "which is no list of sizes"),
    "another dtype's length": (file_of({"a": tensor(0, 8, dtype="F16")}, bytes(8)), "F16 and shape [2] cannot be 8"),
    "another shape's length": (file_of({"a": tensor(0, 8, [3])}, bytes(8)), "shape [3] cannot be 8 bytes long"),
    "overflowing product": (file_of({"a": tensor(0, 0, [1 << 32, 1 << 32])}), "cannot be 0 bytes long"),
    "a product of 64 factors": (file_of({"a": tensor(0, 8, [HUGE] * 64)}, bytes(8)), "cannot be 8 bytes long"),
    "offsets beyond the file": (file_of({"a": tensor(0, 8)}, bytes(7)), "claims the bytes [0, 8] of 7 bytes of data"),
    "offsets of 64 bits": (file_of({"a": tensor(HUGE - 8, HUGE)}), f"claims the bytes [{HUGE - 8}, {HUGE}] of 0"),
    "offsets backwards": (file_of({"a": tensor(8, 0)}, bytes(8)), "claims the bytes [8, 0]"),
    "negative offsets": (file_of({"a": tensor(-8, 0)}, bytes(8)), "claims the bytes [-8, 0]"),
    "offsets that draw": (
        file_of({"a": {**tensor(0, 8), "data_offsets": "\x1b[2J"}}, bytes(8)),
        r"claims the bytes '\x1b[2J'",
    ),
    "one offset": (file_of({"a": {**tensor(0, 8), "data_offsets": [8]}}, bytes(8)), "claims the bytes [8]"),
    "overlap": (file_of({"a": tensor(0, 8), "b": tensor(4, 12)}, bytes(12)), "'b' at byte 4 of the data overlaps"),
    "same bytes": (file_of({"a": tensor(0, 8), "b": tensor(0, 8)}, bytes(8)), "'b' at byte 0 of the data overlaps"),
    "hole": (file_of({"a": tensor(0, 8), "b": tensor(12, 20)}, bytes(20)), "'b' at byte 12 of the data leaves a hole"),
    "data behind": (file_of({"a": tensor(0, 8)}, bytes(9)), "end at byte 8 of 9 bytes of data"),
}


@pytest.mark.parametrize("case", LIES)
def test_a_lying_header_is_named(case: str, path: Path) -> None:
    data, expected = LIES[case]
    assert not accepts(data, path)
    with pytest.raises(CheckpointError) as caught:
        check_safetensors(path)
    assert expected in str(caught.value)


def test_a_header_longer_than_any_model_needs_is_refused_unread(path: Path) -> None:
    with path.open("wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER_BYTES + 1))
        file.truncate(MAX_HEADER_BYTES + 100)  # a sparse file
    with pytest.raises(CheckpointError, match=f"at most {MAX_HEADER_BYTES} are possible"):
        check_safetensors(path)


def what_the_check_accepts_the_library_opens(data: bytes, path: Path) -> None:
    if accepts(data, path):
        entries = check_safetensors(path)
        with safe_open(path, "pt") as opened:
            assert set(opened.keys()) == set(entries)
            for name, entry in entries.items():
                assert tuple(opened.get_slice(name).get_shape()) == entry.shape


many = settings(max_examples=300, deadline=None)


@many
@given(st.lists(st.tuples(st.integers(0, HEADER_END - 1), st.integers(0, 255)), min_size=1, max_size=3))
def test_changed_bytes_are_refused_or_open_in_the_library(path: Path, changes: list[tuple[int, int]]) -> None:
    data = bytearray(VALID)
    for place, byte in changes:
        data[place] = byte
    what_the_check_accepts_the_library_opens(bytes(data), path)


@many
@given(st.integers(0, HEADER_END), st.integers(0, 20), st.binary(max_size=20))
def test_bytes_removed_and_inserted_are_refused_or_open_in_the_library(
    path: Path, place: int, removed: int, inserted: bytes
) -> None:
    changed = VALID[8:HEADER_END]
    changed = changed[:place] + inserted + changed[place + removed :]
    what_the_check_accepts_the_library_opens(file_of(changed, VALID[HEADER_END:]), path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 1 << 65) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
sizes = st.integers(0, 6) | st.sampled_from([1 << 31, 1 << 63, HUGE])
fields = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPE_BITS, "F33"]) | json_values,
        "shape": st.lists(sizes, max_size=4) | json_values,
        "data_offsets": st.tuples(sizes, sizes).map(sorted) | json_values,
    }
)
sound = st.integers(0, 3).map(lambda count: tensor(0, 4 * count, [count]))


@many
@given(st.dictionaries(st.text(max_size=8), sound | fields | json_values, max_size=3), st.integers(0, 24))
def test_any_header_is_refused_or_opens_in_the_library(path: Path, header: dict[str, Any], data_bytes: int) -> None:
    what_the_check_accepts_the_library_opens(file_of(header, bytes(data_bytes)), path)
