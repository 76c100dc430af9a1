"""A table of what followed each pair of tokens: packed counts of a corpus below, weights of the running text above.

The corpus part is three arrays in the order of the pairs, so a table of hundreds of megabytes costs no Python object;
pairs that the text touches are copied into a dictionary and change there. A table belongs to one vocabulary and says so
in its file.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fewer.errors import CheckpointError, UsageError
from fewer.training.tensor_file import read_tensors, write_tensors

KIND = "fewer.trigrams"
VERSION = 1
SUCCESSORS = 12  # the heaviest that a lookup gives
CAP = 3.0  # the largest weight
DTYPES = {"pairs": torch.int64, "starts": torch.int64, "tokens": torch.int32, "weights": torch.float32}

Successors = Sequence[tuple[int, float]]
"""(token, weight), the heaviest first, the lowest token of equals."""


class Vocabulary(Protocol):
    tokens: Sequence[str]


class Tokenizer(Protocol):
    """What is asked of a tokenizer."""

    vocabulary: Any

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str, special: bool = True, bos: bool | None = None) -> list[int]: ...


def vocabulary_fingerprint(tokenizer: Tokenizer) -> str:
    """A hash of every token's spelling: models of one family share it."""
    digest = hashlib.sha256()
    for token in tokenizer.vocabulary.tokens:
        digest.update(token.encode(errors="surrogatepass") + b"\0")
    return digest.hexdigest()


class TrigramTable:
    """S[(a, b)] = {c: weight}. Weights of a corpus are probabilities; what the text adds makes them scores."""

    def __init__(
        self,
        pairs: NDArray[np.int64] | None = None,
        starts: NDArray[np.int64] | None = None,
        tokens: NDArray[np.int32] | None = None,
        weights: NDArray[np.float32] | None = None,
        vocab_size: int = 2**31,
        vocabulary: str = "",
    ):
        """pairs [n] = a · vocab_size + b, ascending; the successors of pair i are entries starts[i] to starts[i + 1]
        of tokens and weights [m], the heaviest first. `vocabulary` is the fingerprint of whose tokens these are."""
        self.pairs = np.zeros(0, np.int64) if pairs is None else pairs
        self.starts = np.zeros(1, np.int64) if starts is None else starts
        self.tokens = np.zeros(0, np.int32) if tokens is None else tokens
        self.weights = np.zeros(0, np.float32) if weights is None else weights
        self.vocab_size, self.vocabulary = vocab_size, vocabulary
        self.learnt: dict[tuple[int, int], dict[int, float]] = {}  # pairs that differ from the corpus part
        self._sorted: dict[tuple[int, int], Successors] = {}  # lookups since the pair last changed

    def fork(self) -> TrigramTable:
        """A table that starts as this one is now and learns by itself; what was packed is shared."""
        now = self._merged()
        return TrigramTable(now.pairs, now.starts, now.tokens, now.weights, self.vocab_size, self.vocabulary)

    def successors(self, a: int, b: int) -> Successors:
        """The heaviest tokens after a, b; none where the pair is unknown."""
        found = self._sorted.get((a, b))
        if found is None:
            learnt = self.learnt.get((a, b))
            if learnt is None:
                found = self._packed(a, b)
            else:
                found = sorted(learnt.items(), key=lambda entry: (-entry[1], entry[0]))[:SUCCESSORS]
            self._sorted[a, b] = found
        return found

    def weight(self, a: int, b: int, c: int) -> float:
        """S[(a, b)][c], 0 where it is unknown."""
        learnt = self.learnt.get((a, b))
        return dict(self._packed(a, b)).get(c, 0.0) if learnt is None else learnt.get(c, 0.0)

    def reward(self, a: int, b: int, c: int, amount: float) -> None:
        """c followed a, b in the text: its weight grows by `amount`, up to `CAP`."""
        learnt = self.learnt.get((a, b))
        if learnt is None:
            learnt = self.learnt[a, b] = dict(self._packed(a, b))
        learnt[c] = min(CAP, learnt.get(c, 0.0) + amount)
        self._sorted.pop((a, b), None)

    def _packed(self, a: int, b: int) -> Successors:
        place = self._place(a * self.vocab_size + b)
        if place is None:
            return []
        part = slice(int(self.starts[place]), min(int(self.starts[place]) + SUCCESSORS, int(self.starts[place + 1])))
        return list(zip(self.tokens[part].tolist(), self.weights[part].tolist(), strict=True))

    def _place(self, pair: int) -> int | None:
        place = bisect_left(self.pairs, pair)
        return place if place < len(self.pairs) and self.pairs[place] == pair else None

    @property
    def nbytes(self) -> int:
        """Bytes of the corpus part."""
        return self.pairs.nbytes + self.starts.nbytes + self.tokens.nbytes + self.weights.nbytes

    def save(self, path: Path | str) -> None:
        """Write it with all that was learnt; an interrupted call leaves the file as it was. Raises FewerError."""
        merged = self._merged()
        arrays = {name: torch.from_numpy(getattr(merged, name)) for name in DTYPES}
        description = {"version": VERSION, "vocab_size": self.vocab_size, "vocabulary": self.vocabulary}
        write_tensors(Path(path).expanduser(), arrays, KIND, description)

    def _merged(self) -> TrigramTable:
        """The same table with nothing but a packed part."""
        if not self.learnt:
            return self
        size = self.vocab_size
        changed = {a * size + b: successors for (a, b), successors in self.learnt.items()}
        of_entry = np.repeat(self.pairs, np.diff(self.starts))
        kept = ~np.isin(of_entry, np.fromiter(changed, np.int64, len(changed)))
        new = [(pair, token, weight) for pair, found in changed.items() for token, weight in found.items()]
        pairs, tokens, weights = zip(*new, strict=True)
        return _pack(
            np.concatenate((of_entry[kept], np.array(pairs, np.int64))),
            np.concatenate((self.tokens[kept], np.array(tokens, np.int32))),
            np.concatenate((self.weights[kept], np.array(weights, np.float32))),
            size,
            self.vocabulary,
        )


def build_table(tokenizer: Tokenizer, documents: Iterable[str]) -> TrigramTable:
    """Count what follows each pair of tokens; no triple spans two documents. Raises UsageError where none is long
    enough."""
    size = tokenizer.vocab_size
    triples, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for document in documents:
        ids = np.array(tokenizer.encode(document, bos=False), np.int64)
        if len(ids) >= 3:  # a triple is one number: below 2^63 for two million tokens
            new, found = np.unique((ids[:-2] * size + ids[1:-1]) * size + ids[2:], return_counts=True)
            triples, counts = _add(triples, counts, new, found)
    if not len(triples):
        raise UsageError("there is no text of three tokens or more to count: give a longer one")
    pairs = triples // size
    _, first, of_pair = np.unique(pairs, return_index=True, return_inverse=True)
    totals = np.add.reduceat(counts, first)[of_pair]
    weights = (counts / totals).astype(np.float32)
    return _pack(pairs, (triples % size).astype(np.int32), weights, size, vocabulary_fingerprint(tokenizer))


def _add(
    keys: NDArray[np.int64], counts: NDArray[np.int64], new: NDArray[np.int64], found: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    merged, place = np.unique(np.concatenate((keys, new)), return_inverse=True)
    return merged, np.bincount(place, np.concatenate((counts, found))).astype(np.int64)


def _pack(
    pairs: NDArray[np.int64],
    tokens: NDArray[np.int32],
    weights: NDArray[np.float32],
    vocab_size: int,
    vocabulary: str,
) -> TrigramTable:
    """One entry a triple, in any order -> a table."""
    order = np.lexsort((tokens, -weights, pairs))
    pairs, tokens, weights = pairs[order], tokens[order], weights[order]
    unique, first = np.unique(pairs, return_index=True)
    starts = np.append(first, len(pairs)).astype(np.int64)
    return TrigramTable(unique, starts, tokens, weights, vocab_size, vocabulary)


def load_table(path: Path | str, tokenizer: Tokenizer) -> TrigramTable:
    """The table that `save` wrote. Raises CheckpointError where it is damaged or of another vocabulary."""
    path = Path(path).expanduser()
    tensors, description = read_tensors(path, KIND)
    if description.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has trigram version {description.get('version')!r}, this fewer reads {VERSION}: build it again"
        )
    size = tokenizer.vocab_size
    if description.get("vocabulary") != vocabulary_fingerprint(tokenizer) or description.get("vocab_size") != size:
        raise CheckpointError(
            f"the trigram table {path} was built with another tokenizer than this model's: build one with "
            "fewer.decoding.build_table and this model's tokenizer"
        )
    if {name: tensor.dtype for name, tensor in tensors.items()} != DTYPES:
        raise CheckpointError(f"{path} is a damaged trigram table (arrays are missing or wrong): build it again")
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    fault = _fault(**arrays, size=size)
    if fault:
        raise CheckpointError(f"{path} is a damaged trigram table ({fault}): build it again")
    return TrigramTable(**arrays, vocab_size=size, vocabulary=description["vocabulary"])


def _fault(
    pairs: NDArray[np.int64],
    starts: NDArray[np.int64],
    tokens: NDArray[np.int32],
    weights: NDArray[np.float32],
    size: int,
) -> str | None:
    """What is wrong with the arrays of a file."""
    if any(array.ndim != 1 for array in (pairs, starts, tokens, weights)):
        return "an array is no list"
    if len(starts) != len(pairs) + 1 or len(tokens) != len(weights):
        return "its lengths contradict each other"
    if starts[0] != 0 or starts[-1] != len(tokens) or (np.diff(starts) < 1).any():
        return "its successors overlap"
    if len(pairs) and (pairs[0] < 0 or pairs[-1] >= size * size or (np.diff(pairs) <= 0).any()):
        return "its pairs are out of order"
    if len(tokens) and (tokens.min() < 0 or tokens.max() >= size):
        return "a token is not in the vocabulary"
    if not ((weights > 0) & (weights <= CAP)).all():  # not true of what is no number either
        return f"a weight is not between 0 and {CAP:g}"
    return None
