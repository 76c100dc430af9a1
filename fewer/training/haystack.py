"""The haystack: long, dull, varied text in which a passkey is hidden, cut to exact counts of tokens.

The built-in text is made of sentences of our own from seeded templates. It names no number and no word of the radio
alphabet, so that nothing in it looks like a passkey.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence

from fewer.checkpoint.tokenizer import Tokenizer
from fewer.errors import UsageError

SENTENCES = 12_000  # of the built-in text: about 150,000 tokens before it repeats
SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][”\")]))(?=\s)")
LONGEST_PIECE = 64  # tokens: a text without full stops is cut there, so that every depth can be reached

PEOPLE = (
    "the baker", "a retired surveyor", "the librarian", "her eldest cousin", "the ferry pilot", "a young botanist",
    "the clockmaker", "my neighbour", "the night porter", "an apprentice mason", "the schoolteacher", "a beekeeper",
    "the innkeeper", "their accountant", "a travelling piano tuner", "the gardener", "the postmistress", "a glazier",
    "the harbour clerk", "an old cartographer", "the weaver", "a patient nurse", "the shepherd", "a visiting chemist",
)  # fmt: skip
PLACES = (
    "the market square", "the old mill", "the reading room", "the upper orchard", "the railway bridge", "the tea house",
    "the quarry", "the botanical garden", "the boat shed", "the observatory", "the north stairwell", "the salt marsh",
    "the printing shop", "the village hall", "the greenhouse", "the customs office", "the lower meadow", "the cellar",
    "the covered arcade", "the chapel yard", "the fishing pier", "the workshop", "the canal lock", "the attic",
)  # fmt: skip
THINGS = (
    "a crate of pears", "the brass barometer", "an unfinished letter", "the blue ledger", "a coil of rope",
    "the cracked teapot", "a map of the valley", "the copper kettle", "a basket of wool", "the spare lantern",
    "a jar of plum jam", "the wooden ladder", "an embroidered cushion", "the garden shears", "a sack of barley",
    "the violin case", "a stack of postcards", "the rusty hinge", "a bundle of reeds", "the painted sign",
)  # fmt: skip
ACTIONS = (
    "repaired", "carried away", "described", "measured", "sketched", "polished", "misplaced", "weighed", "lent out",
    "wrapped", "looked for", "traded", "cleaned", "put back", "admired", "sorted", "left behind",
)  # fmt: skip
TIMES = (
    "before breakfast", "late in the afternoon", "on the longest day of summer", "after the first frost",
    "while the kettle boiled", "towards evening", "during the harvest", "between two showers", "at the end of the week",
    "when the shutters were closed", "in early spring", "as the fog lifted", "without any hurry", "once the wind fell",
)  # fmt: skip
QUALITIES = (
    "quiet", "draughty", "well lit", "crowded", "damp", "tidy", "half empty", "pleasantly warm", "dusty", "bright",
    "cooler than expected", "smaller than it looked", "older than the street", "open to everyone", "easy to overlook",
)  # fmt: skip
REASONS = (
    "because the roof had begun to leak", "since nobody else had asked for it", "so that the floor could dry",
    "although it was hardly worth the trouble", "as had been agreed in spring", "to make room for the new shelves",
    "even though the path was muddy", "because it reminded everyone of home", "while others talked of the weather",
    "since the key fitted neither door", "so that the children could see it", "which surprised nobody",
)  # fmt: skip
WEATHER = (
    "a light rain", "a thin mist", "a dry wind from the hills", "the smell of cut grass", "a slow, heavy heat",
    "the first snow", "a pale sunlight", "the sound of distant bells", "a sudden gust", "the shade of the plane trees",
)  # fmt: skip
TEMPLATES = (
    "{time}, {person} {action} {thing} near {place}.",
    "{person} {action} {thing} {reason}.",
    "{place} was {quality}, and {person} {action} {thing} there {time}.",
    "{weather} hung over {place}, so {person} {action} {thing} indoors.",
    "Nobody in {place} remembered that {person} had ever {action} {thing}.",
    "{person} said that {place} had been {quality} {time}.",
    "It was {person} who {action} {thing}, {reason}.",
    "{time}, {weather} reached {place}, and {person} went home.",
    "Between {place} and {other}, {person} {action} {thing}.",
    "If {place} seemed {quality}, {other} was not much different.",
    "{person} and {companion} met at {place} {time} and talked about {thing}.",
    "{thing} stood in {place} for a long time, {reason}.",
    "“{place} is {quality},” {person} wrote, “and {other} is worse.”",
    "Whoever walked from {place} to {other} {time} would have seen {thing}.",
)


def filler(seed: int = 0, sentences: int = SENTENCES) -> str:
    """The built-in text: `sentences` sentences in paragraphs of four to eight, the same for the same seed."""
    return "".join(_sentences(random.Random(seed), sentences)).strip()


def _sentences(generator: random.Random, count: int) -> Iterator[str]:
    left = 0  # sentences until the next paragraph
    for _ in range(count):
        if not left:
            left, space = generator.randint(4, 8), "\n\n"
        else:
            space = " "
        left -= 1
        yield space + _sentence(generator)


def _sentence(generator: random.Random) -> str:
    person, companion = generator.sample(PEOPLE, 2)
    place, other = generator.sample(PLACES, 2)
    text = generator.choice(TEMPLATES).format(
        person=person,
        companion=companion,
        place=place,
        other=other,
        thing=generator.choice(THINGS),
        action=generator.choice(ACTIONS),
        time=generator.choice(TIMES),
        quality=generator.choice(QUALITIES),
        reason=generator.choice(REASONS),
        weather=generator.choice(WEATHER),
    )
    first = 1 if text.startswith("“") else 0
    return text[:first] + text[first].upper() + text[first + 1 :]


class Haystack:
    """A text as pieces of tokens that end where a sentence does; it starts again from the front when it runs out."""

    def __init__(self, text: str, tokenizer: Tokenizer):
        """Raises UsageError for a text without words."""
        if not text.strip():
            raise UsageError("the haystack holds no text: give some, or none for the built-in one")
        self.tokenizer = tokenizer
        self._texts = [piece for piece in SENTENCE_END.split(text.strip()) if piece]
        self._tokens: dict[int, list[int]] = {}  # encoded when first asked for

    def __len__(self) -> int:
        """Sentences of the text."""
        return len(self._texts)

    def pieces(self, count: int, start: int = 0) -> list[list[int]]:
        """Pieces of `count` tokens in all, from sentence number `start` on; the last one is cut to fit."""
        found: list[list[int]] = []
        left, sentence = count, start
        while left > 0:
            tokens = self._encode(sentence % len(self))[:left]
            found += [tokens[begin : begin + LONGEST_PIECE] for begin in range(0, len(tokens), LONGEST_PIECE)]
            left, sentence = left - len(tokens), sentence + 1
        return found

    def hide(self, needles: Sequence[tuple[float, Sequence[int]]], count: int, start: int = 0) -> list[int]:
        """`count` tokens of the text, with each needle between two of its sentences: at 0 before the first, at 1 behind
        the last, else where the share of text before it is nearest to the needle's depth -> count + needles' tokens."""
        pieces = self.pieces(count, start)
        ends = [0]  # tokens before each boundary
        for piece in pieces:
            ends.append(ends[-1] + len(piece))
        waiting: dict[int, list[int]] = {}
        for depth, needle in sorted(needles, key=lambda each: each[0]):
            boundary = min(range(len(ends)), key=lambda place: abs(ends[place] - depth * count))
            waiting.setdefault(boundary, []).extend(needle)
        tokens = list(waiting.get(0, ()))
        for boundary, piece in enumerate(pieces, start=1):
            tokens += piece
            tokens += waiting.get(boundary, ())
        return tokens

    def _encode(self, sentence: int) -> list[int]:
        if sentence not in self._tokens:
            self._tokens[sentence] = self.tokenizer.encode(self._texts[sentence], bos=False)
        return self._tokens[sentence]
