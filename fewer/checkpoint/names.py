"""What a model's name means: a path, an alias, or a repository of the Hugging Face hub.

In this order, so that a file on this machine always wins: an existing path; an alias of `aliases.py`; something that
looks like a path (it has a suffix, starts with a dot, a slash or a tilde) and therefore is missing; a hub id.
"""

from __future__ import annotations

import re
from pathlib import Path

from fewer.checkpoint import hub, wheels
from fewer.checkpoint.aliases import ALIASES
from fewer.checkpoint.store import Progress
from fewer.errors import CheckpointError, UsageError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def resolve(name: str | Path, progress: Progress | None = None) -> Path:
    """The file or folder of a model, downloaded where needed. Raises UsageError, CheckpointError, DownloadError."""
    text = str(name)
    if not text.strip():
        raise UsageError(f"the model's name is empty: give a path, a hub id or one of {', '.join(ALIASES)}")
    path = Path(text).expanduser()
    if path.exists():
        return path
    if isinstance(name, Path) or text.startswith((".", "/", "~")) or path.suffix in (".gguf", ".safetensors"):
        raise CheckpointError(f"{path} does not exist: check the path, or use one of {', '.join(ALIASES)}")
    if text in ALIASES:
        return wheels.install(ALIASES[text], progress)
    if HUB_ID.fullmatch(text):
        return hub.download(text, progress)
    raise CheckpointError(
        f"'{text}' is no file, no folder and no known model: give a path, a hub id as in 'Qwen/Qwen2.5-0.5B-Instruct', "
        f"or one of {', '.join(ALIASES)}"
    )
