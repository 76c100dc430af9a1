"""Damaged and hostile GGUF files: one sentence that names the fault, whatever the bytes; no hang, no big allocation."""

from __future__ import annotations

import os
import struct
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewer.checkpoint.gguf import GGUFCheckpoint
from fewer.checkpoint.gguf_header import MAX_ARRAY_ITEMS
from fewer.errors import CheckpointError
from tests.checkpoint.raw_gguf import (
    EDGES,
    HEADER_BYTES,
    HEADS,
    HUGE,
    QUERY,
    VALID,
    WIDTH,
    RawGGUF,
    array,
    entry,
    fault_of,
    metadata_of,
    number_entry,
    opened,
    string,
    tensor_entry,
    text_entry,
    tiny_file,
    use,
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf") / "model.gguf"


def test_the_file_that_the_other_tests_damage_is_sound(path: Path) -> None:
    assert use(VALID, path)
    assert opened(VALID, path).config.heads == HEADS


# ── what a file is not ──────────────────────────────────────────────────────────────────────────────────────────────


def swapped(data: bytes) -> bytes:
    """The first fields as a big-endian writer leaves them."""
    return data[:4] + struct.pack(">IQQ", *struct.unpack("<IQQ", data[4:24])) + data[24:]


NOT_READABLE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "has 0 bytes"),
    "short": (b"GGUF" + bytes(19), "has 23 bytes"),
    "zip": (b"PK\x03\x04" + bytes(100), r"starts with b'PK\x03\x04'"),
    "html": (b"<!DOCTYPE html><html>not found</html>", "instead of b'GGUF'"),
    "binary magic": (tiny_file(magic=b"\x1b[2J"), r"starts with b'\x1b[2J'"),
    "version 1": (tiny_file(version=1), "GGUF version 1"),
    "version 9": (tiny_file(version=9), "versions 2 and 3 can be read"),
    "big-endian": (swapped(VALID), "big-endian"),
}


@pytest.mark.parametrize("case", NOT_READABLE)
def test_what_is_no_readable_gguf_is_named(case: str, path: Path) -> None:
    data, expected = NOT_READABLE[case]
    assert expected in fault_of(data, path)


def test_a_missing_file_a_folder_and_a_pipe_are_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place, expected in (
        (tmp_path / "none.gguf", "No such file"),
        (tmp_path, "not a file"),
        (tmp_path / "pipe", "not a file"),
    ):
        with pytest.raises(CheckpointError, match=expected):
            GGUFCheckpoint(place)


def test_a_file_cut_anywhere_is_refused(path: Path) -> None:
    cuts = [*range(HEADER_BYTES + 40), *range(HEADER_BYTES + 40, len(VALID), 211), len(VALID) - 1]
    for cut in cuts:
        fault_of(VALID[:cut], path)


# ── headers that lie ────────────────────────────────────────────────────────────────────────────────────────────────


LIES: dict[str, tuple[bytes, str]] = {
    "tensor count": (tiny_file(tensor_count=HUGE), f"claims {HUGE} tensors"),
    "a tensor too many": (RawGGUF(tensor_count=1, data=bytes(10)).build(), "it ends inside its header, at byte 42"),
    "metadata count": (tiny_file(metadata_count=1 << 40), f"claims {1 << 40} metadata entries"),
    "key length": (tiny_file({"x": string("x", HUGE)}), f"key claims {HUGE} bytes"),
    "key too long": (tiny_file({"x": entry("k" * 70_000, 0, b"\0")}), "claims 70000 bytes"),
    "key no UTF-8": (tiny_file({"x": entry(b"\xff\xfe", 0, b"\0")}), "not valid UTF-8"),
    "duplicate key": (tiny_file({"x": number_entry("llama.block_count", 1)}), "'llama.block_count' appears twice"),
    "value type": (tiny_file({"x": entry("x", 13, b"")}), "unknown value type 13"),
    "string length": (tiny_file({"x": entry("x", 8, string("", HUGE))}), f"'x' claims {HUGE} bytes"),
    "array count": (tiny_file({"x": entry("x", 9, array(5, 1 << 62))}), f"an array of {1 << 62} items"),
    "array beyond": (tiny_file({"x": entry("x", 9, array(5, 1 << 20))}), "items, and at most"),
    "array of strings behind one without end": (
        tiny_file({"x": entry("x", 9, array(8, 3, string("", HUGE) + string("a") * 2))}),
        "beyond the end",
    ),
    "array of strings": (
        tiny_file({"x": entry("x", 9, array(8, 2, string("a") + string("", HUGE)))}),
        "beyond the end",
    ),
    "nested array": (tiny_file({"x": entry("x", 9, array(9, 1, array(0, 1, b"\0")))}), "'x' is an array of arrays"),
    "array of nothing": (tiny_file({"x": entry("x", 9, array(77, 1))}), "unknown type 77"),
    "tensor name": (
        tiny_file(tensors={"t\x1b[31m\n": (WIDTH,)}, places={"t\x1b[31m\n": 1}),
        r"'t\x1b[31m\n' starts at 1",
    ),
    "duplicate tensor": (
        RawGGUF(
            list(metadata_of().values()), [tensor_entry("a", (8,)), tensor_entry("a", (8,), 0, 32)], bytes(64)
        ).build(),
        "'a' is listed twice",
    ),
    "dimensions": (tiny_file(tensors={QUERY: (1,) * 5}), "claims 5 dimensions, at most 4"),
    "no dimensions, blocks": (tiny_file(tensors={QUERY: ()}, kinds={QUERY: 8}), "a scalar of the block type Q8_0"),
    "zero dimension": (tiny_file(tensors={QUERY: (0, WIDTH)}), "has the shape [0, 32]"),
    "huge dimension": (tiny_file(tensors={QUERY: (1 << 63, WIDTH)}), "but the file has"),
    "overflowing product": (tiny_file(tensors={QUERY: (1 << 32, 1 << 32)}), "but the file has"),
    "overflowing bytes": (tiny_file(tensors={QUERY: (1 << 60, 1 << 2, 1 << 2)}), "but the file has"),
    "broken block": (tiny_file(tensors={QUERY: (WIDTH, 33)}, kinds={QUERY: 8}), "rows are multiples of 32"),
    "type number": (tiny_file(kinds={QUERY: 9}), "type number 9, which cannot be read: allowed are F32, F16"),
    "offset beyond": (tiny_file(places={QUERY: 1 << 30}), "but the file has"),
    "offset at the edge": (tiny_file(places={QUERY: HUGE - 31}), "but the file has"),
    "unaligned": (tiny_file(places={QUERY: 36}), "starts at 36, which is no multiple of 32"),
    "overlapping": (tiny_file(places={QUERY: 0}), "overlap at byte"),
    "alignment 0": (tiny_file({"a": number_entry("general.alignment", 0)}), "general.alignment is '0'"),
    "alignment 48": (tiny_file({"a": number_entry("general.alignment", 48)}), "not a power of two"),
    "alignment of text": (tiny_file({"a": text_entry("general.alignment", "\x07" * 99)}), "general.alignment is"),
    "alignment in an array": (
        tiny_file({"a": entry("general.alignment", 9, array(0, 9, bytes(9)))}),
        "an array of 9 items instead of one value",
    ),
}


@pytest.mark.parametrize("case", LIES)
def test_a_lying_header_is_named(case: str, path: Path) -> None:
    data, expected = LIES[case]
    assert expected in fault_of(data, path)


def test_an_array_longer_than_any_vocabulary_is_refused_unread(path: Path) -> None:
    data = tiny_file({"x": entry("x", 9, array(0, MAX_ARRAY_ITEMS + 1, bytes(MAX_ARRAY_ITEMS + 1)))})
    assert f"at most {MAX_ARRAY_ITEMS} are possible" in fault_of(data, path)


@pytest.mark.parametrize(
    "key", ["general.architecture", "general.alignment", "llama.block_count", "llama.rope.freq_base"]
)
def test_an_array_in_place_of_a_value_costs_no_memory(key: str, path: Path) -> None:
    """Decoded, the million small negative numbers would take 36 MB."""
    data = tiny_file({key: entry(key, 9, array(1, 1 << 20, b"\x80" * (1 << 20)))})
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=f"{key}.* array of {1 << 20} items"):
        GGUFCheckpoint(path)
    assert tracemalloc.get_traced_memory()[1] < 500_000
    tracemalloc.stop()


# ── any bytes at all ────────────────────────────────────────────────────────────────────────────────────────────────

many = settings(max_examples=300, deadline=None)


@many
@given(st.lists(st.tuples(st.integers(0, HEADER_BYTES - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_header_with_changed_bytes_opens_or_is_refused(path: Path, changes: list[tuple[int, int]]) -> None:
    data = bytearray(VALID)
    for place, byte in changes:
        data[place] = byte
    use(bytes(data), path)


@many
@given(st.integers(0, HEADER_BYTES - 8), st.sampled_from(EDGES), st.sampled_from(["<Q", "<I"]))
def test_a_header_with_an_extreme_number_anywhere_opens_or_is_refused(
    path: Path, place: int, value: int, form: str
) -> None:
    data = bytearray(VALID)
    struct.pack_into(form, data, place, value & ((1 << 8 * struct.calcsize(form)) - 1))
    use(bytes(data), path)


@many
@given(st.integers(4, HEADER_BYTES - 1), st.integers(0, 40), st.binary(max_size=40))
def test_a_header_with_bytes_removed_and_inserted_opens_or_is_refused(
    path: Path, place: int, removed: int, inserted: bytes
) -> None:
    use(VALID[:place] + inserted + VALID[place + removed :], path)


@many
@given(st.binary(max_size=600))
def test_noise_behind_the_magic_is_refused(path: Path, noise: bytes) -> None:
    assert not use(b"GGUF" + struct.pack("<I", 3) + noise, path)
