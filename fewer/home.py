"""The folder in which fewer keeps what it makes and fetches."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """`FEWER_HOME`, or `~/.cache/fewer`."""
    return Path(os.environ.get("FEWER_HOME") or "~/.cache/fewer").expanduser()
