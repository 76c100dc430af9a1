"""Stop strings: end a text before the first that comes whole; show nothing that may be the beginning of one."""

from __future__ import annotations

from collections.abc import Sequence

from fewer.errors import UsageError


class StopStrings:
    """Fed with pieces of text, gives back what may be shown. `found` is set once a stop string has come whole."""

    def __init__(self, stops: Sequence[str] = ()):
        if any(not stop for stop in stops):
            raise UsageError("a stop string is empty: give at least one character, or no stop string")
        self.stops = list(stops)
        self.found: str | None = None
        self.held = ""  # not shown yet: it may be the beginning of a stop string

    def feed(self, piece: str) -> str:
        """The next piece of text -> what may be shown now. Nothing comes after a stop string."""
        if self.found is not None:
            return ""
        text = self.held + piece
        # The one that is whole first counts, so that the end does not depend on how the text is cut into pieces.
        places = [(place + len(stop), place, stop) for stop in self.stops if (place := text.find(stop)) >= 0]
        if places:
            _, place, self.found = min(places)
            self.held = ""
            return text[:place]
        keep = self._beginning(text)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self, piece: str = "") -> str:
        """The last piece of text -> all that is left to show."""
        shown = self.feed(piece)
        rest, self.held = self.held, ""
        return shown + rest

    def _beginning(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max((len(stop) for stop in self.stops), default=1) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self.stops):
                return size
        return 0
