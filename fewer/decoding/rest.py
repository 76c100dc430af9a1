"""REST: continuations of the longest recent run of tokens, from a text of your own and from the text so far.

Paper: REST: Retrieval-Based Speculative Decoding, arXiv 2311.08252. Differs from it: the text so far is searched, too;
one walk over a sorted list of reversed beginnings finds the longest match instead of one search for each length; and a
continuation in the text so far may run into itself.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fewer.decoding import tree
from fewer.decoding.sampling import SamplingConfig
from fewer.errors import UsageError
from fewer.registry import method
from fewer.slots import Drafter, DraftTree

PLACES = 64  # continuations that are looked at, at most, from either text


@dataclass(frozen=True)
class RestConfig:
    tokens: int = 10  # guessed tokens a round, at most
    text: str | None = None  # a UTF-8 text file to look in; None: the text so far alone
    longest: int = 16  # last tokens that are looked up, at most
    shortest: int = 2  # and at least
    depth: int = 10  # tokens of a continuation

    def __post_init__(self) -> None:
        if not 1 <= self.tokens <= 63:
            raise UsageError(f"rest: tokens={self.tokens} is out of range: use 1 to 63")
        if not 1 <= self.shortest <= self.longest <= 64:
            raise UsageError(
                f"rest: shortest={self.shortest} and longest={self.longest} are out of range: "
                "use 1 <= shortest <= longest <= 64"
            )
        if not 1 <= self.depth <= 63:
            raise UsageError(f"rest: depth={self.depth} is out of range: use 1 to 63")


class Tokenizer(Protocol):
    def encode(self, text: str, special: bool = True, bos: bool | None = None) -> list[int]: ...


class Context(Protocol):
    """What is asked of the target."""

    @property
    def tokenizer(self) -> Tokenizer: ...


class Datastore:
    """A text whose places are sorted by the tokens before them, the nearest first."""

    def __init__(self, tokens: Sequence[int], longest: int):
        self.tokens: NDArray[np.int32] = np.array(tokens, np.int32)
        count = len(self.tokens)
        before = np.full((longest, count), -1, np.int32)  # row k - 1: the token k places before; -1: none
        for back in range(1, min(longest, count) + 1):
            before[back - 1, back:] = self.tokens[: count - back]
        self.places = np.lexsort(before[::-1]) if count else np.zeros(0, np.int64)
        self.longest = longest

    def find(self, context: Sequence[int]) -> tuple[int, Sequence[int]]:
        """(length of the longest match, places behind it), the length 0 where even the last token is new."""
        low, high, length = 0, len(self.places), 0
        while length < min(self.longest, len(context)):
            back, token = length + 1, context[-1 - length]

            def key(place: int, back: int = back) -> int:
                return int(self.tokens[place - back]) if place >= back else -1

            first = bisect_left(self.places, token, low, high, key=key)
            behind = bisect_right(self.places, token, first, high, key=key)
            if first == behind:
                break
            low, high, length = first, behind, back
        step = max(1, (high - low) // PLACES)
        return length, self.places[low:high:step][:PLACES].tolist() if length else []


def read_datastore(path: Path, tokenizer: Tokenizer, longest: int) -> Datastore:
    """Raises UsageError where the file cannot be read or holds no text."""
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except OSError as fault:
        raise UsageError(f"rest: cannot read the text {path}: {fault.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"rest: {path} is no UTF-8 text: give a text file") from None
    tokens = tokenizer.encode(text, bos=False)
    if not tokens:
        raise UsageError(f"rest: {path} is empty: give some text")
    return Datastore(tokens, longest)


@method("rest", slot="decoding", paper="2311.08252", lossless=True, config=RestConfig)
class Rest:
    """The strategy: one datastore for all rows, and each row's own text."""

    lossless = True

    def __init__(self, config: RestConfig | None = None, context: Context | None = None):
        self.config = config or RestConfig()
        self.store: Datastore | None = None
        if self.config.text is not None and context is not None:
            self.store = read_datastore(Path(self.config.text), context.tokenizer, self.config.longest)

    def drafter(self, sampling: SamplingConfig, row: int) -> Drafter | None:
        return SuffixDrafter(self.config, self.store)


class SuffixDrafter:
    """Copies what most often followed the longest match."""

    lossless = True

    def __init__(self, config: RestConfig, store: Datastore | None = None):
        self.config, self.store = config, store
        self.start(())

    def start(self, prompt: Sequence[int]) -> None:
        self.indexed = self.config.shortest  # the first place with enough tokens before it
        self.behind: dict[tuple[int, ...], list[int]] = {}  # the `shortest` tokens before a place -> such places

    def propose(self, context: Sequence[int], limit: int) -> DraftTree:
        shortest = self.config.shortest
        for place in range(self.indexed, len(context)):
            self.behind.setdefault(tuple(context[place - shortest : place]), []).append(place)
        self.indexed = max(self.indexed, len(context))
        length, places = self._find(context)
        found = [self._copy(context, place) for place in places]
        if self.store is not None:
            in_store, there = self.store.find(context)
            if in_store >= shortest and in_store >= length:
                copies = [self.store.tokens[place : place + self.config.depth].tolist() for place in there]
                found = copies if in_store > length else found + copies
        return tree.from_sequences(context[-1], self._most_frequent(found, min(limit, self.config.tokens)))

    def _find(self, context: Sequence[int]) -> tuple[int, list[int]]:
        """(length of the longest match in the text so far, the latest places behind it)."""
        best = 0
        places: list[int] = []
        for place in self.behind.get(tuple(context[-self.config.shortest :]), [])[-PLACES:]:
            length = self.config.shortest
            while length < min(self.config.longest, place) and context[place - 1 - length] == context[-1 - length]:
                length += 1
            if length > best:
                best, places = length, []
            if length == best:
                places.append(place)
        return best, places

    def _copy(self, context: Sequence[int], place: int) -> list[int]:
        copied: list[int] = []
        for at in range(place, place + self.config.depth):
            copied.append(context[at] if at < len(context) else copied[at - len(context)])
        return copied

    def _most_frequent(self, found: Sequence[Sequence[int]], count: int) -> list[tuple[int, ...]]:
        """The beginnings that most continuations share; none without its own beginning, which is no rarer."""
        shared = Counter(tuple(each[:size]) for each in found for size in range(1, len(each) + 1))
        return sorted(shared, key=lambda path: (-shared[path], len(path), path))[:count]

    def accept(self, tokens: Sequence[int]) -> None:
        """Nothing to do: the next `propose` brings the whole context."""
