"""Python's cycle collector waits while many objects that are no garbage, or will be gone by themselves, are made."""

from __future__ import annotations

import gc
from types import TracebackType


class CollectorPause:
    """`with CollectorPause(): work`. Nested pauses, and a collector that the program has disabled, stay as they are."""

    __slots__ = ("enabled",)

    def __enter__(self) -> None:
        self.enabled = gc.isenabled()
        gc.disable()

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.enabled:
            gc.enable()
