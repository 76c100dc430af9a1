"""Passkeys: random words hidden in a long text and asked for at its end, to score a model with and to fit one on.

The contexts with many passkeys are the training data of DuoAttention, arXiv 2410.10819: announced by ordinals at sorted
depths, asked for in order, and labelled at the end of the text. Differs from its code: all sentences are our own,
needles stand between sentences, lengths are counted in tokens with everything included.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor

from fewer.checkpoint.tokenizer import Tokenizer
from fewer.errors import UsageError
from fewer.training.haystack import Haystack

Kind = Literal["passkey", "needle"]
KINDS: tuple[Kind, ...] = ("passkey", "needle")

NATO = (
    "alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliett", "kilo", "lima",
    "mike", "november", "oscar", "papa", "quebec", "romeo", "sierra", "tango", "uniform", "victor", "whiskey", "xray",
    "yankee", "zulu",
)  # fmt: skip
ORDINALS = (
    "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh",
    "twelfth", "thirteenth", "fourteenth", "fifteenth", "sixteenth",
)  # fmt: skip
DEPTHS = 1000  # places, evenly spaced from 0.05 to 0.95, that passkeys of one context are drawn from

PREFACE = "Here is a long story. Something in it is out of place: remember it, you will be asked about it.\n\n"
CLOSING = "\n\nThat was the end of the story."

# What is out of place in a haystack of the kind "needle": one plain fact, asked for in its own words.
SUBJECTS = ("Captain Orlow", "Doctor Miravel", "Aunt Pernilla", "Professor Tarn", "Inspector Quill", "Madame Ostrova")
FACTS = (
    ("{who} keeps the spare key of the lighthouse in", "Where does {who} keep the spare key of the lighthouse?"),
    ("The favourite supper of {who} is", "What is the favourite supper of {who}?"),
    ("The secret ingredient in the soup of {who} is", "What is the secret ingredient in the soup of {who}?"),
)
ANSWERS = (
    (
        "a green sugar bowl", "the left boot of a diver", "an empty cuckoo clock", "a tin of peppermints",
        "the drawer of a sewing machine", "a hollow encyclopedia", "the pocket of a yellow raincoat", "a glass shoe",
    ),
    (
        "pickled herring with waffles", "cold noodles and honey", "a single baked onion", "toasted rye with figs",
        "pumpkin dumplings in broth", "fried bananas and rice", "smoked trout on crackers", "turnip pie",
    ),
    (
        "a spoon of black tea", "crushed juniper berries", "the rind of a lemon", "a square of dark chocolate",
        "roasted chestnut flour", "a drop of rose water", "dried seaweed", "burnt sugar",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    """One hidden sentence, the words that ask for it, and what must follow them."""

    needle: str
    cue: str  # ends where the answer begins, without a space
    answer: str


@dataclass(frozen=True)
class HiddenAnswer:
    """A prompt that ends where its answer begins, as tokens."""

    prompt: list[int]
    answer: list[int]
    text: str  # the answer in words


def passkey(generator: random.Random, words: int) -> str:
    """Random words of the radio alphabet."""
    return " ".join(generator.choices(NATO, k=words))


def question(kind: Kind, generator: random.Random, words: int) -> Question:
    """A passkey of `words` words, or a fact."""
    if kind == "passkey":
        answer, said = passkey(generator, words), "The passkey to the vault is"
        return Question(f"\n\n{said} {answer}.\n\n", f"\n\nWhat is the passkey to the vault? {said}", answer)
    chosen, who = generator.randrange(len(FACTS)), generator.choice(SUBJECTS)
    said, asked = (text.format(who=who) for text in FACTS[chosen])
    answer = generator.choice(ANSWERS[chosen])
    return Question(f"\n\n{said} {answer}.\n\n", f"\n\n{asked} {said}", answer)


def hidden_answer(haystack: Haystack, asked: Question, depth: float, length: int, start: int = 0) -> HiddenAnswer:
    """A prompt with its answer: `length` tokens together, BOS included where the model wants one.

    `depth` is the share of the text before the needle, `start` the haystack's first sentence. Raises UsageError for a
    length that leaves no room for any text.
    """
    tokenizer = haystack.tokenizer
    needle = tokenizer.encode(asked.needle, bos=False)
    cue, answer = _split(tokenizer, CLOSING + asked.cue, f" {asked.answer}")
    opening = tokenizer.encode(PREFACE)
    needed = len(opening) + len(needle) + len(cue) + len(answer)
    if length <= needed:
        raise UsageError(
            f"a length of {length} tokens leaves no room for text: the hidden sentence, its question and its answer "
            f"take {needed}"
        )
    return HiddenAnswer(opening + haystack.hide([(depth, needle)], length - needed, start) + cue, answer, asked.answer)


def _split(tokenizer: Tokenizer, head: str, tail: str) -> tuple[list[int], list[int]]:
    """Tokens of `head + tail`, cut where `tail` begins: a token that reaches across the cut belongs to the tail."""
    whole, front = tokenizer.encode(head + tail, bos=False), tokenizer.encode(head, bos=False)
    same = 0
    while same < min(len(whole), len(front)) and whole[same] == front[same]:
        same += 1
    return whole[:same], whole[same:]


@dataclass(frozen=True)
class PasskeyConfig:
    passkeys: int = 10  # hidden in one context
    words: int = 32  # of each passkey
    shortest: int = 1000  # tokens of a context
    longest: int = 32_000
    lengths: int = 50  # evenly spaced from the shortest to the longest; one context of each makes an epoch
    multiple: int = 16  # lengths are rounded down to a multiple of this
    labels: Literal["tail", "answers"] = "tail"  # all questions and answers (DuoAttention's code), or answers alone

    def __post_init__(self) -> None:
        if not 1 <= self.passkeys <= len(ORDINALS):
            raise UsageError(f"passkeys={self.passkeys} is out of range: use 1 to {len(ORDINALS)}")
        for name in ("words", "lengths", "multiple"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} is not allowed: use 1 or more")
        if not self.multiple <= self.shortest <= self.longest:
            raise UsageError(
                f"contexts of {self.shortest} to {self.longest} tokens make no sense: start from {self.multiple} and "
                "end no lower"
            )


@dataclass(frozen=True)
class PasskeyBatch:
    """One context. `labels` marks the tokens that the loss looks at."""

    tokens: Tensor  # [1, T] int64
    labels: Tensor  # [1, T] bool


class PasskeyBatches:
    """Contexts for a `Trainer`: batch n has fresh passkeys and depends on the seed and n alone.

    An epoch has one context of each length, in an order of its own. Raises UsageError where the shortest context has no
    room for its passkeys.
    """

    def __init__(self, haystack: Haystack, config: PasskeyConfig, seed: int = 0):
        self.haystack, self.config, self.seed = haystack, config, seed
        lengths = torch.linspace(config.shortest, config.longest, config.lengths).long()
        self.lengths = [int(length) // config.multiple * config.multiple for length in lengths]
        self.batch(0, self.lengths[0])
        probe = haystack.pieces(min(4096, config.longest))
        self.fingerprint = hashlib.sha256(f"{sorted(asdict(config).items())} {seed} {probe}".encode()).hexdigest()

    def batch(self, index: int, length: int | None = None) -> PasskeyBatch:
        """Context number `index` of an endless sequence; `length` overrides its turn."""
        epoch, turn = divmod(index, len(self.lengths))
        order = random.Random(f"{self.seed}/{epoch}").sample(self.lengths, len(self.lengths))
        generator = random.Random(f"{self.seed}/context/{index}")
        return self._context(generator, order[turn] if length is None else length)

    def _context(self, generator: random.Random, length: int) -> PasskeyBatch:
        config, tokenizer = self.config, self.haystack.tokenizer
        keys = [passkey(generator, config.words) for _ in range(config.passkeys)]
        places = sorted(generator.sample(range(DEPTHS), config.passkeys))
        depths = [0.05 + 0.9 * place / (DEPTHS - 1) for place in places]
        said = [f"The {ordinal} passkey to the vault is" for ordinal in ORDINALS[: config.passkeys]]
        needles = [
            tokenizer.encode(f"\n\n{words} {key}.\n\n", bos=False) for words, key in zip(said, keys, strict=True)
        ]
        tail, answers = self._tail(said, keys)
        front, closing = tokenizer.encode(PREFACE), tokenizer.encode(CLOSING, bos=False)
        room = length - len(front) - sum(map(len, needles)) - len(closing) - len(tail)
        if room < 1:
            raise UsageError(
                f"{length} tokens leave no room for text beside {config.passkeys} passkeys of {config.words} words, "
                f"which take {length - room}: use longer contexts, fewer passkeys or fewer words"
            )
        start = generator.randrange(len(self.haystack))
        text = self.haystack.hide(list(zip(depths, needles, strict=True)), room, start)
        labelled = answers if config.labels == "answers" else [True] * len(tail)
        tokens = front + text + closing + tail
        labels = [False] * (len(tokens) - len(tail)) + labelled
        return PasskeyBatch(torch.tensor([tokens]), torch.tensor([labels]))

    def _tail(self, said: Sequence[str], keys: Sequence[str]) -> tuple[list[int], list[bool]]:
        """Every question with its answer, and which of these tokens belong to answers."""
        tokens: list[int] = []
        answers: list[bool] = []
        for ordinal, words, key in zip(ORDINALS, said, keys, strict=False):
            cue, answer = _split(
                self.haystack.tokenizer, f"\n\nWhat is the {ordinal} passkey to the vault? {words}", f" {key}."
            )
            tokens += cue + answer
            answers += [False] * len(cue) + [True] * len(answer)
        return tokens, answers
