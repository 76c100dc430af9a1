"""Two tiny models on disk, made once, and a command line to run in this process or in another one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fewer.cli.app import app
from tests.tiny_model import write_model

ROOT = Path(__file__).parents[2]
Fewer = Callable[..., Any]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of the tiny model."""
    return str(write_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def fewer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fewer:
    """Run a command line in this process: `fewer("generate", "hello", stdin="")` -> exit_code, stdout, stderr."""
    monkeypatch.setenv("FEWER_HOME", str(tmp_path / "fewer-home"))
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*words: str, stdin: str = "") -> Any:
        result = CliRunner().invoke(app, list(words), input=stdin, prog_name="fewer")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


def start(*words: str, **options: Any) -> subprocess.Popen[str]:
    """`python -m fewer` in a process of its own, with pipes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-m", "fewer", *words],
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        text=True,
        env=environment,
        **options,
    )
