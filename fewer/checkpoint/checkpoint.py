"""The seam of every checkpoint layout: a `ModelConfig`, and stored tensors under canonical names.

Whatever wrote the file (Hugging Face folder, GGUF, our own folder), the network sees one set of names, matrices
[out, in], interleaved rotary rows and Gemma norms with their +1 added. Nothing is read before it is asked for.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from fewer.formats.base import WeightFormat
from fewer.model.config import ModelConfig

if TYPE_CHECKING:
    from fewer.checkpoint.tokenizer import Tokenizer


class StoredTensor(ABC):
    """One tensor as a checkpoint holds it: described without being read, decoded on request."""

    name: str  # canonical, such as layers.3.attention.q.weight
    shape: tuple[int, ...]
    kind: str  # how it is stored: "F32", "BF16", "Q4_1", "INT4", …

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes as stored in the file."""

    @abstractmethod
    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The decoded values [shape]: a fresh tensor, or one mapped onto the file (never write to it)."""

    def format(self) -> WeightFormat | None:
        """The matrix as one of the engine's own formats without a dense copy, or None where there is no such path."""
        return None

    @property
    def elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / max(self.elements, 1)


class Checkpoint(ABC):
    """A model on disk. Raises `CheckpointError` where the files are damaged or contradict themselves."""

    kind: ClassVar[Literal["gguf", "huggingface", "fewer"]]
    path: Path
    config: ModelConfig
    metadata: Mapping[str, object]

    @abstractmethod
    def names(self) -> list[str]:
        """Canonical names, in the order of the network."""

    @abstractmethod
    def __contains__(self, name: object) -> bool: ...

    @abstractmethod
    def __getitem__(self, name: str) -> StoredTensor:
        """The tensor of that canonical name; a missing one raises `CheckpointError`."""

    @abstractmethod
    def tokenizer(self) -> Tokenizer: ...

    @abstractmethod
    def fingerprint(self) -> str:
        """A stable SHA-256 of the headers and sizes: the same for equal files, without reading all of them."""


def fingerprint_of(*parts: bytes | str | int) -> str:
    """SHA-256 of the parts, each with its length, so that no two lists of parts run together."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()
