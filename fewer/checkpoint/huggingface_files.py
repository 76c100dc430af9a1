"""The tensor files of a Hugging Face folder: one model.safetensors, or shards named by an index.

Opening reads and checks headers only; tensors are mapped, and read when they are asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewer.checkpoint.huggingface_fields import read_json
from fewer.checkpoint.safetensors_header import HeaderEntry, check_safetensors
from fewer.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class TensorFiles:
    """Every tensor of a folder by its stored name. Raises CheckpointError where the files are damaged or missing."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.entries: dict[str, HeaderEntry] = {}
        self.sizes: dict[str, int] = {}  # bytes of each file
        self._file_of: dict[str, str] = {}
        self._open: dict[str, Any] = {}
        index = self._index()
        for file in sorted(set(index.values())) if index is not None else [self._single()]:
            for name, entry in check_safetensors(folder / file).items():
                if index is None or index.get(name) == file:
                    self.entries[name], self._file_of[name] = entry, file
            self.sizes[file] = (folder / file).stat().st_size
        for name, file in (index or {}).items():
            if name not in self.entries:
                raise CheckpointError(
                    f"'{folder / INDEX}' places the tensor {name[:100]!r} in '{file}', which does not hold it: "
                    "download both again"
                )

    def tensor(self, name: str) -> Tensor:
        """The whole tensor, mapped onto its file."""
        file = self._file_of[name]
        try:
            if file not in self._open:
                self._open[file] = safe_open(self.folder / file, framework="pt")
            mapped: Tensor = self._open[file].get_tensor(name)
        except (SafetensorError, OSError) as fault:
            raise CheckpointError(f"cannot read '{name}' in '{self.folder / file}' ({fault}): download it") from None
        return mapped

    def _single(self) -> str:
        if (self.folder / SINGLE).is_file():
            return SINGLE
        files = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if len(files) == 1:
            return files[0]
        if files:
            raise CheckpointError(
                f"'{self.folder}' holds {len(files)} .safetensors files but no {INDEX}: download it from the same place"
            )
        pickles = sorted(path.name for pattern in PICKLES for path in self.folder.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"'{self.folder}' holds its weights as pickle ('{pickles[0]}'), which can run code when it is loaded: "
                "convert it to safetensors or GGUF"
            )
        raise CheckpointError(f"'{self.folder}' holds a config.json but no .safetensors file: download the weights too")

    def _index(self) -> dict[str, str] | None:
        """Stored name -> file, or None where there is no index to heed."""
        path = self.folder / INDEX
        if (self.folder / SINGLE).is_file() or not path.is_file():
            return None
        places = read_json(path).get("weight_map")
        if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
            raise CheckpointError(f"'{path}' has no 'weight_map' from tensors to files: download it again")
        for file in sorted(set(places.values())):
            if file != Path(file).name or "\\" in file or not file.endswith(".safetensors"):
                raise CheckpointError(
                    f"'{path}' names the file {file[:100]!r}: allowed are .safetensors files of the same folder"
                )
            if not (self.folder / file).is_file():
                raise CheckpointError(f"'{self.folder}' lacks the file '{file}' of its index: download it")
        return places
