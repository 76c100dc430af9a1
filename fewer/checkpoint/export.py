"""Write a model in its present formats as a folder that loads back bit for bit (see `fewer_folder.py`).

The folder appears under its name only when it is whole: it is written beside it and renamed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fewer.checkpoint.fewer_folder import DESCRIPTION, TENSORS, VERSION, config_to_json
from fewer.checkpoint.tokenizer import Tokenizer
from fewer.errors import FewerError, UsageError
from fewer.formats import WeightFormat
from fewer.model.config import ModelConfig


def write_folder(
    folder: Path,
    config: ModelConfig,
    matrices: Iterable[tuple[str, WeightFormat]],
    vectors: Iterable[tuple[str, Tensor]],
    tokenizer: Tokenizer,
    provenance: Mapping[str, Any],
) -> int:
    """Write the folder; returns its bytes. Raises UsageError when it exists, FewerError when the disk is full."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is not empty: choose another output folder, or remove it first")
    tensors: dict[str, Tensor] = {}
    formats: dict[str, str] = {}
    shapes: dict[str, list[int]] = {}
    for name, stored in matrices:
        formats[name], shapes[name] = stored.name, list(stored.shape)
        for field, value in stored.state_dict().items():
            tensors[f"{name}/{field}"] = value.cpu().contiguous()
    for name, vector in vectors:
        formats[name], shapes[name] = "vector", list(vector.shape)
        tensors[name] = vector.cpu().contiguous()
    description = {
        "version": VERSION,
        "config": config_to_json(config),
        "formats": formats,
        "shapes": shapes,
        **provenance,
    }
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        temporary.mkdir(parents=True)
        _check_space(temporary, sum(tensor.nbytes for tensor in tensors.values()))
        save_file(tensors, temporary / TENSORS)
        tokenizer.save(temporary)
        (temporary / DESCRIPTION).write_text(json.dumps(description, indent=1))
        shutil.copymode(temporary / DESCRIPTION, temporary / TENSORS)  # the library makes files for their owner alone
        if folder.exists():
            folder.rmdir()  # empty, checked above
        temporary.rename(folder)
    except (OSError, SafetensorError) as fault:  # the library wraps what the system says of a full disk
        raise FewerError(f"cannot write {folder}: {getattr(fault, 'strerror', None) or fault}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return sum(path.stat().st_size for path in folder.iterdir())


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise FewerError(f"no disk space for {folder.parent}: {needed / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free")
