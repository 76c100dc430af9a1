"""0 done, 1 failed, 2 bad usage, 130 Ctrl-C; a fault is one sentence, and --debug adds the traceback."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tests.cli.conftest import Fewer, start


def test_a_fault_is_one_sentence_and_debug_shows_where_it_rose(fewer: Fewer, tmp_path: Path) -> None:
    words = ("inspect", str(tmp_path / "none.gguf"))
    plain, debug = fewer(*words), fewer(*words, "--debug")
    assert plain.exit_code == debug.exit_code == 1
    assert plain.stdout == "" and plain.stderr.count("\n") == 1 and plain.stderr.startswith("error: ")
    assert "Traceback" not in plain.stderr and "Traceback" in debug.stderr
    assert debug.stderr.endswith(plain.stderr)


def test_a_wrong_request_exits_with_2_and_a_failed_one_with_1(fewer: Fewer, tiny: str, tmp_path: Path) -> None:
    assert fewer("generate", "x", "-m", tiny, "--weights", "int5").exit_code == 2
    assert fewer("generate", "x", "-m", str(tmp_path / "none")).exit_code == 1
    assert fewer("--nope").exit_code == 2
    assert fewer("generate", "x", "-m", tiny, "-n", "1").exit_code == 0


def test_ctrl_c_exits_with_130_and_no_traceback(tiny: str) -> None:
    process = start("chat", "-m", tiny, "-n", "2", "--json")
    assert process.stdin and process.stdout
    process.stdin.write("hello\n")
    process.stdin.flush()
    process.stdout.readline()  # the answer is there, and the chat waits for the next line
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in errors and "Traceback" not in errors


def test_a_reader_that_goes_away_ends_it_quietly(tiny: str) -> None:
    process = start("inspect", tiny, "--tensors", "--json")
    assert process.stdout and process.stderr
    os.close(process.stdout.fileno())
    errors = process.stderr.read()
    assert process.wait(timeout=60) != 0
    assert "Traceback" not in errors
    process.stdout = None
