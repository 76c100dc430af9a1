"""`--show-drafts`: the answer with what was guessed and accepted in colour, or between marks where there is none."""

from __future__ import annotations

import sys
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fewer.language_model import Generation, LanguageModel

STYLES = ("green", "cyan", "magenta", "yellow", "blue")  # of the drafters, in the order they come; then again
MARKS = (("⟦", "⟧"), ("⟨", "⟩"), ("⟪", "⟫"), ("⦃", "⦄"), ("⦅", "⦆"))


class DraftPainter:
    """Prints an answer while it grows; `result` is what the stream fills.

    A token's characters have the colour of its drafter. One that is completed by a later token has that one's.
    """

    def __init__(self, model: LanguageModel, result: Generation):
        from rich.console import Console

        self.result = result
        self.console = Console(soft_wrap=True, highlight=False)
        self.coloured = sys.stdout.isatty() and self.console.color_system is not None
        self.method = model.choices["decoding"].method.name
        self.names: list[str] = []  # drafters that were seen
        self.text = model.tokenizer.stream()
        self.fed = self.spans = self.shown = 0  # tokens and drafts looked at, characters printed
        self.waiting: list[tuple[str, int | None]] = []  # characters that may not be shown yet, and their drafter

    def show(self) -> None:
        """Print what `result.text` has grown by."""
        makers: dict[int, int] = {}
        for start, stop, drafter in self.result.drafts[self.spans :]:
            name = drafter or self.method
            if name not in self.names:
                self.names.append(name)
            makers.update(dict.fromkeys(range(start, stop), self.names.index(name)))
        self.spans = len(self.result.drafts)
        for place in range(self.fed, len(self.result.tokens)):
            self.waiting += [(each, makers.get(place)) for each in self.text.feed(self.result.tokens[place])]
        self.fed = len(self.result.tokens)
        new = len(self.result.text) - self.shown
        # The end of a text may hold characters that no token completes.
        missing = self.result.text[self.shown + len(self.waiting) :]
        ready = [*self.waiting[:new], *((each, None) for each in missing)]
        self.waiting, self.shown = self.waiting[new:], self.shown + new
        for maker, group in groupby(ready, key=lambda each: each[1]):
            self._print("".join(character for character, _ in group), maker)
        sys.stdout.flush()

    def _print(self, text: str, maker: int | None) -> None:
        if maker is None:
            print(text, end="")
        elif self.coloured:
            from rich.text import Text

            self.console.print(Text(text, STYLES[maker % len(STYLES)]), end="")
        else:
            left, right = MARKS[maker % len(MARKS)]
            print(f"{left}{text}{right}", end="")

    def legend(self) -> str:
        """What the colours or marks mean, and how much was right."""
        counts = self.result.counts
        if not counts.accepted:
            return "no draft was accepted" if counts.drafted else f"{self.method} drafted nothing"
        signs = STYLES if self.coloured else ["".join(pair) for pair in MARKS]
        names = ", ".join(f"{signs[place % len(signs)]} {name}" for place, name in enumerate(self.names))
        return (
            f"accepted drafts: {names} · {counts.accepted} of {counts.drafted} guesses, {counts.tau:.2f} tokens a pass"
        )
