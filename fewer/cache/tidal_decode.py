"""TidalDecode: a few layers read everything and find the best tokens; the layers behind each read only those.

Paper: TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention, arXiv 2410.05076.
Differs from the paper: the newest token always is in the set (its simulation lets it compete); models with grouped
queries work, with a set for each query head as in its accuracy code or, on request, one for the heads that share keys;
layers with a sliding window of the model's own stay as they are; the re-selection layer of a model is fitted by recall
(`fewer train tidal-decode`); several re-selection layers may be named. Keys are corrected one row after the
other between two steps, not beside them.

Layer by layer, for each token that is generated (prompts are read with full attention, and nothing leaves memory):

    0 … start-1     o = softmax(q·K)·V
    start, r        the same, and ρ = the `budget` tokens with the highest q·K, for each head
    the others      o = softmax(q·K[ρ])·V[ρ]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fewer.cache.selected import (
    SelectedCache,
    SelectedLayer,
    Selection,
    Sets,
    check_budget,
    check_start,
    selecting_layers,
)
from fewer.cache.slot_map import SLACK, SlotMap
from fewer.cache.tidal_calibration import TidalFitConfig, fit_reselection
from fewer.errors import CheckpointError, UsageError
from fewer.kernels.new_tokens import NewTokens
from fewer.model.config import ModelConfig
from fewer.registry import method
from fewer.slots import Ahead, Capture
from fewer.training import Adapter


@dataclass(frozen=True)
class TidalDecodeConfig:
    budget: int = 256  # tokens that a query head attends to in sparse layers, the newest included
    start: int = 2  # first layers that read everything; the next one reads everything and selects
    reselect: str = "fitted"  # layers that select again: fitted, none, every, or numbers such as 13 or 9+17
    sets: Sets = "query-head"  # a set for each query head, or one for those of a key head together
    correct_every: int = 0  # generated tokens after which their keys are computed again densely; 0: never
    adapter: str | None = None  # file of a fitted re-selection layer; none: the one for the model

    def __post_init__(self) -> None:
        check_budget("tidal-decode", self.budget)
        check_start("tidal-decode", self.start)
        if self.correct_every < 0:
            raise UsageError(f"tidal-decode: correct_every={self.correct_every} is negative: use 0 for never, or more")
        if self.reselect not in ("fitted", "none", "every") and not all(map(str.isdecimal, self.reselect.split("+"))):
            raise UsageError(
                f"tidal-decode: reselect={self.reselect} is not allowed: use fitted, none, every, or layer numbers "
                "joined by +, such as 9+17"
            )
        if self.adapter is not None and self.reselect != "fitted":
            raise UsageError(
                f"tidal-decode: reselect={self.reselect} and an adapter both say where to select again: give one"
            )

    @property
    def wants_adapter(self) -> bool:
        return self.reselect == "fitted"


class TidalSelectLayer(SelectedLayer):
    """Reads everything, and says which tokens were best."""

    cache: TidalDecodeCache

    def attend_some(self, q: Tensor, selection: Selection, mask: Tensor | None) -> Tensor:
        out, scores = self.scored(q, selection, mask)
        settings = self.cache.settings
        selection.chosen = self.best(scores, selection, settings.budget, settings.sets)
        return out


class TidalSparseLayer(SelectedLayer):
    """Reads the tokens that an earlier layer found best."""

    def is_ready(self, selection: Selection) -> bool:
        return selection.chosen is not None  # a layer plan may have skipped the layer that selects

    def choose(self, q: Tensor, selection: Selection, mask: Tensor | None) -> Tensor:
        assert selection.chosen is not None
        return selection.chosen


@method(
    "tidal-decode",
    slot="cache",
    paper="2410.05076",
    lossless=False,
    config=TidalDecodeConfig,
    fit=fit_reselection,
    fit_config=TidalFitConfig,
)
class TidalDecodeCache(SelectedCache):
    """Keeps everything; a generated token reads all of it in `start` layers and wherever sets are chosen."""

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        settings: TidalDecodeConfig = TidalDecodeConfig(),
        *,
        adapter: Adapter | None = None,
    ):
        self.settings = settings
        self.selecting = _selecting(config, settings, adapter)

        def make_layer(cache: SelectedCache, index: int, slots: SlotMap) -> SelectedLayer | None:
            if index in self.selecting:
                return TidalSelectLayer(cache, index, slots, renumber=False)
            return TidalSparseLayer(cache, index, slots, renumber=False) if index > self.first else None

        super().__init__("tidal-decode", config, batch, capacity, dtype, device, settings.budget, make_layer)
        if self.slack is not None and settings.correct_every > self.slack:
            raise UsageError(
                f"tidal-decode: correct_every={settings.correct_every} is too long for a model with sliding windows, "
                f"whose cache can take back {SLACK} tokens: use {SLACK} or less"
            )
        self._sparse: list[list[int]] = [[] for _ in range(batch)]  # tokens since the first that was read sparsely

    @property
    def first(self) -> int:
        """The first layer that selects; without any, all layers read everything."""
        return self.selecting[0] if self.selecting else self.config.layers

    def ahead(self) -> Ahead | None:
        """Tokens that are to be computed again are noted step by step."""
        return None if self.settings.correct_every else super().ahead()

    def selecting_capture(self) -> Capture | None:
        (pool,) = self.pools
        by_head = self.config.heads if self.settings.sets == "query-head" else self.config.kv_heads
        shape = self.batch, by_head, self.budget  # of what a selecting layer leaves for those behind it
        key = pool.data_ptr(), pool.shape, pool.dtype, self.row_table.data_ptr(), tuple(self.selecting), shape
        return Capture(key, partial(self._launch, pool, shape))

    def _launch(self, pool: Tensor, shape: tuple[int, int, int], layer: int, new: NewTokens) -> None:
        from fewer.kernels.triton import attention_decode, chosen_tokens  # where there is a GPU, there is Triton

        keys, values = pool[layer]
        if layer < self.first:
            attention_decode.attend_new(new, keys, values)
            return
        chosen = new.workspace.take("chosen tokens", shape, torch.int32)
        attend = chosen_tokens.attend_and_choose if layer in self.selecting else chosen_tokens.attend_chosen
        attend(new, keys, values, self.row_table, chosen)

    def commit(self, kept: Sequence[int | Sequence[int]]) -> None:
        self._note(kept)
        super().commit(kept)

    def truncate(self, row: int, length: int) -> None:
        dropped = max(0, self.committed[row] - length)
        super().truncate(row, length)
        del self._sparse[row][max(0, len(self._sparse[row]) - dropped) :]

    def due(self) -> list[list[int]] | None:
        """The last tokens of each row whose keys are to be computed again densely; None: it is not time yet."""
        every = self.settings.correct_every
        if not every or max(map(len, self._sparse)) < every:
            return None
        return [list(tokens) if len(tokens) >= every else [] for tokens in self._sparse]

    def before_due(self, row: int) -> int | None:
        every, noted = self.settings.correct_every, len(self._sparse[row])
        if not every:
            return None
        whole = 0 if noted else max(0, self.settings.budget - self.committed[row])  # tokens that read everything
        return whole + every - (noted if noted < every else 0)

    def _note(self, kept: Sequence[int | Sequence[int]]) -> None:
        """Remember the step's tokens, from the first on that was read sparsely."""
        step = self._step
        if not self.settings.correct_every or step is None:
            return
        if step.tokens is None:  # soft tokens cannot be fed again from here: what lies before them stays as it is
            self._sparse = [[] for _ in self._sparse]
            return
        if not self._selects and not any(self._sparse):
            return
        for row, (of_row, choice) in enumerate(zip(step.tokens.tolist(), kept, strict=True)):
            added = of_row[:choice] if isinstance(choice, int) else [of_row[index] for index in choice]
            if not self._sparse[row]:  # those that the budget holds have read everything
                added = added[max(0, self.settings.budget - self.committed[row]) :] if self._selects else []
            self._sparse[row] += added


def _selecting(config: ModelConfig, settings: TidalDecodeConfig, adapter: Adapter | None) -> list[int]:
    """The layers that select, ascending. Raises UsageError for layers that cannot, CheckpointError for an adapter
    that names none."""
    able = selecting_layers(config, settings.start)
    if not able:
        return []
    if settings.reselect == "every":
        return able
    again: list[int] = []
    if settings.reselect == "fitted":
        if adapter is None:
            raise UsageError(
                "tidal-decode: no re-selection layer was fitted: run `fewer train tidal-decode`, or name one with "
                "reselect="
            )
        fitted = adapter.tensors.get("reselect")
        if fitted is None or not set(fitted.flatten().tolist()) <= set(range(config.layers)):
            raise CheckpointError(
                f"tidal-decode: the adapter names no layer of this model, which has {config.layers}: fit it again"
            )
        again = [layer for layer in fitted.flatten().tolist() if layer > able[0]]
    elif settings.reselect != "none":
        again = [int(number) for number in settings.reselect.split("+")]
        wrong = [layer for layer in again if layer not in able[1:]]
        if wrong:
            allowed = f"choose from layers {', '.join(map(str, able[1:]))}" if able[1:] else "use reselect=none"
            raise UsageError(f"tidal-decode: layer {wrong[0]} cannot select again in this model: {allowed}")
    return sorted({able[0], *again})
