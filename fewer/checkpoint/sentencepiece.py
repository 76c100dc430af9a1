"""SentencePiece-style BPE: neighbours merge in the order of their pieces' scores, unknown characters become bytes.

Spaces are written ▁. The two neighbours whose union has the highest score merge first, the leftmost on a tie, until
no union is a piece. This is done over the vocabulary itself, without a table of merges: 262,144 pieces (Gemma) would
take a second to turn into one.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

SPACE = "▁"


class SentencePieceModel:
    """Encodes a text that holds no special token. `scores` [len(tokens)], higher merges first.

    `hidden` are the tokens that text never becomes by merging: control tokens, bytes, the unknown one.
    """

    def __init__(self, tokens: Sequence[str], scores: Sequence[float], hidden: frozenset[int], unknown: int | None):
        self._ids = {token: index for index, token in enumerate(tokens)}
        self._bytes = [self._ids.get(f"<0x{byte:02X}>", unknown) for byte in range(256)]
        for index in hidden:
            self._ids.pop(tokens[index], None)
        self._scores = scores
        # Where no piece has a space after another character, no merge crosses the start of a word, and words repeat.
        crossing = any(SPACE in piece.lstrip(SPACE) for piece in self._ids if SPACE in piece)
        self._boundary = None if crossing else re.compile(rf"(?<!{SPACE})(?={SPACE})")
        self._word = lru_cache(maxsize=1 << 16)(self._merge)

    def encode(self, text: str) -> list[int]:
        text = text.replace(" ", SPACE)
        if self._boundary is None:
            return list(self._merge(text))
        return [token for word in self._boundary.split(text) if word for token in self._word(word)]

    def _merge(self, text: str) -> tuple[int, ...]:
        ids, scores = self._ids, self._scores
        symbols: list[str] = list(text)  # "" once merged into its left neighbour
        following = list(range(1, len(symbols) + 1))
        preceding = list(range(-1, len(symbols) - 1))
        heap: list[tuple[float, int, int, str]] = []  # (-score, left, right, union)

        def offer(left: int, right: int) -> None:
            union = symbols[left] + symbols[right]
            index = ids.get(union)
            if index is not None:
                heapq.heappush(heap, (-float(scores[index]), left, right, union))

        for left in range(len(symbols) - 1):
            offer(left, left + 1)
        while heap:
            _, left, right, union = heapq.heappop(heap)
            if not symbols[left] or not symbols[right] or symbols[left] + symbols[right] != union:
                continue  # one of the two has merged with another neighbour since
            symbols[left], symbols[right] = union, ""
            following[left] = after = following[right]
            if after < len(symbols):
                preceding[after] = left
                offer(left, after)
            if preceding[left] >= 0:
                offer(preceding[left], left)
        return tuple(token for symbol in symbols if symbol for token in self._spell(symbol))

    def _spell(self, symbol: str) -> list[int]:
        index = self._ids.get(symbol)
        if index is not None:
            return [index]
        return [token for byte in symbol.encode() if (token := self._bytes[byte]) is not None]


class SpecialTokens:
    """Finds special tokens in a text: at each place the longest one, from left to right."""

    def __init__(self, tokens: Mapping[str, int]) -> None:
        self._tokens = {text: index for text, index in tokens.items() if text}
        self._lengths: dict[str, list[int]] = {}
        for text in self._tokens:
            self._lengths.setdefault(text[0], []).append(len(text))
        for first, lengths in self._lengths.items():
            self._lengths[first] = sorted(set(lengths), reverse=True)
        starts = "".join(re.escape(first) for first in self._lengths)
        self._start = re.compile(f"[{starts}]") if starts else None

    def split(self, text: str) -> list[str | int]:
        """Stretches of ordinary text, and ids of special tokens, in order."""
        if self._start is None:
            return [text]
        parts: list[str | int] = []
        done = at = 0
        while found := self._start.search(text, at):
            at = found.start()
            for length in self._lengths[text[at]]:
                index = self._tokens.get(text[at : at + length])
                if index is not None:
                    if at > done:
                        parts.append(text[done:at])
                    parts.append(index)
                    done = at = at + length
                    break
            else:
                at += 1
        if done < len(text):
            parts.append(text[done:])
        return parts
