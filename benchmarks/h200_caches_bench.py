"""Measuring one cache at one context: the model that stays on the GPU, the sizes, and what a section records."""

from __future__ import annotations

import gc
import time
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from benchmarks import h200_caches_methods as methods
from benchmarks import h200_caches_steps as steps
from benchmarks import h200_models as models
from benchmarks.h200_caches_bytes import floor_seconds
from benchmarks.h200_caches_methods import Kind, shape_of
from benchmarks.h200_report import Results
from fewer.cache.full import FullCache
from fewer.cache.selected import SelectedCache
from fewer.cache.stored import StoredCache
from fewer.engine.session import Session
from fewer.kernels.causal import causal_attention
from fewer.model.config import ModelConfig

LLAMA_2_7B = ModelConfig(
    architecture="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008, layers=32, heads=32, kv_heads=32,
    head_dim=128, context_length=4096, rope_theta=10000.0,
)  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """Tokens, but for the last lines."""

    context: int = 262144  # the long one
    medium: int = 65536
    short: int = 16384
    shortest: int = 4096
    many_heads: int = 102400  # context of the model with a key head for every query head
    budget: int = 4096  # of TidalDecode
    small_budget: int = 256
    kept: int = 1024  # of what evicts
    room: int = 512  # that a cache has space for behind its prompt: one that grows would need a new graph
    warm_up: int = 8  # steps that are not counted
    steps: int = 64
    layers: int = 32

    @classmethod
    def of(cls, context: int, layers: int, steps: int) -> Sizes:
        """The usual ones, cut to a shorter `context`."""
        short = min(cls.short, context // 2)
        return cls(
            context, min(cls.medium, context), short, short // 4, min(cls.many_heads, context), steps=steps,
            layers=layers,
        )  # fmt: skip


TINY_SIZES = Sizes(160, 96, 64, 48, 96, 32, 16, 32, room=32, warm_up=0, steps=4, layers=4)
TINY = replace(models.TINY, vocab_size=40, hidden_size=32, intermediate_size=32, head_dim=16)


class Bench:
    """One model at a time, and the dense session whose prompt other caches adopt."""

    def __init__(self, device: torch.device, tiny: bool, sizes: Sizes, rate: float, flops: float, stop: float):
        """`rate` in bytes a second, `flops` a second; `stop`: when no section starts any more (`time.monotonic`)."""
        self.device, self.tiny, self.sizes, self.stop = device, tiny, sizes, stop
        self.rate, self.flops = rate, flops
        self.prefill_limit = 90.0  # seconds
        self.pdl: bool | None = None
        self.dense: Session | None = None
        self._runner: steps.ClockedRunner | None = None

    @property
    def config(self) -> ModelConfig:
        return self._with_layers(TINY if self.tiny else models.LLAMA_8B)

    @property
    def many_headed(self) -> ModelConfig:
        return self._with_layers(replace(TINY, kv_heads=TINY.heads) if self.tiny else LLAMA_2_7B)

    def _with_layers(self, config: ModelConfig) -> ModelConfig:
        return replace(config, layers=self.sizes.layers, context_length=self.sizes.context + 2 * self.sizes.room)

    def runner(self, config: ModelConfig) -> steps.ClockedRunner:
        """Of the model with this config, whose weights stay until another is asked for."""
        if self._runner is None or self._runner.config != config:
            self.release()
            self._runner = steps.ClockedRunner(models.random_model(config, "dense", self.device), self.pdl)
            if self.tiny:
                self._runner.chunk = 64  # so that prompts come in chunks
        return self._runner

    def release(self) -> None:
        """Frees the model and whatever lies on it."""
        self._runner = self.dense = None
        self.collect()

    def collect(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def session(self, kind: Kind, context: int, config: ModelConfig | None = None, batch: int = 1) -> Session:
        runner = self.runner(config or self.config)
        runner.decoder.graphs.clear()  # those of sessions that are gone
        self.collect()
        cache = kind.make(runner.config, batch, context + self.sizes.room, runner.dtype, runner.device)
        return Session(runner, cache)

    def prompt(self, tokens: int, config: ModelConfig) -> Tensor:
        return torch.randint(0, config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(1))

    # ── sections ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def measure(self, kind: Kind, context: int, config: ModelConfig | None = None) -> tuple[Results, Session]:
        """Prefill, decoding, attention alone and bytes at one context."""
        config = config or self.config
        self.warm_up(kind, context, config)
        session = self.session(kind, context, config)
        limit = min(self.prefill_limit, max(5.0, self.stop - time.monotonic()))
        found: Results = {"prefill": steps.prefill(session, self.prompt(context, config), limit)}
        return found | self.decoding(kind, session, context), session

    def warm_up(self, kind: Kind, context: int, config: ModelConfig) -> None:
        """Two chunks through a cache of the same kind: kernels are compiled, and libraries have chosen theirs."""
        session = self.session(kind, context, config)
        chunk = session.runner.chunk
        session.prefill([self.prompt(min(context, 2 * chunk), config)])
        if self.device.type == "cuda" and context > chunk:
            self._meet_every_length(config, context, chunk)

    def _meet_every_length(self, config: ModelConfig, context: int, chunk: int) -> None:
        """cuDNN makes a plan for every power of two of chunks, and the merge is compiled for every number of parts."""
        group, dim = config.heads // config.kv_heads, config.head_dim
        for heads in (4, 5):  # a cache may split them, and an odd number is another case to the compiler
            q = torch.zeros(1, heads * group, chunk, dim, dtype=torch.bfloat16, device=self.device)
            k = torch.zeros(1, heads, context, dim, dtype=torch.bfloat16, device=self.device)
            for chunks in (1, 2, 3, 4, 5, 8, 16, 32):
                seen = k[:, :, : chunks * chunk]
                if seen.shape[2] == chunks * chunk:
                    causal_attention(q, seen, seen, 1.0)

    def decoding(self, kind: Kind, session: Session, context: int) -> Results:
        """Steps of a session that has read its prompt."""
        cache = session.cache
        found: Results = {"context": session.lengths[0], "settings": kind.settings}
        if session.lengths[0] < context and isinstance(cache, FullCache):
            steps.fill(cache, context)
            found |= {"context": context, "filled": "random keys, where the prompt ended early"}
        shape, config = shape_of(session.config), session.config
        found["decode"] = steps.decode(session, 0, self.sizes.warm_up, self.sizes.steps, kind.interval)
        found["cache_bytes"] = cache.nbytes
        found["attention"] = steps.attention(session, kind.interval)
        model = session.runner.model
        weights = model.nbytes - (0 if config.tied_embeddings else model.embed.nbytes)
        read = kind.read_bytes(shape, int(str(found["context"])))
        found |= {"weight_bytes": weights, "read_bytes": read, "floor_seconds": floor_seconds(weights, read, self.rate)}
        found["attention_floor_seconds"] = read / self.rate
        if self.device.type == "cuda":
            found["peak_bytes"] = torch.cuda.max_memory_allocated(self.device)
        return found

    def results(self, kind: Kind, context: int) -> Results:
        """What `measure` found; the session is gone."""
        return self.measure(kind, context)[0]

    def measure_dense(self, context: int, config: ModelConfig) -> Results:
        """Dense attention; the session stays, with its prompt alone, for what adopts it."""
        found, session = self.measure(methods.dense(), context, config)
        session.rollback([context])
        self.dense = session
        return found

    def adopted(self, kind: Kind, context: int, config: ModelConfig) -> Results:
        """A cache that begins with what the dense one holds, since prompts leave the same in both."""
        runner = self.runner(config)
        if self.dense is None or self.dense.lengths != [context]:
            self.measure_dense(context, config)
        assert self.dense is not None and isinstance(self.dense.cache, StoredCache)
        session = self.session(kind, context, config)
        assert isinstance(session.cache, SelectedCache) and session.runner is runner
        session.cache.adopt(self.dense.cache)
        return {"prefill": "adopted from the dense cache, which does the same"} | self.decoding(kind, session, context)

    def products(self) -> Results:
        """A pass without attention, in a graph: what is left of a step when attention costs nothing."""
        return {"seconds": steps.products_alone(self.runner(self.config))}

    def settings(self) -> Results:
        return asdict(self.sizes)
