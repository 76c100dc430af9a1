"""Compiles the C files of this folder for this very processor, once, and loads the result.

As Triton does with its launchers, the first use calls the system's C compiler (`CC`, or `cc`). That takes a second, and
the library stays in `FEWER_HOME/kernels` under a name made of everything that it depends on. Without a compiler, or
with `FEWER_NATIVE=0`, `library` says why there is none, and PyTorch's own kernels do the work.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from fewer.home import home

FOLDER = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", "-pthread")
TIMEOUT = 120  # seconds


class Unavailable(Exception):
    """Why the C code cannot be used here."""


@functools.cache
def library() -> ctypes.CDLL | Unavailable:
    """The compiled code, or the reason why there is none."""
    try:
        return ctypes.CDLL(str(_compiled()))
    except Unavailable as reason:
        return reason
    except OSError as error:
        return Unavailable(f"the compiled library does not load ({error})")


def _compiled() -> Path:
    if os.environ.get("FEWER_NATIVE") == "0":
        raise Unavailable("FEWER_NATIVE is 0")
    if platform.system() not in ("Linux", "Darwin"):
        raise Unavailable(f"it is not built on {platform.system()}")
    folder = home() / "kernels"
    path = folder / f"decode-{_fingerprint()}.so"
    if path.exists():
        return path
    wanted = os.environ.get("CC") or "cc"
    compiler = shutil.which(wanted)
    if compiler is None:
        raise Unavailable(f"there is no C compiler ({wanted})")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            made = Path(work) / path.name
            command = [compiler, *FLAGS, str(FOLDER / "decode.c"), "-o", str(made), "-lm"]
            outcome = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
            if outcome.returncode:
                raise Unavailable(f"{compiler} failed: {outcome.stderr.strip()[-400:]}")
            os.replace(made, path)  # two processes at once: the same file either way
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"it could not be compiled in {folder} ({error})") from error
    return path


def _fingerprint() -> str:
    """Of the sources, the flags and the processor: a home folder may be shared by unlike machines."""
    digest = hashlib.sha256(repr((FLAGS, platform.machine(), _processor())).encode())
    for source in sorted(FOLDER.glob("*.[ch]")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _processor() -> str:
    """What `-march=native` looks at, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = ("vendor_id", "cpu family", "model\t", "flags", "CPU implementer", "CPU part", "Features")
    return "".join(sorted({line for line in lines if line.startswith(names)}))
