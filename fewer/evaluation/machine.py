"""The machine, the versions and the commit that figures belong to."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch

import fewer


def machine(device: torch.device | None = None) -> dict[str, object]:
    """What a reader needs to judge a figure: processor, cores, threads, GPU, versions, commit."""
    facts: dict[str, object] = {
        "processor": processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fewer": fewer.__version__,
    }
    if device is not None:
        facts["device"] = str(device)
        if device.type == "cuda":
            facts["gpu"] = torch.cuda.get_device_name(device)
            facts["cuda"] = torch.version.cuda
    commit = _commit()
    return facts | ({"commit": commit} if commit else {})


def processor() -> str:
    """The processor's name, as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cores() -> int | None:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _commit() -> str | None:
    """The commit of the source, when it is run from a checkout of its own."""
    root = Path(fewer.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
