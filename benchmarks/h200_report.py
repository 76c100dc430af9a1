"""What a run on a GPU has found so far: sections that fail alone, written after each."""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

Results = dict[str, object]


class Report:
    """Collects sections and writes them after each."""

    def __init__(self, path: Path, only: list[str], seconds: float):
        """No section starts after `seconds`; `only` names prefixes of the sections to run."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.only, self.stop = path, only, time.monotonic() + seconds
        self.results: Results = {}
        self.lost: str | None = None  # the section after which the device no longer answered

    def wants(self, name: str) -> bool:
        return not self.only or any(name.startswith(prefix) for prefix in self.only)

    def section(self, name: str, work: Callable[[], object]) -> object:
        if not self.wants(name):
            return None
        if self.lost is not None or time.monotonic() > self.stop:
            self.results[name] = f"skipped: the device failed in {self.lost}" if self.lost else "skipped: out of time"
            return None
        start = time.monotonic()
        try:
            result = work()
        except Exception as error:
            traceback.print_exc(limit=6)
            result = {"failed": repr(error)[:500]}
        seconds = round(time.monotonic() - start, 1)
        self.results[name] = {"result": result, "seconds": seconds}
        self.write()
        print(f"== {name} ({seconds} s): {json.dumps(result, default=str)[:1500]}", flush=True)
        self._clean(name)
        return result

    def write(self) -> None:
        self.path.write_text(json.dumps(self.results, indent=1, default=str))

    def _clean(self, name: str) -> None:
        """An illegal access is for good: every later call would fail, too."""
        gc.collect()
        if torch.cuda.is_available():
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError as error:
                self.lost = f"{name}: {str(error)[:200]}"
