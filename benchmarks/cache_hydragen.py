"""Shared prefixes on the CPU: the cache `hydragen` beside tiled keys, shared pages, one level only, and no attention.

    python -m benchmarks.cache_hydragen [--quick]

Each claim of the paper (arXiv 2402.05099) that a small model can show is a row. Times are processor seconds of one
thread, so that other work on the machine costs little of their truth; what is compared takes turns. Weights are dense
float32. `full` holds the prefix once a row: its keys are copied there, not computed by every row, except where prefill
is what is measured. Writes `results/cache_hydragen.json`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fewer
from benchmarks.records import RESULTS, write
from fewer.cache import FullCache, HydragenCache, HydragenConfig, PagedCache
from fewer.cache.prefix_gate import split_cost
from fewer.cache.stored import StoredLayer
from fewer.decoding.generate import generate
from fewer.decoding.sampling import SamplingConfig
from fewer.engine.session import Session
from fewer.evaluation.machine import machine
from fewer.evaluation.prompts import built_in_prompts, repeat_to
from fewer.kernels.attention import attention, merge
from fewer.kernels.attention_part import attention_part
from fewer.kernels.paged_attention import paged_attention
from fewer.kernels.shared_prefix import attend_prefix
from fewer.language_model import LanguageModel
from fewer.model.rope import Rotary
from fewer.model.step import Step
from fewer.slots import KVCache

ALWAYS, ONE_LEVEL = HydragenConfig(split="always"), HydragenConfig(levels=1, split="always")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Settings:
    """Lengths are tokens."""

    rows: tuple[int, ...] = (1, 4, 16, 64)  # of the batch, attention alone
    prefixes: tuple[int, ...] = (256, 512, 1024, 2048)
    suffixes: tuple[int, ...] = (16, 512)
    batch: int = 32  # end to end
    lengths: tuple[int, ...] = (128, 256, 512, 1024)
    problem: int = 128  # two levels: examples, then problems with samples
    samples: int = 8
    rounds: int = 5
    answer: int = 24  # greedy text
    models: tuple[str, ...] = ("smollm2", "qwen-coder-0.5b", "gemma3-270m")


QUICK = Settings((2, 8), (64, 128), (16,), 4, (64, 128), 32, 4, 2, 4, ("smollm2",))


def in_turn(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median processor seconds of each call, after one that warms up; what they read has left the caches."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    flush = torch.zeros(1 << 24)
    for _ in range(rounds + 1):
        for name, call in calls.items():
            flush.add_(1.0)
            start = time.process_time()
            call()
            taken[name].append(time.process_time() - start)
    return {name: statistics.median(times[1:]) for name, times in taken.items()}


@torch.inference_mode()
def one_layer(
    heads: int, kv_heads: int, head_dim: int, batch: int, prefix: int, suffix: int, rounds: int
) -> dict[str, Any]:
    """One layer's attention of one new token a row, in the shapes of a model."""
    q, scale = torch.randn(batch, heads, 1, head_dim), head_dim**-0.5
    shared = torch.randn(2, 1, kv_heads, prefix, head_dim)
    own = torch.randn(2, batch, kv_heads, suffix, head_dim)
    k, v = torch.cat([shared.expand(-1, batch, -1, -1, -1), own], 3)
    # [2, B or 1, Hk, S, D] in pages of 16 tokens -> [2, pages, Hk, 16, D]
    pages = torch.cat([part.unflatten(3, (-1, 16)).movedim(3, 2).flatten(1, 2) for part in (shared, own)], 1)
    first = torch.arange(prefix // 16).expand(batch, -1)
    table = torch.cat([first, prefix // 16 + torch.arange(batch * suffix // 16).view(batch, -1)], 1).int()
    lengths, pointers = torch.full((batch,), prefix + suffix), torch.tensor([0, batch])

    def hydragen() -> Tensor:
        out, lse = attend_prefix(
            q[:, :, 0], shared[0], shared[1], torch.tensor([[0]]), torch.tensor([prefix]), pointers, scale
        )
        return merge([attention_part(q, own[0], own[1], scale), (out[:, :, None], lse[..., None])])[0]

    calls: dict[str, Callable[[], Tensor]] = {
        "hydragen": hydragen,
        "tiled": lambda: attention(q, k, v, scale),
        "paged": lambda: paged_attention(q, pages[0], pages[1], table, lengths, scale),
    }
    error = max(float((hydragen() - calls[name]()).abs().max()) for name in ("tiled", "paged"))
    times = in_turn(calls, rounds)
    return {
        "rows": batch,
        "prefix": prefix,
        "suffix": suffix,
        "largest_difference": error,
        "milliseconds": {name: 1000 * seconds for name, seconds in times.items()},
        "ratio": times["tiled"] / times["hydragen"],
        "ceiling": batch * (prefix + suffix) / (prefix + batch * suffix),
    }


class NoAttentionLayer(StoredLayer):
    """The upper bound of the paper: the output is the query."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, rotary: Rotary | None, step: Step) -> Tensor:
        self.cache.plan_for(self.slots, step)
        return q


class NoAttentionCache(FullCache):
    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.layers = [NoAttentionLayer(self, layer.index, layer.slots, False) for layer in self.layers]
        self._point_layers()


def new_session(model: LanguageModel, kind: Any, batch: int, capacity: int, *settings: Any) -> Session:
    cache: KVCache = kind(model.config, batch, capacity, torch.float32, CPU, *settings)
    return Session(model.runner, cache)


def tiled_session(model: LanguageModel, prefix: Sequence[int], suffixes: list[list[int]], spare: int) -> Session:
    """`full` with the prefix copied into every row, and the suffixes fed."""
    batch, length = len(suffixes), len(prefix)
    one = new_session(model, FullCache, 1, length)
    one.prefill([list(prefix)])
    session = new_session(model, FullCache, batch, length + len(suffixes[0]) + spare)
    cache: Any = session.cache
    for kind, (slots, alone) in enumerate(zip(cache.maps, one.cache.maps, strict=True)):  # type: ignore[attr-defined]
        cache.pools[kind][..., :length, :] = one.cache.pools[kind][..., :length, :]  # type: ignore[attr-defined]
        slots.table[:, :length] = alone.table[:, :length]
        slots.counts = [length] * batch
    cache.committed = [length] * batch
    session.prefill(suffixes)
    return session


def decode_times(sessions: dict[str, Session], rounds: int) -> dict[str, float]:
    batch = len(next(iter(sessions.values())).lengths)
    return in_turn({name: partial(session.decode, [11] * batch) for name, session in sessions.items()}, rounds)


def end_to_end(model: LanguageModel, words: list[int], settings: Settings) -> list[dict[str, Any]]:
    """Decoding of a batch behind a longer and longer prefix."""
    batch, suffixes = settings.batch, [words[16 * row : 16 * row + 16] for row in range(settings.batch)]
    suffixes = [[100 + row, *suffix[1:]] for row, suffix in enumerate(suffixes)]
    spare, found = settings.rounds + 2, []
    for length in settings.lengths:
        prompts = [words[:length] + suffix for suffix in suffixes]
        capacity = length + 16 + spare
        sessions = {
            "hydragen": new_session(model, HydragenCache, batch, capacity, ALWAYS),
            "paged": new_session(model, PagedCache, batch, capacity),
            "no attention": new_session(model, NoAttentionCache, batch, capacity),
        }
        for name, session in sessions.items():
            session.prefill(suffixes if name == "no attention" else prompts)
        sessions["full"] = tiled_session(model, words[:length], suffixes, spare)
        times = decode_times(sessions, settings.rounds)
        token = model.config.kv_bytes_per_token(4)
        found.append(
            {"rows": batch, "prefix": length, "suffix": 16}
            | {"tokens_per_second": {name: batch / seconds for name, seconds in times.items()}}
            | {"cache_bytes": {n: s.cache.nbytes for n, s in sessions.items() if n != "no attention"}}
            | {"once_bytes": (length + batch * (16 + spare)) * token, "tiled_bytes": batch * capacity * token}
        )
    return found


def two_levels(model: LanguageModel, words: list[int], settings: Settings) -> dict[str, Any]:
    """Examples that all rows share, problems that their samples share: against one level, which keeps the problem once
    a sample. Times are of everything: prefill, and as many steps as the problem has eighths."""
    examples, problems = words[: 2 * settings.problem], 4
    batch, steps = problems * settings.samples, settings.problem // 8
    texts = [[200 + i, *words[500 * i : 500 * i + settings.problem - 1]] for i in range(problems)]
    prompts = [examples + texts[row // settings.samples] for row in range(batch)]
    length, found = len(prompts[0]), {}
    for name, chosen in (("two levels", ALWAYS), ("one level", ONE_LEVEL)):
        session = new_session(model, HydragenCache, batch, length + steps, chosen)
        start = time.process_time()
        session.prefill(prompts)
        middle = time.process_time()
        taken = []
        for _ in range(steps):
            begin = time.process_time()
            session.decode([11] * batch)
            taken.append(time.process_time() - begin)
        found[name] = {
            "prefill_seconds": middle - start,
            "step_seconds": statistics.median(taken),
            "seconds": time.process_time() - start,
            "cache_bytes": session.cache.nbytes,
        }
    shape = {"rows": batch, "samples": settings.samples, "examples": len(examples), "problem": settings.problem}
    return shape | {"steps": steps} | found


def prefill(model: LanguageModel, words: list[int], settings: Settings) -> dict[str, Any]:
    """The prompts of eight rows, each from its first token on."""
    length = settings.lengths[-2]
    prompts = [[*words[:length], 300 + row, *words[:15]] for row in range(8)]
    seconds = {}
    for name, kind in (("hydragen", HydragenCache), ("paged", PagedCache), ("full", FullCache)):
        session = new_session(model, kind, 8, length + 16)
        start = time.process_time()
        session.prefill(prompts)
        seconds[name] = time.process_time() - start
    return {"rows": 8, "prefix": length, "suffix": 16, "seconds": seconds}


def one_row(model: LanguageModel, words: list[int], settings: Settings) -> dict[str, float]:
    """Nothing is shared: the same steps as `full`. Seconds of sixteen steps of one row."""
    sessions = {"hydragen": new_session(model, HydragenCache, 1, 512), "full": new_session(model, FullCache, 1, 512)}
    for session in sessions.values():
        session.prefill([words[:64]])

    def steps(session: Session) -> None:
        for _ in range(16):
            session.decode([11])

    return in_turn({name: partial(steps, session) for name, session in sessions.items()}, 3 * settings.rounds)


def greedy_text(model: LanguageModel, words: list[int], settings: Settings) -> list[dict[str, Any]]:
    """The answers of ragged prompts on three levels, with at most one, two and three of them shared."""
    root = words[: (model.config.sliding_window or 0) + 100]
    left, right, deep = words[300:360], words[400:450], words[200:240]
    prompts = [root + left + deep + words[7:9], root + left + deep + [5], root + left + words[30:41], words[80:90]]
    prompts += [root + right + words[20:24], root + right + words[60:63], root + words[90:99]]

    def answers(kind: Any, *chosen: Any) -> list[list[int]]:
        session = new_session(model, kind, len(prompts), max(map(len, prompts)) + settings.answer, *chosen)
        rows: list[list[int]] = [[] for _ in prompts]
        for event in generate(session, prompts, SamplingConfig(), max_tokens=settings.answer):
            rows[event.row] += event.tokens
        return rows

    wanted, found = answers(FullCache), []
    for levels in (1, 2, 3):
        texts = answers(HydragenCache, HydragenConfig(levels, split="always"))
        equal = sum(a == b for a, b in zip(texts, wanted, strict=True))
        found.append({"levels": levels, "rows": len(prompts), "equal_rows": equal, "tokens": settings.answer})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short: does everything work?")
    parser.add_argument("--out", type=Path, default=RESULTS / "cache_hydragen.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    settings = QUICK if options.quick else Settings()
    report: dict[str, Any] = {"machine": machine(CPU), "dtype": "float32", "settings": asdict(settings), "greedy": {}}
    report["clock"] = "processor seconds of one thread"
    for name in settings.models:
        model = fewer.load(name, weights="dense", dtype="float32", device="cpu")
        words = repeat_to([token for text in built_in_prompts() for token in model.encode(text, raw=True)], 4096)
        if name == settings.models[0]:
            config = model.config
            shape = config.heads, config.kv_heads, config.head_dim
            cost = split_cost(*shape, torch.float32, CPU)
            pays = {b: next((p for p in range(1, 4096) if cost.pays(b, p)), None) for b in (2, 4, 8, 16, 32, 64)}
            report["gate"] = {**asdict(cost), "shortest_prefix_that_pays": pays}
            cells = [(b, p, s) for b in settings.rows for p in settings.prefixes for s in settings.suffixes]
            report["attention"] = [one_layer(*shape, *cell, settings.rounds) for cell in cells]
            report["one_row_seconds"] = one_row(model, words, settings)
            report["two_levels"] = two_levels(model, words, settings)
            report["prefill"] = prefill(model, words, settings)
            report["decoding"] = end_to_end(model, words, settings)
        report["greedy"][name] = greedy_text(model, words, settings)
        write(options.out, report)
        print(f"{name}: measured", flush=True)


if __name__ == "__main__":
    main()
