"""The generation loop: prompts in, tokens out, for every decoding strategy and any number of rows.

Between two rounds a row's session holds all of its text but the last token, which is fed next (the root of the draft
tree). That also holds when the loop ends or is left early, so a session can go on from there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from fewer.decoding import tree as trees
from fewer.decoding.counts import Counts as Counts
from fewer.decoding.plain import Plain
from fewer.decoding.sampling import Sampler, SamplingConfig, argmax, log_probability
from fewer.decoding.verifier import Rule, Verdict, Verifier, accept
from fewer.engine.session import Session
from fewer.errors import UsageError
from fewer.slots import CorrectedCache, Drafter, DraftTree, HiddenDrafter

Finish = Literal["stop", "length"]


class Strategy(Protocol):
    """What a registered decoding method builds: a drafter for each row, or None to decode plainly."""

    lossless: bool

    def drafter(self, sampling: SamplingConfig, row: int) -> Drafter | None: ...


@runtime_checkable
class LossyStrategy(Protocol):
    """A Strategy that also accepts guesses which are not the target's own choice."""

    @property
    def rule(self) -> Rule:
        """In place of the verifier's exact one."""
        ...


@dataclass(slots=True)
class TokenEvent:
    """New tokens of one row. A stop token is the last of them; `finished` says that no more will come."""

    row: int
    tokens: list[int]
    logprobs: list[float] | None = None  # natural, of the model's own law before warping
    finished: Finish | None = None
    guessed: int = 0  # so many of the first tokens come from the draft
    drafter: str = ""  # what made that, as `DraftTree.drafter`


@dataclass(slots=True)
class _Row:
    index: int
    context: list[int]  # history, prompt and text
    sampler: Sampler
    drafter: Drafter | None
    left: int  # tokens that may still be emitted
    finished: Finish | None = None


def generate(
    session: Session,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    strategy: Strategy | None = None,
    max_tokens: int = 256,
    stop_tokens: Collection[int] = (),
    logprobs: bool = False,
    counts: Counts | None = None,
    history: Sequence[Sequence[int]] | None = None,
) -> Iterator[TokenEvent]:
    """Feed each row's prompt, then emit tokens until every row has met a stop token, `max_tokens` or the context's end.

    `history` is what the session already holds for each row, for drafters and the repetition penalty. `counts` is
    filled while the loop runs. Raises UsageError for an empty prompt, max_tokens below 1, or a cache that cannot roll
    back.
    """
    if max_tokens < 1:
        raise UsageError(f"max_tokens is {max_tokens}: ask for at least 1 token")
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise UsageError("a prompt is empty: give at least one token")
    stops, counts = frozenset(stop_tokens), counts if counts is not None else Counts()
    rows = []
    for index, prompt in enumerate(prompts):
        context = [*(history[index] if history else ()), *prompt]
        drafter = (strategy or Plain()).drafter(sampling, index)
        if drafter is not None:
            if session.cache.slack == 0:
                raise UsageError("this cache cannot take back rejected guesses: use decoding=plain or cache=full")
            drafter.start(context)
        rows.append(_Row(index, context, Sampler(sampling, index), drafter, max_tokens))
    session.observers = _observers(rows)
    logits = session.prefill(prompts)
    if len(rows) == 1 and rows[0].drafter is None and sampling.greedy and not (sampling.reads_history or logprobs):
        yield from _greedy(session, int(argmax(logits[0])), max_tokens, stops, counts)
        return
    for row in rows:
        token = row.sampler.token(logits[row.index], row.context)
        scores = [log_probability(logits[row.index], token)] if logprobs else None
        yield _emit(session, row, Verdict([0], [token], scores), stops, session.lengths[row.index])
    verifier = Verifier(session, logprobs, strategy.rule if isinstance(strategy, LossyStrategy) else accept)
    while any(row.finished is None for row in rows):
        yield from _round(session, rows, verifier, stops, counts)


def _observers(rows: list[_Row]) -> dict[int, Callable[[Tensor], None]]:
    """Those who are told the target's hidden states."""
    found: dict[int, Callable[[Tensor], None]] = {}
    for row in rows:
        if isinstance(row.drafter, HiddenDrafter):
            found[row.index] = row.drafter.observe
    return found


def _greedy(
    session: Session, token: int, max_tokens: int, stops: frozenset[int], counts: Counts
) -> Iterator[TokenEvent]:
    """One row, plain and greedy: the path where microseconds count."""
    length = session.lengths[0]
    last = max_tokens if session.cache.renumbers else min(max_tokens, session.context_length - length + 1)
    following = session.greedy(token, last - 1)
    for _ in range(last - 1):
        if token in stops:
            break
        yield TokenEvent(0, [token])
        token = next(following)
        counts.target_passes += 1
        counts.emitted += 1
    yield TokenEvent(0, [token], None, "stop" if token in stops else "length")


def _round(
    session: Session, rows: list[_Row], verifier: Verifier, stops: frozenset[int], counts: Counts
) -> Iterator[TokenEvent]:
    """One target pass over every unfinished row."""
    lengths, began = session.lengths, time.perf_counter()
    drafts = [None if row.finished else _draft(session, row, lengths[row.index]) for row in rows]
    drafted = time.perf_counter()
    if all(draft is None or len(draft.tokens) == 1 for draft in drafts):
        verdicts, committed = _decode(session, rows, verifier.logprobs), True
    else:
        verdicts = verifier.verify(drafts, [row.sampler for row in rows], [row.context for row in rows])
        committed = False
    counts.draft_seconds += drafted - began
    counts.verify_seconds += time.perf_counter() - drafted
    events: list[TokenEvent] = []
    paths: list[list[int]] = [[] for _ in rows]
    for row, draft, verdict in zip(rows, drafts, verdicts, strict=True):
        if draft is None or verdict is None:
            continue
        event = _emit(session, row, verdict, stops, lengths[row.index] + 1)
        kept = len(event.tokens)
        # The session keeps all of the text but its last token: the root, and the guesses before a cut.
        paths[row.index] = verdict.path[:kept]
        event.guessed, event.drafter = min(kept, len(verdict.path) - 1), draft.drafter
        counts.add(draft, verdict.path, kept)
        if row.drafter is not None and row.finished is None:
            row.drafter.accept(event.tokens)
        events.append(event)
    if not committed:
        session.commit(paths)
    yield from events


def _draft(session: Session, row: _Row, length: int) -> DraftTree:
    """The row's tree, no larger than the text, the context and the cache have room for."""
    root = row.context[-1]
    if row.drafter is None:
        return trees.root(root)
    limit = row.left - 1
    if not session.cache.renumbers:
        limit = min(limit, session.context_length - length - 2)
    if session.cache.max_step is not None:
        limit = min(limit, session.cache.max_step - 1)
    if isinstance(session.cache, CorrectedCache):
        room = session.cache.before_due(row.index)
        limit = limit if room is None else min(limit, room - 1)
    if limit < 1:
        return trees.root(root)
    draft = trees.cut(trees.merge_duplicates(row.drafter.propose(row.context, limit)), limit)
    trees.check(draft, session.config.vocab_size)
    if draft.tokens[0] != root:
        raise ValueError(f"a draft tree starts at token {draft.tokens[0]}, but the text ends with token {root}")
    return draft


def _decode(session: Session, rows: list[_Row], logprobs: bool) -> list[Verdict | None]:
    """Nothing was guessed: one token for each unfinished row, committed."""
    active = [row.finished is None for row in rows]
    logits = session.decode([row.context[-1] for row in rows], None if all(active) else active)
    sampler = rows[0].sampler
    if sampler.greedy and not sampler.config.reads_history and not logprobs:
        return [Verdict([0], [token]) for token in argmax(logits).tolist()]  # one transfer for all rows
    verdicts: list[Verdict | None] = []
    for row in rows:
        if row.finished:
            verdicts.append(None)
            continue
        token = row.sampler.token(logits[row.index], row.context)
        verdicts.append(Verdict([0], [token], [log_probability(logits[row.index], token)] if logprobs else None))
    return verdicts


def _emit(session: Session, row: _Row, verdict: Verdict, stops: frozenset[int], length: int) -> TokenEvent:
    """Append the round's tokens to the text up to the first stop. `length`: tokens held once the root is."""
    tokens = verdict.tokens[: row.left]
    for place, token in enumerate(tokens):
        if token in stops:
            tokens, row.finished = tokens[: place + 1], "stop"
            break
    row.context += tokens
    row.left -= len(tokens)
    # The last token can be fed only where the context has room for it.
    full = not session.cache.renumbers and length + len(tokens) > session.context_length
    if row.finished is None and (row.left == 0 or full):
        row.finished = "length"
    scores = verdict.logprobs[: len(tokens)] if verdict.logprobs is not None else None
    return TokenEvent(row.index, tokens, scores, row.finished)
