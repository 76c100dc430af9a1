"""`Tokenizer`: text to tokens and back, whatever layout the model came in.

What differs between layouts is how ordinary text is encoded (`Encoder`) and how a vocabulary entry spells its bytes
(`Spelling`); `tokenizer_gguf` and `tokenizer_folder` find both out. Everything that the engine asks for is here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from fewer.checkpoint.text_stream import TextStream
from fewer.errors import UsageError

if TYPE_CHECKING:
    from fewer.checkpoint.chat_template import ChatTemplate

Spelling = Literal["byte-level", "sentencepiece"]

# Names under which models end a turn or a text; they count where the vocabulary marks them as special.
END_NAMES = frozenset([
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>",
    "</s>", "<eos>", "<｜end▁of▁sentence｜>", "<end_of_utterance>", "<|return|>",
])  # fmt: skip


class Encoder(Protocol):
    def encode(self, text: str, special: bool) -> list[int]:
        """Tokens of `text`, none added; special tokens in it are recognised where `special`, else spelled out."""
        ...


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer file says about its tokens."""

    tokens: Sequence[str]  # as written in the file, [vocab_size]
    spelling: Spelling
    special: frozenset[int]  # never shown: control tokens
    literal: frozenset[int]  # written as they are, outside the spelling: special and added tokens
    bos: int | None
    eos: int | None  # what templates call eos_token
    ends: frozenset[int]  # tokens that end generation
    adds_bos: bool
    strips_space: bool = False  # encoding puts a space before the first word, decoding takes it away


class Tokenizer:
    """One vocabulary with its encoder and its chat template."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        encoder: Encoder,
        chat_template: str | None = None,
        write: Callable[[Path], None] | None = None,
    ) -> None:
        """`write` puts the files that `from_folder` needs into a folder."""
        self.vocabulary = vocabulary
        self._encoder = encoder
        self._write = write
        self._chat_source = chat_template
        self._chat: ChatTemplate | None = None
        self._pieces: dict[int, bytes] = {}

    def save(self, folder: Path) -> None:
        """Write it into an existing folder: `tokenizer_folder` reads the same tokenizer back. Raises OSError."""
        if self._write is None:
            raise UsageError("this tokenizer was made in memory and has no files: load one from a model to save it")
        self._write(folder)

    @property
    def vocab_size(self) -> int:
        return len(self.vocabulary.tokens)

    @property
    def bos_token(self) -> int | None:
        return self.vocabulary.bos

    @property
    def eos_tokens(self) -> frozenset[int]:
        return self.vocabulary.ends

    @property
    def adds_bos(self) -> bool:
        return self.vocabulary.adds_bos

    def encode(self, text: str, special: bool = True, bos: bool | None = None) -> list[int]:
        """Tokens of `text`. `special`: special tokens written in the text are recognised. `bos` None: as the model
        wishes (never twice)."""
        try:
            text.encode()
        except UnicodeEncodeError as fault:
            raise UsageError(
                f"the text holds half of a surrogate pair at character {fault.start}, which is no Unicode text: "
                "read it as UTF-8"
            ) from None
        tokens = self._encoder.encode(text, special)
        wanted = self.adds_bos if bos is None else bos
        if wanted and self.bos_token is not None and tokens[:1] != [self.bos_token]:
            tokens.insert(0, self.bos_token)
        return tokens

    def decode(self, tokens: Iterable[int], skip_special: bool = True) -> str:
        stream = self.stream(skip_special)
        return "".join([stream.feed(token) for token in tokens]) + stream.finish()

    def piece(self, token: int) -> bytes:
        """The bytes that `token` stands for; none for a number beyond the vocabulary (padded embeddings have them)."""
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = self._spell(token)
        return piece

    def stream(self, skip_special: bool = True) -> TextStream:
        """A decoder for tokens that arrive one by one."""
        special = self.vocabulary.special if skip_special else frozenset()
        return TextStream(
            lambda token: b"" if token in special else self.piece(token), strip_space=self.vocabulary.strips_space
        )

    @property
    def has_chat_template(self) -> bool:
        return bool(self._chat_source)

    def chat_text(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The text that the model's template makes of `messages`, each with a "role" and a "content"."""
        if not self._chat_source:
            raise UsageError("the model has no chat template: use --raw to continue the text as it is")
        if self._chat is None:
            from fewer.checkpoint.chat_template import ChatTemplate  # jinja2 takes 0.1 s to import

            self._chat = ChatTemplate(self._chat_source)
        marks = {"bos_token": self.vocabulary.bos, "eos_token": self.vocabulary.eos}
        names = {name: "" if token is None else self.vocabulary.tokens[token] for name, token in marks.items()}
        return self._chat.render(messages, add_generation_prompt, names)

    def chat(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> list[int]:
        """Tokens of a conversation. The template writes every special token itself, the first one included."""
        return self.encode(self.chat_text(messages, add_generation_prompt), special=True, bos=False)

    def _spell(self, token: int) -> bytes:
        if not 0 <= token < self.vocab_size:
            return b""
        text = self.vocabulary.tokens[token]
        if token in self.vocabulary.literal:
            return text.encode()
        if self.vocabulary.spelling == "byte-level":
            return b"".join([_BYTE_OF.get(character) or character.encode() for character in text])
        if byte := _BYTE_TOKEN.fullmatch(text):
            return bytes([int(byte[1], 16)])
        return text.replace("▁", " ").encode()


_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")


def _printable_bytes() -> dict[str, bytes]:
    """Byte-level BPE writes each byte as one printable character: itself, or the next free one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): bytes([byte]) for byte in printable}
    others = [byte for byte in range(256) if chr(byte) not in table]
    return table | {chr(0x100 + index): bytes([byte]) for index, byte in enumerate(others)}


_BYTE_OF = _printable_bytes()
