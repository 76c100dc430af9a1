"""The speed of one recipe: prefill of given lengths, decoding behind a given depth of text, round by round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fewer.errors import UsageError
from fewer.evaluation.bandwidth import BandwidthProbe
from fewer.evaluation.machine import machine
from fewer.evaluation.prompts import built_in_prompts, repeat_to
from fewer.evaluation.speed import Spread, decode_rate, prefill_seconds, read_rate, run, tokens_a_pass
from fewer.language_model import LanguageModel


@dataclass(frozen=True)
class PrefillFigure:
    tokens: int
    seconds: Spread
    rate: Spread  # tokens a second
    kv_bytes: int


@dataclass(frozen=True)
class DecodeFigure:
    depth: int  # tokens of text before the first that is written
    tokens: int
    rate: Spread  # tokens a second
    bandwidth_fraction: Spread  # of the fastest reading in the same run
    tokens_per_pass: Spread


@dataclass(frozen=True)
class Benchmark:
    recipe: str
    weight_bytes: int
    load_seconds: float
    machine: dict[str, object]
    bandwidth: float  # bytes a second
    prefill: list[PrefillFigure]
    decode: list[DecodeFigure]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Rates:
    """Readings of one depth, a round each."""

    tokens: list[float] = field(default_factory=list)
    bytes_read: list[float] = field(default_factory=list)
    per_pass: list[float] = field(default_factory=list)


def bench(
    model: LanguageModel,
    lengths: Sequence[int],
    depths: Sequence[int],
    tokens: int = 64,
    rounds: int = 5,
    on_progress: Callable[[int, int], None] | None = None,
) -> Benchmark:
    """Time a prefill of each of `lengths`, and `tokens` greedy tokens after each of `depths`, `rounds` times in turn.

    One round more comes first, to warm up, and is not counted. The text is ordinary prose, so that drafters have
    something to copy; tokens that end an answer are ignored. Raises UsageError for what the context cannot hold.
    """
    _check(model, lengths, depths, tokens, rounds)
    raw = not model.tokenizer.has_chat_template
    words = [token for prompt in built_in_prompts() for token in model.encode(prompt, raw)]
    probe = BandwidthProbe(model.transformer.device)
    prefill: dict[int, list[float]] = {length: [] for length in lengths}
    rates = {depth: _Rates() for depth in depths}
    kv_bytes: dict[int, int] = {}
    for number in range(rounds + 1):
        if on_progress is not None:
            on_progress(number, rounds + 1)
        probe.measure()
        for length in prefill:
            seconds, kv_bytes[length] = prefill_seconds(model, repeat_to(words, length))
            prefill[length] += [seconds] if number else []
        for depth, readings in rates.items():
            answer = [run(model, repeat_to(words, depth), tokens, stop=False)]
            if number:
                readings.tokens.append(decode_rate(answer))
                readings.bytes_read.append(read_rate(answer))
                readings.per_pass.append(tokens_a_pass(answer))
    probe.measure()
    if on_progress is not None:
        on_progress(rounds + 1, rounds + 1)
    return Benchmark(
        recipe=str(model.recipe),
        weight_bytes=model.weight_bytes,
        load_seconds=model.load_seconds,
        machine=machine(model.transformer.device),
        bandwidth=probe.best,
        prefill=[
            PrefillFigure(length, Spread.of(seconds), Spread.of([length / each for each in seconds]), kv_bytes[length])
            for length, seconds in prefill.items()
        ],
        decode=[
            DecodeFigure(
                depth,
                tokens,
                Spread.of(readings.tokens),
                Spread.of([each / probe.best for each in readings.bytes_read]),
                Spread.of(readings.per_pass),
            )
            for depth, readings in rates.items()
        ],
    )


def _check(model: LanguageModel, lengths: Sequence[int], depths: Sequence[int], tokens: int, rounds: int) -> None:
    if rounds < 1:
        raise UsageError(f"rounds is {rounds}: measure at least once")
    if tokens < 2:
        raise UsageError(f"tokens is {tokens}: a rate needs at least 2")
    context = model.context_length
    for length in lengths:
        if not 1 <= length <= context:
            raise UsageError(f"a prefill of {length} tokens does not fit: use 1 to the context of {context}")
    for depth in depths:
        if not 1 <= depth <= context - tokens:
            raise UsageError(
                f"a depth of {depth} with {tokens} tokens does not fit: use 1 to {context - tokens} in a context of "
                f"{context}"
            )
