"""The folder of installed models: where each one lies, which are complete, one writer at a time, removal.

`FEWER_HOME` (default `~/.cache/fewer`) holds `models/<alias>/`, and beside it `models/<alias>.partial/` while a
download is under way or was interrupted.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from filelock import FileLock, Timeout

from fewer.checkpoint.aliases import ALIASES, Alias
from fewer.errors import CheckpointError, UsageError
from fewer.home import home


class Progress(Protocol):
    """Who shows a long piece of work. `advance` may be negative: a server that cannot resume starts again."""

    def start(self, description: str, total_bytes: int) -> None: ...

    def advance(self, n: int) -> None: ...

    def finish(self) -> None: ...


class Silent:
    """Shows nothing."""

    def start(self, description: str, total_bytes: int) -> None:
        pass

    def advance(self, n: int) -> None:
        pass

    def finish(self) -> None:
        pass


@dataclass(frozen=True)
class InstalledModel:
    """A complete model on this machine."""

    name: str
    path: Path  # the file, or the folder of a model that is one
    nbytes: int
    licence: str


def folder_of(alias: Alias) -> Path:
    return home() / "models" / alias.name


def partial_folder_of(alias: Alias) -> Path:
    """Where a download is put together; what an interrupted one left there is used by the next."""
    return home() / "models" / f"{alias.name}.partial"


def path_of(alias: Alias) -> Path:
    """What a loader opens: the file, or the folder of a model that is one."""
    return folder_of(alias) / alias.file


def is_installed(alias: Alias) -> bool:
    """Whether every file is there with its size. Contents were checked before the folder got its name."""
    folder = folder_of(alias)
    try:
        return all((folder / file.path).stat().st_size == file.size for file in alias.files)
    except OSError:
        return False


def installed() -> list[InstalledModel]:
    """The aliases that are complete on this machine, in the order of the table."""
    return [
        InstalledModel(alias.name, path_of(alias), _bytes_in(folder_of(alias)), alias.licence)
        for alias in ALIASES.values()
        if is_installed(alias)
    ]


def partial_bytes(alias: Alias) -> int:
    """Bytes that an interrupted download holds."""
    return _bytes_in(partial_folder_of(alias))


def remove(name: str) -> int:
    """Deletes an installed alias and what an interrupted download left; returns the bytes freed."""
    alias = ALIASES.get(name)
    if alias is None:
        raise UsageError(f"{name!r} is not a model that fewer installs: choose from {', '.join(ALIASES)}")
    with locked(alias, wait=False):
        folders = [folder for folder in (folder_of(alias), partial_folder_of(alias)) if folder.exists()]
        if not folders:
            have = ", ".join(model.name for model in installed()) or "none"
            raise CheckpointError(f"{name!r} is not installed, so there is nothing to remove (installed: {have})")
        freed = sum(_bytes_in(folder) for folder in folders)
        for folder in folders:
            try:
                shutil.rmtree(folder)
            except OSError as error:
                raise CheckpointError(f"could not remove {folder}: {error.strerror or error}") from error
    return freed


@contextmanager
def locked(alias: Alias, progress: Progress | None = None, wait: bool = True) -> Iterator[None]:
    """Holds the one lock of an alias across processes; without `wait`, a held lock is an error.

    The lock is the operating system's, so a process that dies gives it back.
    """
    models = home() / "models"
    try:
        models.mkdir(parents=True, exist_ok=True)
        lock = FileLock(models / f".{alias.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not wait:
                raise CheckpointError(
                    f"another process is downloading {alias.name!r}: try again when it is done"
                ) from None
            _wait(lock, alias, progress or Silent())
    except OSError as error:
        raise CheckpointError(
            f"cannot write to {models} ({error.strerror or error}): set FEWER_HOME to a folder that you may write to"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _wait(lock: FileLock, alias: Alias, progress: Progress) -> None:
    progress.start(f"waiting for another process that downloads {alias.name}", alias.download_bytes)
    try:
        lock.acquire()
    finally:
        progress.finish()


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
