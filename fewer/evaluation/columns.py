"""The table's columns, in the terminal and on the page: what a figure is called, how it is written, what is better."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from fewer.evaluation.comparison import Comparison, Row
from fewer.evaluation.speed import Spread

Value = Spread | float | None


@dataclass(frozen=True)
class Column:
    title: str
    meaning: str
    value: Callable[[Comparison, Row], Value]
    text: Callable[[float], str]
    better: Literal["low", "high"] | None

    def median(self, comparison: Comparison, row: Row) -> float | None:
        """The number that the column sorts by; None for a row without it."""
        value = self.value(comparison, row)
        value = value.median if isinstance(value, Spread) else value
        return value if value is not None and math.isfinite(value) else None

    def spread(self, comparison: Comparison, row: Row) -> str:
        """`low–high`, or nothing where the figure has no spread."""
        value = self.value(comparison, row)
        if not isinstance(value, Spread) or value.low == value.high:
            return ""
        return f"{self.text(value.low)}–{self.text(value.high)}"


def is_best(column: Column, comparison: Comparison, row: Row) -> bool:
    """Whether no row is clearly better in this column: spreads that overlap, or equal words, are a tie.

    Where all rows tie nobody is best.
    """
    ends = {id(each): _ends(column, comparison, each) for each in comparison.rows if each.measured}
    known = {key: value for key, value in ends.items() if value is not None}
    if column.better is None or id(row) not in known:
        return False
    sign = 1 if column.better == "high" else -1
    top = max(known.values(), key=lambda each: sign * each.median)

    def ties(spread: Spread) -> bool:
        overlap = spread.low <= top.high and top.low <= spread.high
        return overlap or column.text(spread.median) == column.text(top.median)

    return ties(known[id(row)]) and not all(map(ties, known.values()))


def _ends(column: Column, comparison: Comparison, row: Row) -> Spread | None:
    value, median = column.value(comparison, row), column.median(comparison, row)
    if median is None:
        return None
    return value if isinstance(value, Spread) else Spread(median, median, median)


def megabytes(value: float) -> str:
    return f"{value / 1e6:,.1f}" if value < 1e9 else f"{value / 1e6:,.0f}"


def rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def small(value: float) -> str:
    """A figure that may be zero or tiny."""
    if value == 0:
        return "0"
    return f"{value:.4f}" if value >= 0.00005 else "<0.0001"


def percent(value: float) -> str:
    return f"{100 * value:.1f}%" if value < 1 else f"{100 * value:.0f}%"


COLUMNS = (
    Column("weights MB", "Bytes of all weights as loaded", lambda c, r: r.weight_bytes, megabytes, "low"),
    Column(
        "KV MB",
        "Bytes allocated for keys and values after the timed prefill; with batches, of the largest one at its end",
        lambda c, r: r.kv_bytes,
        megabytes,
        "low",
    ),
    Column(
        "first token ms",
        "Time to the first token of an answer, median over the prompts",
        lambda c, r: r.spread(lambda each: 1000 * each.first_seconds),
        rate,
        "low",
    ),
    Column(
        "prefill tok/s",
        "Prompt tokens read a second in one long prompt",
        lambda c, r: r.spread(lambda each: each.prefill_rate),
        rate,
        "high",
    ),
    Column(
        "decode tok/s",
        "Tokens written a second after the first, over all prompts",
        lambda c, r: r.spread(lambda each: each.decode_rate),
        rate,
        "high",
    ),
    Column(
        "× baseline",
        "Decoding rate over the baseline's, paired round by round",
        lambda c, r: c.ratio(r),
        lambda value: f"{value:.2f}",
        "high",
    ),
    Column(
        "of bandwidth",
        "Bytes that the target passes needed a second, over the memory bandwidth read in the same run",
        lambda c, r: c.bandwidth_fraction(r),
        percent,
        None,
    ),
    Column(
        "perplexity",
        "exp of the mean negative log-likelihood",
        lambda c, r: r.quality.perplexity if r.quality else None,
        lambda value: f"{value:.3f}" if value < 100 else f"{value:,.0f}",
        "low",
    ),
    Column(
        "KL",
        "KL divergence from the uncompressed model, nats a token",
        lambda c, r: r.quality.kl if r.quality else None,
        small,
        "low",
    ),
    Column(
        "unchanged",
        "Share of greedy tokens that stay the same as the uncompressed model's",
        lambda c, r: r.quality.unchanged if r.quality else None,
        percent,
        "high",
    ),
    Column(
        "tokens a pass",
        "Tokens written for each pass through the model",
        lambda c, r: r.spread(lambda each: each.tokens_per_pass),
        lambda value: f"{value:.2f}",
        "high",
    ),
)


def headline(comparison: Comparison) -> str:
    """The comparison in a sentence or two."""
    baseline = comparison.baseline
    measured = [row for row in comparison.rows if row.measured]
    if baseline is None:
        return f"No recipe for {comparison.model} could be measured."
    others = [row for row in measured if row is not baseline]
    if not others:
        return f"{baseline.name} writes {_rate(baseline)} tokens/s."
    best = max(others, key=_rate_of)
    ratio = comparison.ratio(best)
    factor = f"{ratio.median:.2f} ×" if ratio else "—"
    sentence = f"{best.name} writes {_rate(best)} tokens/s, {factor} the rate of {baseline.name} ({_rate(baseline)})"
    if best.weight_bytes and baseline.weight_bytes:
        sentence += f", with {best.weight_bytes / baseline.weight_bytes:.0%} of its weight bytes"
    quality = best.quality
    if quality is not None and quality.unchanged is not None and quality.kl is not None:
        sentence += (
            f"; {percent(quality.unchanged)} of greedy tokens stay those of the uncompressed model "
            f"(KL {small(quality.kl)})"
        )
    return sentence + "."


def notes(comparison: Comparison) -> list[str]:
    """What a reader must know beside the figures."""
    settings, count = comparison.settings, len(comparison.bandwidths)
    found = [
        f"Medians of {comparison.rounds} interleaved rounds with lowest and highest; {comparison.prompts} prompts, "
        f"answers of at most {settings.max_tokens} tokens, a timed prefill of {comparison.prompt_tokens} tokens.",
        f"Perplexity is measured on {comparison.text}; KL divergence and unchanged tokens on what the uncompressed "
        "model (weights=dense) writes. Prompts are read in one go, the text behind them token by token through the "
        "decode path.",
    ]
    if comparison.bandwidth:
        found.append(
            f"The limit is the memory bandwidth of {comparison.bandwidth / 1e9:.1f} GB/s, the fastest of {count} "
            "readings between the rounds."
        )
    if comparison.reference_failure:
        found.append(
            f"The uncompressed model could not run, so nothing is held against it: {comparison.reference_failure}."
        )
    if comparison.interrupted:
        found.append(f"Interrupted: these are the {comparison.rounds} rounds that were complete.")
    found += [
        f"{row.name}: quality is not shown, because {row.quality_note}." for row in comparison.rows if row.quality_note
    ]
    return found


def _rate_of(row: Row) -> float:
    spread = row.spread(lambda each: each.decode_rate)
    return spread.median if spread else 0.0


def _rate(row: Row) -> str:
    return rate(_rate_of(row))
