"""Where TidalDecode selects again: the layer whose best tokens are those of most layers behind it.

Source: TidalDecode, arXiv 2410.05076, section 3.3 (one re-selection layer, the same for all tasks). The recipe is ours:
texts with a passkey are prefilled, the answer is fed token by token, and every layer says which tokens it would choose
while all of them read everything. With overlap[a, b] = |chosen(a) ∩ chosen(b)| / budget, mean over tokens and heads,

    recall(r) = mean over sparse layers l of overlap[source(l), l],    source(l) = the last selecting layer before l

and the best r is kept; of equals, the first.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from fewer.cache.selected import SelectedCache, SelectedLayer, Selection, check_budget, check_start, selecting_layers
from fewer.engine.session import Session
from fewer.errors import UsageError
from fewer.training import Adapter, FittedModel, Haystack, StepRecord, TrainingRun, TrainingText
from fewer.training.passkeys import hidden_answer, question


@dataclass(frozen=True)
class TidalFitConfig:
    contexts: int = 20  # texts with a passkey each
    held_out: int = 4  # more texts, on which the chosen layer's recall is measured
    length: int = 2048  # tokens of a text, at most the model's context
    tokens: int = 16  # of the answer, fed one at a time
    budget: int = 256  # tokens that a query head would attend to
    start: int = 2  # first layers that read everything
    seed: int = 0  # of passkeys, depths and places in the text

    def __post_init__(self) -> None:
        check_budget("fitting tidal-decode", self.budget)
        check_start("fitting tidal-decode", self.start)
        for name in ("contexts", "held_out", "tokens"):
            if getattr(self, name) < 1:
                raise UsageError(f"fitting tidal-decode: {name}={getattr(self, name)}: use 1 or more")
        if self.length <= self.budget:
            raise UsageError(
                f"fitting tidal-decode: texts of {self.length} tokens leave nothing to choose with a budget of "
                f"{self.budget}: use longer ones"
            )


class RecordingLayer(SelectedLayer):
    """Reads everything, and keeps which tokens it would have chosen."""

    cache: RecordingCache

    def attend_some(self, q: Tensor, selection: Selection, mask: Tensor | None) -> Tensor:
        out, scores = self.scored(q, selection, mask)
        self.cache.chosen[self.index] = self.best(scores, selection, self.cache.budget, "query-head")
        return out


class RecordingCache(SelectedCache):
    """Full attention that says, for the newest token, what each layer without a window would choose."""

    def __init__(self, model: FittedModel, capacity: int, budget: int):
        self.chosen: dict[int, Tensor] = {}  # layer -> [B·T, H, budget] slots
        transformer = model.transformer
        super().__init__(
            "tidal-decode",
            model.config,
            1,
            capacity,
            transformer.dtype,
            transformer.device,
            budget,
            lambda cache, index, slots: RecordingLayer(cache, index, slots, renumber=False),
        )

    def overlap(self) -> Tensor:
        """Share of the tokens chosen by layer a among those chosen by layer b, of the newest token, mean over heads:
        [n, n] float64 for the n layers without a window."""
        sets = torch.stack([self.chosen[layer] for layer in sorted(self.chosen)]).long()  # [n, 1, H, budget]
        marked = torch.zeros(*sets.shape[:3], int(sets.max()) + 1)
        marked.scatter_(3, sets.cpu(), 1.0)
        flat = marked.flatten(1)
        return (flat @ flat.t()).double() / sets[0].numel()


def fit_reselection(model: FittedModel, data: TrainingText, config: TidalFitConfig, run: TrainingRun) -> Adapter:
    """Tensors: `reselect` [1] int64; `overlap` [n, n] float32 and `recall` [n] float32 (of r, zeros where r cannot be)
    for the n layers without a window, which `layers` [n] int64 numbers."""
    layers = selecting_layers(model.config, 0)
    first = next((at for at, layer in enumerate(layers) if layer >= config.start), len(layers))
    if len(layers) - first < 3:
        raise UsageError(
            f"fitting tidal-decode: this model has {len(layers)} layers with full attention, too few to select twice "
            "and save something: use cache=full"
        )
    haystack = Haystack(data.text, model.tokenizer)
    total = config.contexts + config.held_out
    found: list[Tensor] = []
    for number in range(total):
        found.append(_context_overlap(model, haystack, config, number))
        if run.on_step is not None:
            missed = 1 - float(recall(torch.stack(found).mean(0), first).max())
            run.on_step(StepRecord(number + 1, missed, learning_rate=0.0, gradient_norm=0.0), total)
    fitted, held_out = (torch.stack(part).mean(0) for part in (found[: config.contexts], found[config.contexts :]))
    recalls = recall(fitted, first)
    best = max(range(len(layers)), key=lambda at: (float(recalls[at]), -at))
    metrics = {
        "recall": float(recall(held_out, first)[best]),
        "recall_without": float(recall_with(held_out, [first])),
    }
    tensors = {
        "reselect": torch.tensor([layers[best]]),
        "layers": torch.tensor(layers),
        "overlap": fitted.float(),
        "recall": recalls.float(),
    }
    return run.adapter(tensors, metrics)


def recall(overlap: Tensor, first: int) -> Tensor:
    """overlap [n, n] -> recall(r) [n] when layers `first` and r select, 0 for r that leave nothing to select for."""
    layers = len(overlap)
    of = torch.zeros(layers, dtype=overlap.dtype)
    for again in range(first + 1, layers - 1):
        of[again] = recall_with(overlap, [first, again])
    return of


def recall_with(overlap: Tensor, selecting: list[int]) -> Tensor:
    """Mean recall of the sparse layers when these select, ascending: a scalar."""
    sparse = [layer for layer in range(selecting[0], len(overlap)) if layer not in selecting]
    sources = [max(source for source in selecting if source < layer) for layer in sparse]
    return overlap[sources, sparse].mean()


@torch.inference_mode()
def _context_overlap(model: FittedModel, haystack: Haystack, config: TidalFitConfig, number: int) -> Tensor:
    """Mean overlap [n, n] over the fed tokens of one text."""
    generator = random.Random(f"{config.seed}/tidal-decode/{number}")
    length = min(config.length, model.context_length)
    asked = question("passkey", generator, config.tokens)
    hidden = hidden_answer(haystack, asked, generator.random(), length, generator.randrange(len(haystack)))
    cache = RecordingCache(model, length, config.budget)
    session = Session(model.runner, cache, model.context_length)
    session.prefill([hidden.prompt])
    found = []
    for token in hidden.answer[: config.tokens]:
        session.decode([token])
        found.append(cache.overlap())
    return torch.stack(found).mean(0)
