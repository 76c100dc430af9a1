"""`Comparison`: what `compare` measured, as data. Tables, JSON and the HTML page are made of it.

A figure is a `Spread` over rounds where it is a time, one number where a repetition would give the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fewer.evaluation.speed import Spread
from fewer.recipe import Recipe
from fewer.registry import SLOTS


@dataclass(frozen=True)
class Settings:
    """How a comparison is run. Lengths are tokens."""

    max_tokens: int = 32  # of each answer
    rounds: int = 3
    batch: int = 1  # prompts that are answered at once; with more than there are, they come again
    prompt_tokens: int = 768  # of the prefill that is timed, after which keys and values are weighed
    text_tokens: int = 1024  # of the user's text, at most
    window: int = 512  # of perplexity on the user's text
    dtype: str | None = None  # of recipes that name none, and of the uncompressed reference
    device: str | None = None
    context: int | None = None


@dataclass(frozen=True)
class Quality:
    """How near a recipe is to the uncompressed model, through the decode path."""

    perplexity: float
    scored_tokens: int
    kl: float | None  # nats a token; None where the uncompressed model could not run
    unchanged: float | None  # share of greedy tokens, 0 to 1
    compared_tokens: int = 0


@dataclass(frozen=True)
class Round:
    """One recipe's figures in one round. Rates are per second."""

    first_seconds: float  # to the first token: median over prompts
    prefill_rate: float
    decode_rate: float
    read_rate: float  # bytes that target passes needed
    tokens_per_pass: float


@dataclass
class Row:
    """One recipe. `failure` says in a sentence why figures are missing."""

    recipe: Recipe
    weight_bytes: int | None = None
    kv_bytes: int | None = None
    quality: Quality | None = None
    quality_note: str | None = None
    rounds: list[Round] = field(default_factory=list)
    failure: str | None = None

    @property
    def name(self) -> str:
        return str(self.recipe)

    @property
    def measured(self) -> bool:
        return self.failure is None and bool(self.rounds)

    def spread(self, figure: Callable[[Round], float]) -> Spread | None:
        """The figure's median, lowest and highest over the rounds; None where there is none, or one is no number."""
        values = [figure(each) for each in self.rounds]
        return Spread.of(values) if values and all(math.isfinite(value) for value in values) else None


@dataclass
class Comparison:
    """Everything that a report says."""

    model: str
    fingerprint: str
    architecture: dict[str, int | str]
    machine: dict[str, object]
    settings: Settings
    prompts: int
    prompt_tokens: int  # of the timed prefill, as it was
    text: str  # what perplexity was measured on
    rows: list[Row]
    bandwidths: list[float] = field(default_factory=list)  # bytes a second, before each round and after the last
    reference_failure: str | None = None
    interrupted: bool = False
    started: str = ""  # ISO 8601, UTC
    seconds: float = 0.0

    @property
    def rounds(self) -> int:
        return max((len(row.rounds) for row in self.rows), default=0)

    @property
    def baseline(self) -> Row | None:
        """The uncompressed model if it is a row, otherwise the first row with figures."""
        measured = [row for row in self.rows if row.measured]
        plain = [row for row in measured if is_uncompressed(row.recipe)]
        return next(iter(plain + measured), None)

    @property
    def bandwidth(self) -> float | None:
        """The limit: the fastest reading of the run, bytes a second."""
        return max(self.bandwidths, default=None)

    def ratio(self, row: Row) -> Spread | None:
        """Decoding rate over the baseline's, round by round, so that a machine that slows down cancels out."""
        baseline = self.baseline
        if baseline is None or not row.measured:
            return None
        pairs = zip(row.rounds, baseline.rounds, strict=False)
        ratios = [mine.decode_rate / theirs.decode_rate for mine, theirs in pairs if theirs.decode_rate > 0]
        return Spread.of(ratios) if ratios else None

    def bandwidth_fraction(self, row: Row) -> Spread | None:
        limit = self.bandwidth
        return row.spread(lambda each: each.read_rate / limit) if limit else None

    def to_json(self) -> dict[str, Any]:
        """Plain values; what is not finite is None."""
        return {
            "model": self.model,
            "fingerprint": self.fingerprint,
            "architecture": self.architecture,
            "started": self.started,
            "seconds": number(self.seconds),
            "interrupted": self.interrupted,
            "machine": self.machine,
            "settings": asdict(self.settings) | {"prompts": self.prompts, "prefill_tokens": self.prompt_tokens},
            "perplexity_text": self.text,
            "reference_failure": self.reference_failure,
            "rounds": self.rounds,
            "bandwidth_bytes_per_second": _spread(Spread.of(self.bandwidths) if self.bandwidths else None),
            "bandwidth_limit_bytes_per_second": number(self.bandwidth),
            "baseline": self.baseline.name if self.baseline else None,
            "rows": [self._row(row) for row in self.rows],
        }

    def _row(self, row: Row) -> dict[str, Any]:
        quality = row.quality
        return {
            "recipe": row.name,
            "slots": {slot: getattr(row.recipe, slot) for slot in SLOTS} | {"dtype": row.recipe.dtype},
            "weight_bytes": row.weight_bytes,
            "kv_bytes": row.kv_bytes,
            "first_token_seconds": _spread(row.spread(lambda each: each.first_seconds)),
            "prefill_tokens_per_second": _spread(row.spread(lambda each: each.prefill_rate)),
            "decode_tokens_per_second": _spread(row.spread(lambda each: each.decode_rate)),
            "ratio_to_baseline": _spread(self.ratio(row)),
            "bandwidth_fraction": _spread(self.bandwidth_fraction(row)),
            "tokens_per_pass": _spread(row.spread(lambda each: each.tokens_per_pass)),
            "perplexity": number(quality.perplexity) if quality else None,
            "scored_tokens": quality.scored_tokens if quality else None,
            "kl_divergence": number(quality.kl) if quality else None,
            "greedy_tokens_unchanged": number(quality.unchanged) if quality else None,
            "compared_tokens": quality.compared_tokens if quality else None,
            "quality_note": row.quality_note,
            "failure": row.failure,
        }


def is_uncompressed(recipe: Recipe) -> bool:
    """Dense weights, every other slot at its default."""
    return recipe.weights == "dense" and all(
        str(recipe.choices[slot]) == str(Recipe().choices[slot]) for slot in SLOTS if slot != "weights"
    )


def unique(recipes: Sequence[Recipe]) -> list[Recipe]:
    """The recipes without repetitions, in order."""
    return list(dict.fromkeys(recipes))


def number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _spread(spread: Spread | None) -> dict[str, float] | None:
    return asdict(spread) if spread else None
