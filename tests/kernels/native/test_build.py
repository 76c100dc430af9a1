"""The C code compiles without a warning for every kind of processor, and where it cannot be compiled it says why."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fewer.home import home
from fewer.kernels.native import Unavailable, build, library

compiler = shutil.which("cc")
needs_compiler = pytest.mark.skipif(compiler is None, reason="there is no C compiler")
on_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="compiles for x86 processors")


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FEWER_HOME", str(tmp_path))
    monkeypatch.delenv("FEWER_NATIVE", raising=False)
    library.cache_clear()
    yield
    library.cache_clear()


@needs_compiler
@on_x86
@pytest.mark.parametrize("processor", ["x86-64-v4", "x86-64-v3", "x86-64-v2"])  # AVX-512, AVX2, neither
def test_it_compiles_without_a_warning(processor: str, tmp_path: Path) -> None:
    assert compiler is not None
    flags = [f"-march={processor}" if flag == "-march=native" else flag for flag in build.FLAGS]
    warnings = ["-Wall", "-Wextra", "-Werror"]
    source, made = build.FOLDER / "decode.c", tmp_path / "decode.so"
    subprocess.run([compiler, *flags, *warnings, str(source), "-o", str(made), "-lm"], check=True)


@needs_compiler
def test_it_is_compiled_once_and_kept() -> None:
    assert isinstance(library(), ctypes.CDLL)
    (kept,) = (home() / "kernels").iterdir()
    written = kept.stat().st_mtime_ns
    library.cache_clear()
    assert isinstance(library(), ctypes.CDLL)
    assert [each.stat().st_mtime_ns for each in (home() / "kernels").iterdir()] == [written]


def why_not() -> str:
    reason = library()
    assert isinstance(reason, Unavailable)
    return str(reason)


def test_it_can_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWER_NATIVE", "0")
    assert why_not() == "FEWER_NATIVE is 0"


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    assert why_not() == "there is no C compiler (no-such-compiler)"


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = tmp_path / "failing"
    failing.write_text("#!/bin/sh\necho this processor is unknown >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setenv("CC", str(failing))
    assert why_not().endswith("failed: this processor is unknown")
    assert not any((home() / "kernels").iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("FEWER_HOME", str(blocked))
    if compiler is not None:
        assert f"could not be compiled in {blocked}" in why_not()


def test_a_damaged_library_is_not_fatal() -> None:
    kept = home() / "kernels" / f"decode-{build._fingerprint()}.so"
    kept.parent.mkdir()
    kept.write_bytes(b"not a library")
    assert "does not load" in why_not() and str(kept) in why_not()


def test_other_sources_have_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = build._fingerprint()
    copied = tmp_path / "native"
    shutil.copytree(build.FOLDER, copied)
    (copied / "decode.c").write_text((copied / "decode.c").read_text() + "\n")
    monkeypatch.setattr(build, "FOLDER", copied)
    assert build._fingerprint() != before
