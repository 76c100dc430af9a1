"""The share of true attention that chosen pages hold: what `benchmarks.cache_lserve` reports as `mass`.

At equal token budgets: by the size of physical and logical pages, by how many steps a choice serves, and beside the
best pages there are, random ones, and sinks with a window. Mean over layers, query heads and generated tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewer.cache import FullCache
from fewer.cache.page_statistics import PageStatistics, choose_pages, physical_scores
from fewer.cache.stored import StoredLayer
from fewer.engine.session import Session
from fewer.model.rope import Rotary
from fewer.model.step import Step

PAGINGS = {"16/16": (16, 16), "64/16": (64, 16), "64/64": (64, 64)}  # physical and logical page size
SIZES = (16, 64)
INTERVALS = (1, 2, 4, 8, 16)
SINKS = 64  # of the sinks and window that pages are compared with
Shares = dict[str, dict[str, float]]  # by budget, by way of choosing


class RecordingLayer(StoredLayer):
    """Full attention that remembers the rotated queries of generated tokens."""

    queries: list[Tensor]  # [H, D] each

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, rotary: Rotary | None, step: Step) -> Tensor:
        if step.role == "generated":
            self.queries.append((q if rotary is None else rotary.apply(q, step.positions))[0, :, 0].float())
        return super().attend(q, k, v, x, rotary, step)


@torch.inference_mode()
def mass(session: Session, tokens: list[int], budgets: tuple[int, ...]) -> Shares:
    """Over a session with full attention; `tokens` follow its text and are taken back."""
    cache = session.cache
    assert isinstance(cache, FullCache)
    begin, sums = session.lengths[0], {str(budget): dict[str, float]() for budget in budgets}
    for layer in cache.layers:
        layer.__class__ = RecordingLayer
        layer.queries = []  # type: ignore[attr-defined]
    for token in tokens:
        session.decode([token])
    for layer in cache.layers:
        kept: dict[str, Tensor] = {}  # choices that later steps go on with
        for step, q in enumerate(layer.queries):  # type: ignore[attr-defined]
            for budget, found in _step(
                q, layer.keys[0, :, : begin + step + 1].float(), layer.scale, budgets, kept
            ).items():
                for name, share in found.items():
                    sums[budget][name] = sums[budget].get(name, 0.0) + share
        layer.__class__ = StoredLayer
    session.rollback([begin])
    count = len(cache.layers) * len(tokens)
    return {budget: {name: round(total / count, 4) for name, total in found.items()} for budget, found in sums.items()}


def _step(q: Tensor, keys: Tensor, scale: float, budgets: tuple[int, ...], kept: dict[str, Tensor]) -> Shares:
    """q [H, D] over keys [Hk, S, D] of one layer, the newest key last."""
    length, group = keys.shape[1], len(q) // len(keys)
    shares = ((keys.repeat_interleave(group, 0) @ q[..., None])[..., 0] * scale).softmax(-1)  # [H, S]
    by_page = {size: _by_page(shares, size) for size in SIZES}
    scores = {name: page_scores(q, keys, *sizes) for name, sizes in PAGINGS.items()}
    lot = torch.Generator().manual_seed(length)
    result: Shares = {}
    for budget in budgets:
        found = result[str(budget)] = {}
        for name, (size, _) in PAGINGS.items():
            pages = choose_pages(scores[name], torch.tensor([length]), size, budget // size)[0].long()  # [H, K]
            found[name] = _held(by_page[size], pages)
            if name == "64/16":
                for interval in INTERVALS:
                    key = f"{budget}/{interval}"
                    if (length - 1) % interval == 0 or key not in kept:
                        kept[key] = pages
                    found[f"{name} every {interval}"] = _held(by_page[size], kept[key])
                marked = torch.zeros_like(by_page[size]).scatter_(1, pages, 1.0)
                union = marked.unflatten(0, (-1, group)).amax(1).sum(1).mean()
                found["pages of a group over those of a head"] = float(union) / pages.shape[1]
        for size, of_page in by_page.items():
            older, newest = of_page[:, :-1], float(of_page[:, -1].mean())
            best = older.topk(budget // size - 1).values
            drawn = torch.rand(older.shape, generator=lot).topk(budget // size - 1).indices
            found[f"best pages of {size}"] = float(best.sum(1).mean()) + newest
            found[f"random pages of {size}"] = float(older.gather(1, drawn).sum(1).mean()) + newest
        found["sinks and window"] = float((shares[:, :SINKS].sum(1) + shares[:, SINKS - budget :].sum(1)).mean())
    return result


def page_scores(q: Tensor, keys: Tensor, size: int, logical: int) -> Tensor:
    """S [1, H, P] of q [H, D] over keys [Hk, S, D]."""
    length = keys.shape[1]
    pages, slots = -(-length // size), torch.arange(length)
    statistics = PageStatistics(1, pages, len(keys), keys.shape[2], size, logical, torch.float32, keys.device)
    statistics.add(0, keys.transpose(0, 1), statistics.place(slots // size, slots % size))
    table = torch.arange(pages, dtype=torch.int32)[None]
    return physical_scores(statistics.upper_bounds(0, q[None], table, torch.tensor([length])), statistics.parts)


def _by_page(shares: Tensor, size: int) -> Tensor:
    """shares [H, S] -> [H, P] of pages."""
    return torch.nn.functional.pad(shares, (0, -shares.shape[1] % size)).unflatten(1, (-1, size)).sum(-1)


def _held(of_page: Tensor, pages: Tensor) -> float:
    return float(of_page.gather(1, pages).sum(1).mean())
