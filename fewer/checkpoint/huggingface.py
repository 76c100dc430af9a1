"""Folders in Hugging Face layout as checkpoints: config.json, *.safetensors, and the tokenizer's files.

Tensors are mapped. A dense matrix that needs no change stays a view of its file; rows of q and k are permuted to
interleaved rotary pairs, and Gemma's norms get their +1.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fewer.checkpoint.checkpoint import Checkpoint, StoredTensor, fingerprint_of
from fewer.checkpoint.huggingface_config import read_config
from fewer.checkpoint.huggingface_fields import Fields, read_json
from fewer.checkpoint.huggingface_files import TensorFiles
from fewer.checkpoint.huggingface_names import Source, sources
from fewer.checkpoint.safetensors_header import DTYPE_BITS
from fewer.errors import CheckpointError
from fewer.model.rope import interleave_rows

if TYPE_CHECKING:
    from fewer.checkpoint.tokenizer import Tokenizer


class HuggingFaceTensor(StoredTensor):
    """A run of rows of one stored tensor, in canonical order."""

    def __init__(self, name: str, files: TensorFiles, source: Source, rotary_dim: int):
        self.name, self.shape = name, source.shape
        self._files, self._source, self._rotary_dim = files, source, rotary_dim
        self.kind = files.entries[source.tensor].dtype

    @property
    def nbytes(self) -> int:
        return self.elements * DTYPE_BITS[self.kind] // 8

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        source = self._source
        stored = self._files.tensor(source.tensor)
        if source.expert is not None:
            stored = stored[source.expert]
        rows = stored[source.first_row : source.first_row + self.shape[0]]
        if source.plus_one:
            rows = rows.float() + 1
        if source.paired_heads:
            rows = interleave_rows(rows, source.paired_heads, self._rotary_dim)
        return rows.to(dtype)


class HuggingFaceCheckpoint(Checkpoint):
    """A folder with config.json. Raises CheckpointError where config and tensors are damaged or disagree."""

    kind = "huggingface"

    def __init__(self, folder: Path):
        self.path = folder
        self.metadata = read_json(folder / "config.json")
        self.config = read_config(Fields(folder / "config.json", self.metadata))
        self.files = TensorFiles(folder)
        self._sources = sources(folder, self.files.entries, self.config)

    def names(self) -> list[str]:
        return list(self._sources)

    def __contains__(self, name: object) -> bool:
        return name in self._sources

    def __getitem__(self, name: str) -> HuggingFaceTensor:
        if name not in self._sources:
            raise CheckpointError(f"'{self.path}' has no tensor '{name}': `fewer inspect` lists those it has")
        rotary_dim = self.config.rotary_dim or self.config.head_dim
        return HuggingFaceTensor(name, self.files, self._sources[name], rotary_dim)

    def tokenizer(self) -> Tokenizer:

        from fewer.checkpoint.tokenizer_folder import read_tokenizer  # with the `tokenizers` library

        return read_tokenizer(self.path)

    def fingerprint(self) -> str:
        files = [f"{name} {size}" for name, size in self.files.sizes.items()]
        entries = [f"{name} {entry}" for name, entry in self.files.entries.items()]
        return fingerprint_of(self.kind, (self.path / "config.json").read_bytes(), *files, *sorted(entries))
