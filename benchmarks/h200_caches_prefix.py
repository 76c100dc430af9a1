"""A prefix under many rows: attention alone, and decoding end to end, shared, paged and copied."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks import h200_caches_steps as steps
from benchmarks.h200_caches_bench import Bench
from benchmarks.h200_caches_methods import shape_of
from benchmarks.h200_report import Results
from benchmarks.h200_timing import seconds_in_graph, synchronize
from fewer.cache.full import FullCache
from fewer.cache.hydragen import HydragenCache
from fewer.cache.paged import PagedCache
from fewer.cache.stored import StoredCache
from fewer.engine.session import Session
from fewer.kernels.attention import attention, merge
from fewer.kernels.list_attention import attend_list
from fewer.kernels.shared_prefix import attend_prefix

PAGE = 64
SUFFIX = 16  # tokens of its own that a row brings
STEPS, WARM_UP = 32, 4  # the first ones are not counted
LIMIT = 6.0  # seconds of decoding after which a case ends


def attention_alone(bench: Bench) -> Results:
    """One layer, one new token in each of 1,024 rows of `suffix` tokens behind one prefix, three ways.

    "paged" is what a cache that stores the prefix once and reads it for every row does; "copied" is PyTorch's attention
    over a prefix that every row holds.
    """
    config, device = bench.config, bench.device
    batch, prefix, suffix = (4, 2 * PAGE, PAGE) if bench.tiny else (1024, 16384, PAGE)
    heads, kv_heads, head_dim = config.heads, config.kv_heads, config.head_dim
    scale, pages = head_dim**-0.5, prefix // PAGE
    shape = pages + batch, kv_heads, PAGE, head_dim
    keys, values = (torch.empty(shape, dtype=torch.bfloat16, device=device).normal_() for _ in "kv")
    q = torch.randn(batch, heads, head_dim, device=device).bfloat16()
    shared = torch.arange(pages, dtype=torch.int32, device=device)
    own = pages + torch.arange(batch, dtype=torch.int32, device=device)[:, None]  # [B, 1] pages

    def filled(count: int, value: int) -> Tensor:
        return torch.full((count,), value, dtype=torch.int32, device=device)

    pointers = torch.tensor([0, batch], dtype=torch.int32, device=device)
    one, ends, totals = filled(1, prefix), filled(batch, suffix), filled(batch, prefix + suffix)
    everything = torch.cat((shared.expand(batch, -1), own), 1)

    def by_prefix() -> Tensor:
        ours = attend_list(q, keys, values, own, None, None, "page", ends, scale)
        part, lse = attend_prefix(q, keys, values, shared[None], one, pointers, scale)
        parts = [(ours.out[:, :, None], ours.lse[..., None]), (part[:, :, None], lse[..., None])]
        return merge(parts)[0][:, :, 0]

    def by_row() -> Tensor:
        return attend_list(q, keys, values, everything, None, None, "page", totals, scale).out

    repeats = 1 if bench.tiny else 4
    found: Results = {
        "batch": batch, "prefix": prefix, "suffix": suffix,
        "largest_difference": float((by_prefix() - by_row()).abs().max()),
        "shared_seconds": seconds_in_graph([by_prefix] * repeats),
        "prefix_part_seconds": seconds_in_graph(
            [partial(attend_prefix, q, keys, values, shared[None], one, pointers, scale)] * repeats
        ),
        "paged_seconds": seconds_in_graph([by_row] * repeats),
        "copied_bytes": 2.0 * batch * kv_heads * (prefix + suffix) * head_dim * 2,
    }  # fmt: skip
    try:
        found["copied_seconds"] = _copied(q, kv_heads, prefix + suffix, scale)
    except torch.OutOfMemoryError:
        found["copied_seconds"] = "out of memory"
    return found


def _copied(q: Tensor, kv_heads: int, tokens: int, scale: float) -> float:
    batch, _, head_dim = q.shape
    shape = batch, kv_heads, tokens, head_dim
    keys, values = (torch.empty(shape, dtype=q.dtype, device=q.device).normal_() for _ in "kv")
    return seconds_in_graph([lambda: attention(q[:, :, None], keys, values, scale)], 3)


# ── end to end ───────────────────────────────────────────────────────────────────────────────────────────────────────


def cases(bench: Bench) -> list[tuple[int, int]]:
    """Batches and prefixes."""
    if bench.tiny:
        return [(3, 32), (3, 64)]
    return [(batch, prefix) for batch in (256, 1024) for prefix in (1024, 4096, 16384)]


def decoding(bench: Bench, way: str, batch: int, prefix: int) -> Results:
    """Tokens a second of all rows, and what the cache holds: `way` is hydragen, paged or full."""
    make: dict[str, Callable[[Bench, int, int], tuple[Session, int]]] = {
        "hydragen": _hydragen, "paged": _paged, "full": _full,
    }  # fmt: skip
    runner = bench.runner(bench.config)
    runner.decoder.graphs.clear()
    bench.collect()
    room = _room(bench)
    token = shape_of(bench.config).token_bytes
    found: Results = {"batch": batch, "prefix": prefix, "copied_bytes": float(batch * (prefix + SUFFIX + room) * token)}
    try:
        synchronize()
        start = time.perf_counter()
        session, suffix = make[way](bench, batch, prefix)
        synchronize()
        found["prefill_seconds"] = time.perf_counter() - start
        found |= {"suffix": suffix, "once_bytes": float((prefix + batch * (suffix + room)) * token)}
        found |= _decode(bench, session)
        found["cache_bytes"] = session.cache.nbytes
        found["attention_seconds"] = steps.attention_alone(session, 3)
    except torch.OutOfMemoryError:
        found["failed"] = "out of memory"
    return found


def _decode(bench: Bench, session: Session) -> Results:
    """All rows feed their most likely tokens, as `generate` does."""
    decoder, batch = steps.decoder_of(session), len(session.lengths)
    before, warm_up = (decoder.captured, decoder.refused), 1 if bench.tiny else WARM_UP
    tokens, taken = [0] * batch, []
    synchronize()
    begin = moment = time.perf_counter()
    for _ in range(_room(bench)):
        tokens = session.decode(tokens).argmax(-1).tolist()
        taken.append(time.perf_counter() - moment)
        moment = time.perf_counter()
        if len(taken) > warm_up + 2 and moment - begin > LIMIT:
            break
    seconds = statistics.median(taken[warm_up:])
    ran = {"captured": decoder.captured - before[0], "general": decoder.refused - before[1]}
    return {"seconds": seconds, "steps": len(taken) - warm_up, "tokens_per_second": batch / seconds, "ran": ran}


def _room(bench: Bench) -> int:
    """Tokens that are decoded in each row."""
    return 2 if bench.tiny else STEPS + WARM_UP


def _prompts(bench: Bench, batch: int, prefix: int, suffix: int) -> list[Tensor]:
    """One prefix, and behind it random tokens, of which the first differ as far as the vocabulary allows."""
    config = bench.config
    shared = bench.prompt(prefix, config)
    generator = torch.Generator().manual_seed(2)
    own = torch.randint(0, config.vocab_size, (batch, suffix), generator=generator)
    own[:, 0] = torch.arange(batch) % config.vocab_size
    return [torch.cat((shared, row)) for row in own]


def _session(bench: Bench, cache: object) -> Session:
    return Session(bench.runner(bench.config), cache)  # type: ignore[arg-type]


def _hydragen(bench: Bench, batch: int, prefix: int) -> tuple[Session, int]:
    capacity = prefix + SUFFIX + _room(bench)
    cache = HydragenCache(bench.config, batch, capacity, torch.bfloat16, bench.device)
    session = _session(bench, cache)
    session.prefill(_prompts(bench, batch, prefix, SUFFIX))
    return session, SUFFIX


def _paged(bench: Bench, batch: int, prefix: int) -> tuple[Session, int]:
    """The prefix is computed and stored once, and read for every row. Rows bring one token of their own: a prompt's
    step of several would gather all pages in front of a mask, which is slower and is not what is measured."""
    capacity = prefix + SUFFIX + _room(bench)
    cache = PagedCache(bench.config, batch, capacity, torch.bfloat16, bench.device)
    session = _session(bench, cache)
    session.prefill(_prompts(bench, batch, prefix, 1))
    return session, 1


def _full(bench: Bench, batch: int, prefix: int) -> tuple[Session, int]:
    """Every row holds the prompt; its keys are computed once and copied."""
    room, length = _room(bench), prefix + SUFFIX
    cache = FullCache(bench.config, batch, length + room, torch.bfloat16, bench.device)
    single = _session(bench, FullCache(bench.config, 1, length, torch.bfloat16, bench.device))
    single.prefill([_prompts(bench, 1, prefix, SUFFIX)[0]])
    _copy(single.cache, cache, length)  # type: ignore[arg-type]
    return _session(bench, cache), SUFFIX


def _copy(source: StoredCache, target: StoredCache, length: int) -> None:
    """The one row of `source` into every row of `target`."""
    for slots, ours, theirs in zip(target.maps, target.pools, source.pools, strict=True):
        ours[..., :length, :] = theirs[..., :length, :]
        slots.table[:, :length] = torch.arange(length, device=target.device)
        slots.counts = [length] * target.batch
    target.committed = [length] * target.batch
