"""Bars on stderr for downloads and loading; nothing is drawn where stderr is no terminal."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

SHOW_AFTER = 0.3  # seconds: work that is done by then shows no bar


class Bars:
    """`fewer.checkpoint.store.Progress` for downloads, `on_matrix` for loading, `step` for counted work.

    Rich is imported when the first bar is drawn, so a model that loads at once pays nothing.
    """

    def __init__(self) -> None:
        self._bars: Progress | None = None
        self._task: TaskID | None = None
        self._label = ""
        self._start = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def start(self, description: str, total_bytes: int) -> None:
        """A download begins. Without a terminal one line says so."""
        if not sys.stderr.isatty():
            print(f"{description} ({total_bytes / 1e6:.0f} MB)", file=sys.stderr, flush=True)
            return
        from rich.progress import DownloadColumn, TimeRemainingColumn, TransferSpeedColumn

        self._open(description, total_bytes, DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())

    def advance(self, n: int) -> None:
        if self._bars is not None and self._task is not None:
            self._bars.advance(self._task, n)

    def finish(self) -> None:
        self._close()

    def on_matrix(self, done: int, total: int) -> None:
        """Loading: a bar appears when it takes longer than a moment."""
        self.step("loading", done, total)

    def step(self, label: str, done: float, total: float) -> None:
        """`done` of `total` of the work called `label`."""
        import time

        if not sys.stderr.isatty():
            return
        if label != self._label:
            self._close()
            self._label, self._start = label, time.monotonic()
        if self._bars is None:
            if time.monotonic() - self._start < SHOW_AFTER or done >= total:
                return
            from rich.progress import MofNCompleteColumn, TimeRemainingColumn

            self._open(label, total, MofNCompleteColumn(), TimeRemainingColumn())
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, completed=done, total=total)
        if done >= total:
            self._close()

    def _open(self, description: str, total: float, *columns: object) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn

        self._close()
        shown = [column for column in columns if isinstance(column, ProgressColumn)]
        self._bars = Progress(
            TextColumn("{task.description}"), BarColumn(), *shown, console=Console(stderr=True), transient=True
        )
        self._bars.start()
        self._task = self._bars.add_task(description, total=total)

    def _close(self) -> None:
        if self._bars is not None:
            self._bars.stop()
        self._bars, self._task, self._label = None, None, ""
