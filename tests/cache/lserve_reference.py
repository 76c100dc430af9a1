"""What LServe promises, spelled out: every key stays, and each head of each query sees the positions that the paper
names. One row, one query and one head at a time, in float64; it shares only the rounding of rows with the cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewer.cache.lserve import LServeConfig
from fewer.cache.quantised_pages import RowLayout
from fewer.model.config import ModelConfig
from fewer.model.rope import Rotary
from fewer.model.step import Step


class LServeReference:
    """A KVCache of one row. `retrieval` [layers, Hk] bool."""

    slack: int | None = 0
    renumbers = False
    keys_rotated = True
    max_step: int | None = None
    nbytes = 0

    def __init__(self, config: ModelConfig, settings: LServeConfig, retrieval: Tensor):
        self.config, self.settings, self.retrieval = config, settings, retrieval
        self.count = 0
        self.generated = False  # some token was: the prefill window no longer holds
        self.layers = [ReferenceLayer(self, index) for index in range(config.layers)]

    @property
    def lengths(self) -> list[int]:
        return [self.count]

    @property
    def physical_lengths(self) -> list[int]:
        return [self.count]

    def positions(self, row: int, layer: int = 0) -> Tensor:
        return torch.arange(self.count)

    def commit(self, kept: Sequence[int] | Sequence[Sequence[int]]) -> None:
        (n,) = kept
        self.count += n if isinstance(n, int) else len(n)

    def truncate(self, row: int, length: int) -> None:
        self.count = length

    def reserve(self, tokens: int) -> None: ...


class ReferenceLayer:
    def __init__(self, cache: LServeReference, index: int):
        self.cache, self.index = cache, index
        self.exact: Tensor | None = None  # [2, Hk, S, D] rotated keys and values, as they came …
        self.stored: Tensor | None = None  # … and as they are stored
        self.lists: dict[int, list[int]] = {}  # query head -> pages
        self.choices = 0  # how often its first head chose

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, rotary: Rotary | None, step: Step) -> Tensor:
        cache, count = self.cache, self.cache.count
        if rotary is not None:
            q, k = rotary.apply(q, step.positions), rotary.apply(k, step.positions)
        new = torch.cat((k, v))
        rounded = RowLayout(k.shape[3], cache.settings.bits, k.dtype).round_trip(new)
        self.exact = new if self.exact is None else torch.cat((self.exact[:, :, :count], new), 2)
        self.stored = rounded if self.stored is None else torch.cat((self.stored[:, :, :count], rounded), 2)
        cache.generated = cache.generated or step.role == "generated"
        out = torch.zeros_like(q)
        for place in range(q.shape[2]):
            for head in range(q.shape[1]):
                query = q[0, head, place].double()
                seen = self._seen(count + place, head, query, step)
                keys, values = self.stored[:, head // (q.shape[1] // k.shape[1]), seen].double()
                scores = keys @ query * cache.config.scale
                if cap := cache.config.attention_softcap:
                    scores = (scores / cap).tanh() * cap
                out[0, head, place] = (scores.softmax(0) @ values).float()
        return out

    def skip(self, nothing: Tensor, step: Step) -> None:
        raise NotImplementedError

    def _seen(self, at: int, head: int, query: Tensor, step: Step) -> list[int]:
        settings, config = self.cache.settings, self.cache.config
        key_head, everything = head // (config.heads // config.kv_heads), range(at + 1)
        if config.is_sliding(self.index):
            assert config.sliding_window is not None
            return [j for j in everything if at - j < config.sliding_window]
        if not self.cache.retrieval[self.index, key_head]:
            window = settings.window if self.cache.generated else settings.prefill_window
            return [j for j in everything if j < settings.sinks or at - j < window]
        if step.role == "prompt" or at <= settings.budget:
            self.lists.pop(head, None)
            return list(everything)
        if at % settings.interval == 0 or head not in self.lists:
            self.lists[head] = self._choose(at, key_head, query)
            self.choices += head == 0
        return [j for j in everything if j // settings.page_size in self.lists[head]]

    def _choose(self, at: int, key_head: int, query: Tensor) -> list[int]:
        assert self.exact is not None
        settings, size = self.cache.settings, self.cache.settings.page_size
        keys, worth = self.exact[0, key_head].double(), []
        for page in range(at // size):
            parts = keys[page * size : (page + 1) * size].split(settings.logical_size)
            worth.append(max(float(torch.maximum(query * part.amax(0), query * part.amin(0)).sum()) for part in parts))
        best = sorted(range(len(worth)), key=lambda page: -worth[page])
        return [*best[: max(3, settings.budget // size) - 1], at // size]
