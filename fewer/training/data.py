"""Token blocks in a seeded order: batch number n is a function of the seed and n alone, so resuming needs no state."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fewer.checkpoint.tokenizer import Tokenizer
from fewer.engine.session import Session
from fewer.errors import UsageError


class TokenBlocks:
    """Blocks of tokens [n, T], given out in batches [B, T]; each epoch has its own order."""

    def __init__(self, blocks: Tensor, batch_size: int, seed: int = 0):
        if blocks.dim() != 2 or not blocks.numel():
            raise UsageError(f"token blocks have the shape {tuple(blocks.shape)}: give [blocks, tokens], not empty")
        if batch_size < 1:
            raise UsageError(f"a batch of {batch_size} blocks is not possible: use 1 or more")
        self.blocks = blocks
        self.batch_size, self.seed = batch_size, seed
        digest = hashlib.sha256(f"{tuple(blocks.shape)} {batch_size} {seed} ".encode())
        digest.update(blocks.to(torch.int64).cpu().contiguous().numpy().tobytes())
        self.fingerprint = digest.hexdigest()
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    @classmethod
    def from_tokens(cls, tokens: Sequence[int] | Tensor, block: int, batch_size: int, seed: int = 0) -> TokenBlocks:
        """Cut a text into blocks that do not overlap; what is left at the end is dropped."""
        flat = torch.as_tensor(tokens, dtype=torch.int64)
        if block < 2 or len(flat) < block:
            raise UsageError(
                f"{len(flat)} tokens do not fill one block of {block}: give more text or use shorter blocks"
            )
        count = len(flat) // block
        return cls(flat[: count * block].view(count, block), batch_size, seed)

    @classmethod
    def from_texts(
        cls, texts: Iterable[str], tokenizer: Tokenizer, block: int, batch_size: int, seed: int = 0
    ) -> TokenBlocks:
        """Documents one after the other, each closed by an end token where the vocabulary has one."""
        end = sorted(tokenizer.eos_tokens)[:1]
        tokens = [token for text in texts for token in (*tokenizer.encode(text), *end)]
        return cls.from_tokens(tokens, block, batch_size, seed)

    def __len__(self) -> int:
        return len(self.blocks)

    def batch(self, index: int) -> Tensor:
        """Batch number `index` of an endless sequence: [B, T]. An epoch may end in the middle of a batch."""
        first = index * self.batch_size
        return torch.stack([self._block(first + offset) for offset in range(self.batch_size)])

    def _block(self, position: int) -> Tensor:
        epoch, place = divmod(position, len(self.blocks))
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
            self._order = epoch, torch.randperm(len(self.blocks), generator=generator)
        return self.blocks[self._order[1][place]]


class Batches(Protocol):
    """What a trainer reads: anything that answers with the same batch for the same number."""

    fingerprint: str

    def batch(self, index: int) -> Any: ...


def sample_tokens(
    session: Session, prompts: Sequence[Sequence[int]], length: int, seed: int = 0, temperature: float = 1.0
) -> Tensor:
    """Text of the model's own to fit on: each prompt continued to `length` tokens -> [B, length], the prompt included.

    `session` has one empty row a prompt. Rows go on past the end of a text, as blocks of a longer text do.
    """
    longest = max(len(prompt) for prompt in prompts)
    if longest >= length:
        raise UsageError(f"a prompt has {longest} tokens, which leaves nothing to sample in {length}: ask for more")
    if temperature <= 0:
        raise UsageError(f"a sampling temperature of {temperature} is not allowed: use a number above 0")
    generator = torch.Generator().manual_seed(seed)
    rows = [list(prompt) for prompt in prompts]
    logits = session.prefill(rows)
    while True:
        chosen = torch.multinomial((logits.cpu() / temperature).softmax(-1), 1, generator=generator)[:, 0].tolist()
        for row, token in zip(rows, chosen, strict=True):
            row.append(token)
        if min(map(len, rows)) >= length:
            return torch.tensor([row[:length] for row in rows])
        logits = session.decode([row[-1] for row in rows])
