"""Prompt lookup: guess that the text goes on as it did the last time its last few tokens appeared.

Source: prompt-lookup-decoding by Apoorv Saxena (2023); no draft model, no training. Differs from it: an index of
n-grams grows with the text instead of being searched every round; the latest earlier occurrence is taken instead of the
first; and a copy may run into itself, so that periodic text is guessed to the full length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fewer.decoding import tree
from fewer.decoding.sampling import SamplingConfig
from fewer.errors import UsageError
from fewer.registry import method
from fewer.slots import Drafter, DraftTree


@dataclass(frozen=True)
class PromptLookupConfig:
    tokens: int = 10  # guessed tokens a round, at most
    max_ngram: int = 3  # the longest run of last tokens that is looked up; longer ones are tried first
    min_ngram: int = 1  # the shortest

    def __post_init__(self) -> None:
        if not 1 <= self.tokens <= 63:
            raise UsageError(f"prompt-lookup: tokens={self.tokens} is out of range: use 1 to 63")
        if not 1 <= self.min_ngram <= self.max_ngram <= 16:
            raise UsageError(
                f"prompt-lookup: min_ngram={self.min_ngram} and max_ngram={self.max_ngram} are out of range: "
                "use 1 <= min_ngram <= max_ngram <= 16"
            )


@method("prompt-lookup", slot="decoding", lossless=True, config=PromptLookupConfig)
class PromptLookup:
    """The strategy: one n-gram index for each row."""

    lossless = True

    def __init__(self, config: PromptLookupConfig | None = None, context: object = None):
        self.config = config or PromptLookupConfig()

    def drafter(self, sampling: SamplingConfig, row: int) -> Drafter | None:
        return NgramDrafter(self.config)


class NgramDrafter:
    """Copies from the sequence's own past."""

    lossless = True

    def __init__(self, config: PromptLookupConfig):
        self.config = config
        self._forget()

    def _forget(self) -> None:
        self.indexed = 0  # tokens of the context that were looked at
        self.follows: dict[tuple[int, ...], int] = {}  # n-gram -> place of the token after its latest occurrence

    def start(self, prompt: Sequence[int]) -> None:
        self._forget()
        self._index(prompt)

    def _index(self, context: Sequence[int]) -> None:
        """Learn what each new token followed. The n-grams at the very end are not followed by anything yet."""
        shortest, longest = self.config.min_ngram, self.config.max_ngram
        for place in range(self.indexed, len(context)):
            for size in range(shortest, min(longest, place) + 1):
                self.follows[tuple(context[place - size : place])] = place
        self.indexed = len(context)

    def propose(self, context: Sequence[int], limit: int) -> DraftTree:
        self._index(context)
        count, length = min(limit, self.config.tokens), len(context)
        for size in range(min(self.config.max_ngram, length), self.config.min_ngram - 1, -1):
            place = self.follows.get(tuple(context[length - size :]))
            if place is not None:
                guesses: list[int] = []
                for at in range(place, place + count):
                    guesses.append(context[at] if at < length else guesses[at - length])
                return tree.chain(context[-1], guesses)
        return tree.root(context[-1])

    def accept(self, tokens: Sequence[int]) -> None:
        """Nothing to do: the next `propose` brings the whole context."""
