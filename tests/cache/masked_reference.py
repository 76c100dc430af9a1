"""Eviction by masks: a cache that drops nothing, hides what a policy would have dropped, and sums every score anew.

Float64, one row, plain formulas: what caches that really drop keys are held against.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fewer.model.config import ModelConfig
from fewer.model.rope import Rotary
from fewer.model.step import Step

Choose = Callable[[Tensor, Tensor], Tensor]
"""Rows of all queries [Hk, n, S] and the keys still alive [Hk, S] bool -> those that stay [Hk, S] bool."""


class MaskedLayer:
    def __init__(self, cache: MaskedCache):
        self.cache = cache
        self.k, self.v = torch.empty(0), torch.empty(0)  # [Hk, S, D] float64, k before rotation
        self.rows = torch.empty(0)  # [Hk, n, S] what every query gave every key, summed over the heads of a group
        self.alive = torch.empty(0)  # [Hk, S] bool

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, rotary: Rotary | None, step: Step) -> Tensor:
        cache = self.cache
        cache.role = step.role
        q, k, v = q[0].double(), k[0].double(), v[0].double()
        heads, new, kv_heads = q.shape[0], q.shape[1], k.shape[0]
        if not len(self.k):
            self.k, self.v = k[:, :0], v[:, :0]
            self.rows, self.alive = torch.zeros(kv_heads, 0, 0).double(), torch.zeros(kv_heads, 0, dtype=torch.bool)
        if cache.prompted and step.role == "generated":
            self.alive = cache.choose(self.rows, self.alive)
        old = self.alive
        self.k, self.v = torch.cat((self.k, k), 1), torch.cat((self.v, v), 1)
        self.alive = torch.cat((old, torch.ones(kv_heads, new, dtype=torch.bool)), 1)
        seen = self.alive[:, None] & torch.ones(new, len(self.alive[0])).tril(old.shape[1]).bool()
        places = torch.arange(len(self.alive[0])).expand(kv_heads, -1)
        if cache.renumber:
            places = self.alive.long().cumsum(1) - 1
        keys = torch.stack([_turn(self.k[h], places[h], rotary) for h in range(kv_heads)])
        q = torch.stack([_turn(q[h], places[h // (heads // kv_heads), -new:], rotary) for h in range(heads)])
        group = heads // kv_heads
        logits = torch.einsum("htd,hsd->hts", q, keys.repeat_interleave(group, 0)) * cache.config.scale
        if cache.config.attention_softcap:
            logits = torch.tanh(logits / cache.config.attention_softcap) * cache.config.attention_softcap
        shares = logits.masked_fill(~seen.repeat_interleave(group, 0), -torch.inf).softmax(-1)
        grown = torch.nn.functional.pad(self.rows, (0, new))
        self.rows = torch.cat((grown, shares.unflatten(0, (kv_heads, group)).sum(1)), 1)
        if cache.stepwise or (step.role == "generated" and cache.while_generating):
            self.alive = cache.choose(self.rows, self.alive)
        return (shares @ self.v.repeat_interleave(group, 0))[None].float()


class MaskedCache:
    """Enough of a KVCache for a `Session` of one row."""

    slack, keys_rotated, renumbers = 0, False, True

    def __init__(
        self,
        config: ModelConfig,
        choose: Choose,
        stepwise: bool = False,
        renumber: bool = False,
        while_generating: bool = True,
    ):
        self.config, self.choose = config, choose
        self.stepwise, self.renumber, self.while_generating = stepwise, renumber, while_generating
        self.max_step = 1 if stepwise else None
        self.layers = [MaskedLayer(self) for _ in range(config.layers)]
        self.lengths, self.prompted, self.role = [0], False, ""
        self.physical_lengths, self.nbytes = [0], 0

    def commit(self, kept: Sequence[int]) -> None:
        self.lengths = [self.lengths[0] + kept[0]]
        if not self.stepwise:
            self.prompted = self.role == "prompt"

    def reserve(self, tokens: int) -> None: ...

    def held(self, layer: int, head: int) -> list[int]:
        return self.layers[layer].alive[head].nonzero()[:, 0].tolist()


def _turn(x: Tensor, places: Tensor, rotary: Rotary | None) -> Tensor:
    """x [S, D] at places [S]."""
    return x if rotary is None else rotary.apply(x[None, None].float(), places[None])[0, 0].double()


def highest(ranking: Tensor, alive: Tensor, budget: int, recent: int = 0) -> Tensor:
    """The `budget` keys of each head that are alive and rank highest; the last `recent` come first."""
    ranking = ranking.masked_fill(~alive, -torch.inf)
    if recent:
        ranking = ranking.clone()
        ranking[:, -recent:] = torch.inf
    stays = torch.zeros_like(alive)
    for head, row in enumerate(ranking):
        order = row.argsort(descending=True)[: min(budget, int(alive[head].sum()))]
        stays[head, order] = True
    return stays


def fading(alpha: float, budget: int, recent: int = 0) -> Choose:
    """A2SF's closed form; α = 1 and half of the budget recent is H2O."""

    def choose(rows: Tensor, alive: Tensor) -> Tensor:
        count = rows.shape[1]
        weights = torch.tensor([alpha ** (count - 1 - q) for q in range(count)], dtype=torch.float64)
        return highest(torch.einsum("q,hqs->hs", weights, rows), alive, budget, recent)

    return choose


def last_row(budget: int) -> Choose:
    """TOVA."""

    def choose(rows: Tensor, alive: Tensor) -> Tensor:
        return highest(rows[:, -1].mean(0).expand(len(rows), -1), alive, budget)

    return choose


def votes(budget: int, window: int, kernel: int) -> Choose:
    """SnapKV with pooling by the mean."""

    def choose(rows: Tensor, alive: Tensor) -> Tensor:
        before = rows[:, -window:].sum(1)[:, :-window]
        reach = kernel // 2
        padded = torch.nn.functional.pad(before, (reach, reach))
        pooled = padded.unfold(1, kernel, 1).mean(-1)
        return highest(torch.cat((pooled, pooled.new_zeros(len(rows), window)), 1), alive, budget, window)

    return choose
