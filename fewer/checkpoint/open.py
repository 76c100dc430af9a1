"""`open_checkpoint`: from a model's name to its `Checkpoint`, by what the files are, not by how they are called."""

from __future__ import annotations

from pathlib import Path

from fewer.checkpoint.checkpoint import Checkpoint
from fewer.checkpoint.names import resolve
from fewer.checkpoint.store import Progress
from fewer.errors import CheckpointError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def open_checkpoint(name: str | Path, progress: Progress | None = None) -> Checkpoint:
    """Open a model; nothing but headers is read. Raises UsageError, CheckpointError, DownloadError."""
    path = resolve(name, progress)
    return _open_folder(path) if path.is_dir() else _open_file(path)


def _open_file(path: Path) -> Checkpoint:
    from fewer.checkpoint.gguf import GGUFCheckpoint

    if path.suffix in PICKLES:
        raise CheckpointError(
            f"{path} is a pickle checkpoint, which can run code when it is loaded: convert it to safetensors or GGUF"
        )
    if path.suffix == ".safetensors":
        raise CheckpointError(
            f"{path} is one tensor file of a model: give its folder, with config.json and the tokenizer"
        )
    return GGUFCheckpoint(path)


def _open_folder(folder: Path) -> Checkpoint:
    from fewer.checkpoint.fewer_folder import DESCRIPTION, FewerCheckpoint

    if (folder / DESCRIPTION).is_file():
        return FewerCheckpoint(folder)
    if not (folder / "config.json").is_file():
        files = sorted(folder.glob("*.gguf"))
        if len(files) == 1:
            return _open_file(files[0])
        found = f"{len(files)} GGUF files: name one of them" if files else "no config.json and no .gguf file"
        raise CheckpointError(f"{folder} holds {found}")
    from fewer.checkpoint.huggingface import HuggingFaceCheckpoint

    return HuggingFaceCheckpoint(folder)
