"""`TextStream`: tokens in, text out, never half a character.

A token is a run of bytes, and a character of UTF-8 may span tokens. The stream holds back the bytes of a character
that is not complete yet; what it has returned never changes afterwards.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable


class TextStream:
    """Joins the pieces of a token sequence into text: all that `feed` and `finish` return is the decoded text.

    `piece` gives a token's bytes (none for a token that is not to be shown). `strip_space` drops the space that the
    tokenizer put before the first word.
    """

    def __init__(self, piece: Callable[[int], bytes], strip_space: bool = False) -> None:
        self._piece = piece
        self._strip_space = strip_space
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """The text that this token completes: often a word, sometimes nothing."""
        data = self._piece(token)
        if self._strip_space and data:
            self._strip_space = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data)

    def finish(self) -> str:
        """What is still held back: replacement characters where the text stops inside a character."""
        return self._decoder.decode(b"", final=True)
