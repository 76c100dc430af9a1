"""What `h200_caches.json` says: figures by section, and the targets that they meet or miss. No tensors.

A figure that was not measured is None and stays so in every ratio; a ratio is taken between equal contexts only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.h200_caches_bytes import Shape, length_name, unexplained_decline

Report = dict[str, Any]
Figure = float | None


@dataclass(frozen=True)
class Target:
    method: str
    what: str
    limit: float
    at_least: bool  # or at most
    found: Figure

    @property
    def met(self) -> bool | None:
        """None: not measured."""
        if self.found is None:
            return None
        return self.found >= self.limit if self.at_least else self.found <= self.limit

    @property
    def wanted(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}"

    def to_json(self) -> Report:
        return asdict(self) | {"met": self.met}

    def __str__(self) -> str:
        found = "not measured" if self.found is None else f"{self.found:.3f}"
        verdict = {None: "?", True: "met", False: "MISSED"}[self.met]
        return f"{verdict:7}{self.method}: {self.what}: {found} (wanted {self.wanted})"


def figure(report: Report, section: str, *path: str) -> Any:
    """A value of a section's result; None where the section failed, was skipped or is missing."""
    found = report.get(section)
    for key in ("result", *path):
        found = found.get(key) if isinstance(found, dict) else None
    return found


def number(report: Report, section: str, *path: str) -> Figure:
    found = figure(report, section, *path)
    return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else None


def ratio(one: Figure, other: Figure) -> Figure:
    return None if one is None or not other else one / other


def prefill_seconds(report: Report, section: str, tokens: int) -> Figure:
    """Seconds of a prompt of this many tokens, which may be the beginning of the one that was fed."""
    return number(report, section, "prefill", "at", str(tokens))


class Caches:
    """The figures of a report, with its lengths."""

    def __init__(self, report: Report):
        self.report, self.settings = report, report.get("settings", {})

    def length(self, name: str) -> int:
        """context, medium, short, …: tokens."""
        return int(self.settings.get(name, 0))

    def name(self, method: str, length: str) -> str:
        return f"{method} {length_name(self.length(length))}"

    @property
    def shape(self) -> Shape:
        """Of Llama-3-8B, cut to the layers that were run."""
        return Shape(int(self.settings.get("layers", 32)), 32, 8, 128)

    def speed_up(self, section: str, over: str, *path: str) -> Figure:
        """How many times less the section takes than `over`, at the same context."""
        if figure(self.report, section, "context") != figure(self.report, over, "context"):
            return None
        return ratio(number(self.report, over, *path), number(self.report, section, *path))

    def step(self, section: str, over: str) -> Figure:
        return self.speed_up(section, over, "decode", "seconds")

    def attention(self, section: str, over: str) -> Figure:
        return self.speed_up(section, over, "attention", "seconds")

    def bytes(self, section: str, over: str) -> Figure:
        """Share of the other's bytes."""
        return ratio(1.0, self.speed_up(section, over, "cache_bytes"))

    def prefill(self, section: str, over: str, tokens: int) -> Figure:
        return ratio(prefill_seconds(self.report, over, tokens), prefill_seconds(self.report, section, tokens))

    def scoring_share(self, length: str) -> Figure:
        """What an evicting step takes beyond a dense one over as many keys, relative to the dense step at this
        context."""
        step = number(self.report, self.name("a2sf", length), "decode", "seconds")
        same_keys = number(self.report, self.name("dense", "kept"), "decode", "seconds")
        dense = number(self.report, self.name("dense", length), "decode", "seconds")
        return None if step is None or same_keys is None else ratio(step - same_keys, dense)

    def decline(self, way: str, batch: int, short: int, long: int) -> Figure:
        """From one prefix to a longer one, beyond what the added operations explain."""
        sections = [f"{way} {batch} rows {length_name(prefix)}" for prefix in (short, long)]
        taken = [number(self.report, section, "seconds") for section in sections]
        flops = self.report.get("bandwidth", {}).get("bf16_flops")
        if taken[0] is None or taken[1] is None or not flops:
            return None
        return unexplained_decline((taken[0], taken[1]), (short, long), batch, self.shape, flops)


def targets(report: Report) -> list[Target]:
    found = Caches(report)
    return [*_duo(found), *_lserve(found), *_tidal(found), *_hydragen(found), *_a2sf(found)]


def _duo(found: Caches) -> Iterator[Target]:
    method, context = "duo-attention", found.length("context")
    name, dense, long = found.name(method, "context"), found.name("dense", "context"), length_name(context)
    yield Target(method, f"step at {long}, times faster than dense", 1.4, True, found.step(name, dense))
    yield Target(method, f"its attention alone at {long}", 1.85, True, found.attention(name, dense))
    yield Target(method, "KV bytes, share of dense", 0.52, False, found.bytes(name, dense))
    faster = found.prefill(name, dense, context)
    yield Target(method, f"chunked prefill of {long}, times faster than dense", 1.4, True, faster)


def _lserve(found: Caches) -> Iterator[Target]:
    dense, context, short = found.name("dense", "context"), found.length("context"), found.length("short")
    half, long = context // 2, length_name(context)
    for bits in (4, 16):
        title, method = f"lserve {bits}-bit", "lserve"
        name = found.name(title, "context")
        for path, words in (("reusing_seconds", "attention"), ("seconds", "attention and its choice of pages")):
            lengths = (name, found.name(title, "short"))
            grown = ratio(*(number(found.report, section, "attention", path) for section in lengths))
            flat = f"{bits} bits: {words} at {long}, times that at {length_name(short)}"
            yield Target(method, flat, 1.15, False, grown)
        faster = f"{bits} bits: step at {long}, times faster than dense"
        yield Target(method, faster, 2.4, True, found.step(name, dense))
        prefill = f"{bits} bits: prefill of {length_name(half)}, times faster than dense"
        yield Target(method, prefill, 1.5, True, found.prefill(name, dense, half))
    share = found.bytes(found.name("lserve 4-bit", "context"), dense)
    yield Target("lserve", "4 bits: KV bytes, share of dense", 0.35, False, share)


def _tidal(found: Caches) -> Iterator[Target]:
    method, dense = "tidal-decode", found.name("dense", "context")
    long = length_name(found.length("context"))
    for limit, budget in ((2.0, found.length("budget")), (2.0, found.length("small_budget"))):
        name = found.name(f"{method} {budget}", "context")
        what = f"budget {budget:,}: step at {long}, times faster than dense"
        yield Target(method, what, limit, True, found.step(name, dense))
    names = [found.name(f"llama-2-7b {kind}", "many_heads") for kind in (method, "dense")]
    what = f"Llama-2-7B: step at {length_name(found.length('many_heads'))}, times faster than dense"
    yield Target(method, what, 2.3, True, found.step(*names))


def _hydragen(found: Caches) -> Iterator[Target]:
    method, report = "hydragen", found.report
    gain = ratio(*(number(report, "prefix attention", f"{way}_seconds") for way in ("paged", "shared")))
    what = "attention of 1,024 rows behind 16k, times faster than reading the prefix for each"
    yield Target(method, what, 15, True, gain)
    sections = [f"{way} 1024 rows 16k" for way in ("paged", "hydragen")]
    gain = ratio(*(number(report, section, "attention_seconds") for section in sections))
    yield Target(method, "the same in the caches' own steps, all layers", 15, True, gain)
    for batch in (256, 1024):
        what = f"{batch:,} rows, 1k to 16k: step, times what the added operations explain"
        yield Target(method, what, 1.25, False, found.decline(method, batch, 1024, 16384))
    section = "hydragen 1024 rows 16k"
    share = ratio(number(report, section, "cache_bytes"), number(report, section, "once_bytes"))
    yield Target(method, "KV bytes, times those of prefix + rows × own tokens", 1.02, False, share)


def _a2sf(found: Caches) -> Iterator[Target]:
    method, report = "a2sf", found.report
    steps = [number(report, found.name(method, length), "decode", "seconds") for length in ("medium", "shortest")]
    lengths = length_name(found.length("medium")), length_name(found.length("shortest"))
    yield Target(method, "step at {}, times that at {}".format(*lengths), 1.05, False, ratio(*steps))
    for length in ("short", "medium"):
        what = f"scoring, share of the dense step at {length_name(found.length(length))}"
        yield Target(method, what, 0.15, False, found.scoring_share(length))
