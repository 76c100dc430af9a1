"""A chat's memory: messages, and the session that already holds most of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fewer.decoding.generate import generate
from fewer.decoding.sampling import SamplingConfig
from fewer.engine.session import Session

if TYPE_CHECKING:
    from fewer.language_model import LanguageModel


class Conversation:
    """Turns of user and assistant. Each turn feeds only the tokens that the session does not hold yet."""

    def __init__(self, model: LanguageModel, sampling: SamplingConfig, max_tokens: int, system: str | None = None):
        self.model, self.sampling, self.max_tokens = model, sampling, max_tokens
        self.system = system
        self.turns: list[dict[str, str]] = []
        self.fed_tokens = 0  # of the last turn: those that were not in the session
        self.answer_tokens = 0
        self._session: Session | None = None
        self._held: list[int] = []  # tokens that the session has committed

    @property
    def messages(self) -> list[dict[str, str]]:
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.turns

    def reset(self) -> None:
        """Forget every turn; the system message stays."""
        self.turns.clear()
        self._forget()

    def ask(self, text: str) -> Iterator[str]:
        """Stream the answer to `text`. Leaving early (Ctrl-C) keeps what was said; a failed turn leaves no trace."""
        self.turns.append({"role": "user", "content": text})
        answer = ""
        try:
            for piece in self._stream():
                answer += piece
                yield piece
        except (Exception, KeyboardInterrupt, GeneratorExit):
            self._forget()  # a pass may have been cut in the middle
            if not answer:
                self.turns.pop()
            raise
        finally:
            if answer:
                self.turns.append({"role": "assistant", "content": answer})

    def _stream(self) -> Iterator[str]:
        tokens = self.model.tokenizer.chat(self.messages)
        session, held = self._continue(tokens)
        new = tokens[held:]
        self.fed_tokens, self.answer_tokens = len(new), 0
        stops, text = self.model.tokenizer.eos_tokens, self.model.tokenizer.stream()
        said: list[int] = []
        events = generate(
            session, [new], self.sampling, self.model.strategy, self.max_tokens, stops, history=[tokens[:held]]
        )
        for event in events:
            said += event.tokens
            self.answer_tokens = len(said)
            piece = "".join(text.feed(token) for token in event.tokens)
            if piece:
                yield piece
        rest = text.finish()
        if rest:
            yield rest
        self._held = (tokens + said)[: session.lengths[0]]

    def _continue(self, tokens: list[int]) -> tuple[Session, int]:
        """The session cut back to what it shares with `tokens`, and how many tokens that is; at least one is new."""
        shared = 0
        for old, new in zip(self._held, tokens[:-1], strict=False):
            if old != new:
                break
            shared += 1
        session = self._session
        cut = len(self._held) - shared
        usable = session is not None and (session.cache.slack is None or cut <= session.cache.slack)
        if session is None or not usable or not shared:
            session, shared = self.model.session(), 0
        else:
            session.rollback([shared])
        self._session, self._held = session, tokens[:shared]
        return session, shared

    def _forget(self) -> None:
        self._session, self._held = None, []
