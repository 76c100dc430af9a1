"""GGUF files as checkpoints: config, canonical tensors and tokenizer of one memory-mapped file.

Matrices that hold 4- or 8-bit blocks go straight into the engine's formats (`format()`); everything else is decoded
(`dense()`). Rows are sliced and permuted as stored bytes, since blocks never cross a row.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fewer.checkpoint.checkpoint import Checkpoint, StoredTensor, fingerprint_of
from fewer.checkpoint.gguf_blocks import BLOCKS, dequantize, direct_format
from fewer.checkpoint.gguf_config import FILE_TYPES, read_config
from fewer.checkpoint.gguf_names import Source, sources
from fewer.checkpoint.gguf_reader import GGUFFile
from fewer.errors import CheckpointError
from fewer.formats.base import WeightFormat
from fewer.model.config import ModelConfig
from fewer.model.rope import interleave_rows

if TYPE_CHECKING:
    from fewer.checkpoint.tokenizer import Tokenizer


class GGUFTensor(StoredTensor):
    """A run of rows of one stored tensor, in canonical order."""

    def __init__(self, name: str, file: GGUFFile, source: Source, rotary_dim: int):
        self.name, self.shape = name, source.shape
        self._file, self._source, self._rotary_dim = file, source, rotary_dim
        self._entry = file.tensors[source.tensor]
        self.kind = self._entry.kind

    @property
    def nbytes(self) -> int:
        block = BLOCKS[self.kind]
        return self.elements // block.columns * block.nbytes

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        if len(self.shape) == 1:
            whole = dequantize(self.kind, self._file.bytes_of(self._entry)[None], dtype)[0]
            return self._paired(whole[self._source.first_row :][: self.shape[0]])
        values = dequantize(self.kind, self._raw(), dtype).view(self.shape)
        self._release()
        return values

    def format(self) -> WeightFormat | None:
        if len(self.shape) != 2:
            return None
        stored = direct_format(self.kind, self._raw())
        self._release()
        return stored

    def _raw(self) -> Tensor:
        """uint8 [N, bytes a row]: a view of the file, or a copy where rows change places."""
        rows, block = self.shape[0], BLOCKS[self.kind]
        row_bytes = self.shape[-1] // block.columns * block.nbytes
        stored = self._file.bytes_of(self._entry).view(-1, row_bytes)
        return self._paired(stored[self._source.first_row : self._source.first_row + rows])

    def _paired(self, rows: Tensor) -> Tensor:
        heads = self._source.paired_heads
        return interleave_rows(rows, heads, self._rotary_dim) if heads else rows

    def _release(self) -> None:
        start = self._entry.offset + self._source.first_row * self.nbytes // self.shape[0]
        self._file.release(start, start + self.nbytes)


class GGUFCheckpoint(Checkpoint):
    """One .gguf file. `file_type` is its general.file_type as people write it, such as "Q4_K_M"."""

    kind = "gguf"

    def __init__(self, path: Path | str):
        self.file = GGUFFile(path)
        self.path = self.file.path
        self.metadata = self.file.metadata
        self.config: ModelConfig = read_config(self.file)
        self._sources = sources(self.file, self.config)

    @property
    def file_type(self) -> str | None:
        number = self.metadata.get("general.file_type")
        return None if number is None else FILE_TYPES.get(number, f"type {number}") if isinstance(number, int) else None

    def names(self) -> list[str]:
        return list(self._sources)

    def __contains__(self, name: object) -> bool:
        return name in self._sources

    def __getitem__(self, name: str) -> GGUFTensor:
        if name not in self._sources:
            raise CheckpointError(f"'{self.path}' has no tensor '{name}': `fewer inspect` lists those it has")
        return GGUFTensor(name, self.file, self._sources[name], self.config.rotary_dim or self.config.head_dim)

    def tokenizer(self) -> Tokenizer:

        from fewer.checkpoint.tokenizer_gguf import read_tokenizer  # with the `tokenizers` library

        return read_tokenizer(self.metadata)

    def fingerprint(self) -> str:
        return fingerprint_of(self.kind, self.file.header_bytes(), self.file.size)
