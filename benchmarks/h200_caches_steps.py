"""Sessions under a clock: prefill by chunks, greedy decoding step by step, and the two halves of a step by themselves.

What is timed is what a user runs: `Session.prefill` and `Session.greedy`. How each step was run is counted, so that one
that fell back to the general path shows.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.h200_caches_bytes import over_interval
from benchmarks.h200_report import Results
from benchmarks.h200_timing import seconds_in_graph, synchronize
from fewer.cache.stored import StoredCache
from fewer.engine.cuda import CudaDecoder
from fewer.engine.runner import Runner
from fewer.engine.session import Session
from fewer.errors import FewerError
from fewer.kernels.new_tokens import NewTokens
from fewer.model.linear import Linear
from fewer.model.norm import rms_norm
from fewer.model.step import Output, Step
from fewer.model.transformer import Transformer
from fewer.slots import Capture, KVCache


class OutOfTime(FewerError):
    """A prompt that takes longer than a section may."""


class CountingDecoder(CudaDecoder):
    """Counts the steps that caches gave launches for, and those that they left to the general path."""

    def __init__(self, model: Transformer, pdl: bool | None = None):
        super().__init__(model, pdl)
        self.captured = self.refused = 0

    def capture(self, step: Step, cache: object) -> Capture | None:
        found = super().capture(step, cache)
        self.captured += found is not None
        self.refused += found is None
        return found

    def _multiply(
        self, x: Tensor, linear: Linear, out: Tensor, gain: Tensor | None = None, activation: str = "none",
        residual: Tensor | None = None,
    ) -> None:  # fmt: skip
        """On the CPU PyTorch multiplies: the interpreter takes seconds, and products are not what is walked there."""
        if self.on_gpu:
            super()._multiply(x, linear, out, gain, activation, residual)
            return
        normed = x if gain is None else rms_norm(x, gain, self.config.norm_eps, x.dtype)
        found = linear(normed.to(self.model.dtype))
        if activation != "none":
            gate, up = found.chunk(2, -1)
            found = functional.silu(gate) * up
        out.copy_(found if residual is None else residual + found)


class ClockedRunner(Runner):
    """Notes when each chunk of a prompt was done, and gives up a prompt that takes too long."""

    def __init__(self, model: Transformer, pdl: bool | None = None):
        super().__init__(model)
        self.single = None
        self.decoder = self.cuda = CountingDecoder(model, pdl)
        self.chunks: list[tuple[int, float]] = []  # tokens of each chunk, and when it was done
        self.stop = math.inf

    def step(self, step: Step, cache: KVCache) -> Output:
        output = super().step(step, cache)
        if step.role == "prompt":
            synchronize()
            self.chunks.append((step.positions.shape[1], time.perf_counter()))
            if output.logits is None and self.chunks[-1][1] > self.stop:  # the last chunk is no longer worth giving up
                raise OutOfTime("this prompt takes longer than its section may")
        return output


def decoder_of(session: Session) -> CountingDecoder:
    assert isinstance(session.runner, ClockedRunner)
    return session.runner.decoder


# ── prefill ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def prefill(session: Session, prompt: Tensor, limit: float) -> Results:
    """Feed a prompt [n] to the only row, for at most `limit` seconds.

    `at` has the seconds that had gone by at each power of two: what a prompt of that length takes by itself, since
    chunks are the same. A prompt that runs out of time or memory leaves the session with what it had until then.
    """
    runner = session.runner
    assert isinstance(runner, ClockedRunner)
    runner.chunks.clear()
    synchronize()
    start = time.perf_counter()
    runner.stop = start + limit
    found: Results = {}
    try:
        session.prefill([prompt])
    except (OutOfTime, torch.OutOfMemoryError) as error:
        found["failed"] = repr(error)[:200]
    runner.stop = math.inf
    total, at = 0, {}
    for tokens, moment in runner.chunks:
        total += tokens
        at[total] = moment - start
    kept = {str(tokens): seconds for tokens, seconds in at.items() if tokens & (tokens - 1) == 0 or tokens == total}
    last = runner.chunks[-1][1] - start if runner.chunks else None
    return {"tokens": session.lengths[0], "seconds": last, "chunk": runner.chunk, "at": kept} | found


def fill(cache: StoredCache, tokens: int) -> None:
    """Random keys and values up to this many tokens of each row, where a prompt could not be fed to its end."""
    first = min(cache.lengths)
    cache.reserve(tokens)
    for slots, pool in zip(cache.maps, cache.pools, strict=True):
        pool[..., first:tokens, :].normal_()
        slots.table[:, :tokens] = torch.arange(tokens, device=cache.device)
        slots.counts = [tokens] * cache.batch
    cache.committed = [tokens] * cache.batch


# ── decoding ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def decode(session: Session, token: int, warm_up: int, steps: int, interval: int = 1, limit: float = 20.0) -> Results:
    """Greedy decoding of the only row: seconds of a step, from one token's arrival to the next's.

    With an interval, steps whose place in the text it divides choose what the ones behind them use, and `seconds` is
    the average over one; else it is the median. The first `warm_up` steps compile, record graphs and make a first
    choice, and are not counted. After `limit` seconds it ends with a whole interval.
    """
    decoder, first = decoder_of(session), session.lengths[0]
    before, graphs = (decoder.captured, decoder.refused), set(decoder.graphs)
    synchronize()
    moments = [time.perf_counter()]
    for _ in session.greedy(token, warm_up + steps):
        moments.append(time.perf_counter())
        done = len(moments) - 1
        if done >= warm_up + interval and done % interval == 0 and moments[-1] - moments[0] > limit:
            break
    synchronize()
    captured, refused = decoder.captured - before[0], decoder.refused - before[1]
    taken = [late - early for early, late in zip(moments, moments[1:], strict=False)]
    counted = list(enumerate(taken))[warm_up:]
    choosing = [seconds for place, seconds in counted if (first + place) % interval == 0]
    reusing = [seconds for place, seconds in counted if (first + place) % interval]
    found: Results = {
        "steps": len(counted),
        "seconds": statistics.median(choosing),
        "mean_seconds": statistics.fmean(seconds for _, seconds in counted),
        "low_seconds": min(seconds for _, seconds in counted),
        "high_seconds": max(seconds for _, seconds in counted),
        "ran": {"ahead": len(taken) - captured - refused, "captured": captured, "general": refused},
        "new_graphs": len(set(decoder.graphs) - graphs),
    }
    if reusing:
        choice, reuse = statistics.median(choosing), statistics.median(reusing)
        found |= {"choosing_seconds": choice, "reusing_seconds": reuse}
        found["seconds"] = over_interval(choice, reuse, interval)
    return found


# ── the halves of a step ─────────────────────────────────────────────────────────────────────────────────────────────


def new_tokens(decoder: CudaDecoder, lengths: Sequence[int]) -> list[NewTokens]:
    """Every layer's input to its attention, over the decoder's own buffers, which a pass has filled before."""
    config, work = decoder.config, decoder.feed([0] * len(lengths), lengths)
    return [
        NewTokens(
            work.projected, work.inputs[1], work.attended, config.heads, config.kv_heads, config.scale,
            config.attention_softcap, fusion, decoder.workspace, decoder.pdl,
        )
        for fusion in decoder._fusions(max(lengths) + 1)
    ]  # fmt: skip


@torch.inference_mode()
def attention_alone(session: Session, repeats: int = 9) -> float | None:
    """Seconds of the next step's attention in all layers, in a graph of its own: what caches launch, without products.
    None where the cache leaves this step to the general path. The step is given up afterwards."""
    decoder, cache, lengths = decoder_of(session), session.cache, session.lengths
    cache.reserve(max(cache.physical_lengths) + 1)
    if decoder.accepts(cache, len(lengths)):
        capture: Capture | None = cache.contiguous_capture()  # type: ignore[attr-defined]
    else:
        positions = torch.tensor(lengths, device=session.runner.device)[:, None]
        step = Step(tokens=torch.zeros_like(positions), positions=positions, role="generated")
        capture = CudaDecoder.capture(decoder, step, cache)  # not counted
    if capture is None:
        return None
    attend, inputs = capture.attend, new_tokens(decoder, lengths)

    def layers() -> None:
        for layer, new in enumerate(inputs):
            attend(layer, new)

    return seconds_in_graph([layers], repeats)


def attention(session: Session, interval: int) -> Results | None:
    """`attention_alone`, of a step that chooses and of one that reuses where there is an interval."""
    if interval == 1:
        seconds = attention_alone(session)
        return None if seconds is None else {"seconds": seconds}
    apart: dict[str, float] = {}
    while session.lengths[0] % interval:
        session.decode([0])
    for _ in range(2):
        seconds = attention_alone(session)
        if seconds is None:
            return None
        apart["reusing_seconds" if session.lengths[0] % interval else "choosing_seconds"] = seconds
        session.decode([0])
    return {"seconds": over_interval(apart["choosing_seconds"], apart["reusing_seconds"], interval), **apart}


@torch.inference_mode()
def products_alone(runner: ClockedRunner, batch: int = 1) -> float:
    """Seconds of a pass whose attention is left out, in a graph."""
    decoder = runner.decoder
    work = decoder.feed([0] * batch, [0] * batch)
    work.attended.zero_()
    nothing = Capture("nothing", lambda layer, new: None)
    fusions = decoder._fusions(1)
    pass_once: Callable[[], None] = lambda: decoder.forward(work, nothing, fusions)  # noqa: E731
    return seconds_in_graph([pass_once], 9)
