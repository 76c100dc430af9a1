"""One safetensors file with a JSON description in its header: what adapters and training states are stored as.

The file appears under its name only when it is whole, so an interrupted write leaves the one before it. Nothing is ever
pickled, and the header is checked before the safetensors library sees the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fewer.checkpoint.safetensors_header import check_safetensors
from fewer.errors import CheckpointError, FewerError


def write_tensors(path: Path, tensors: Mapping[str, Tensor], kind: str, description: Mapping[str, Any]) -> None:
    """Write atomically: to a file beside it, flushed to the disk, then renamed. Raises FewerError."""
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(stored, temporary, metadata={kind: json.dumps(description, allow_nan=False)})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as fault:
        raise FewerError(f"cannot write {path}: {getattr(fault, 'strerror', None) or fault}") from None
    finally:
        temporary.unlink(missing_ok=True)


def read_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the description of a file that `write_tensors` wrote as `kind`. Raises CheckpointError."""
    check_safetensors(path)
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(kind)
            if text is None:
                raise CheckpointError(
                    f"{path} is a safetensors file, but no {kind}: give a file that fewer wrote as one"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
        description = json.loads(text)
    except (SafetensorError, ValueError, RecursionError) as fault:
        raise CheckpointError(f"{path} is a damaged {kind} ({str(fault)[:100]}): write or fetch it again") from None
    if not isinstance(description, dict):
        raise CheckpointError(
            f"{path} is a damaged {kind} (its description is no JSON object): write or fetch it again"
        )
    return tensors, description
