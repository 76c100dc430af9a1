"""DuoAttention: heads that retrieve keep every key; the others keep the first and the most recent ones.

Paper: DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads, arXiv 2410.10819.

Gates that `fewer train duo-attention` learns once a model say which key heads retrieve; the lowest share `sparsity` of
them streams. Keys are stored at their true positions and never turned again.

Differs from the paper:
- Weights stay as they are. Instead of reordering the rows of q, k, v and the columns of o so that retrieval heads come
  first, which fights matrices that are fused or quantised in groups, a layer's heads are gathered by index lists that
  are made once, into two pools in which every layer has a span. The numbers are those of reordered weights.
- `prefill=exact`, the default, shows every query of a streaming head its own window, as in training, however the
  prompt is cut. `prefill=official` is the code's way: a chunk is dense in all heads and sees the sinks and the `window`
  tokens before it, so a prompt shorter than a chunk is dense, and a generated token sees `window` tokens beside itself.
- A chunk is at most what the engine feeds at once (512 tokens on the CPU).
- Streaming heads hold 2 x 16 tokens more than sinks and window, so that drafts can be taken back.
- Layers with a sliding window of the model's own keep that window in all heads, and have no gates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from fewer.cache.gate_training import GateFitConfig, fit_gates
from fewer.cache.head_gates import check_sparsity, gated_layers, gates_of, retrieval_heads
from fewer.cache.slot_map import SlotMap
from fewer.cache.split_heads import SplitHeadCache
from fewer.errors import UsageError
from fewer.model.config import ModelConfig
from fewer.model.step import Step
from fewer.registry import method

if TYPE_CHECKING:
    from fewer.training import Adapter

DRAFTED = 16  # tokens that can be taken back


@dataclass(frozen=True)
class DuoAttentionConfig:
    sparsity: float = 0.5  # share of key heads that stream; the paper takes 0.75 where each query head has its own keys
    sinks: int = 64  # first tokens that a streaming head keeps
    window: int = 256  # most recent tokens that it keeps, the current one included
    prefill: Literal["exact", "official"] = "exact"  # what it sees of a prompt: its window, or chunks that are dense
    chunk: int = 32_000  # most tokens of a prompt that are fed at once
    seed: int = 0  # of the noise that breaks ties between gates
    adapter: str | None = None  # file of the gates; none: those fitted to the model

    def __post_init__(self) -> None:
        check_sparsity("duo-attention: sparsity", self.sparsity)
        if self.sinks < 0:
            raise UsageError(f"duo-attention: sinks={self.sinks} is negative: use 0 or more")
        if self.window < 1:
            raise UsageError(f"duo-attention: window={self.window} keeps nothing: use 1 or more")
        if self.chunk <= DRAFTED:
            raise UsageError(f"duo-attention: chunk={self.chunk} is too small: use {DRAFTED + 1} or more")

    @property
    def wants_adapter(self) -> bool:
        """Without streaming heads no gates are needed."""
        return self.sparsity > 0


class ChunkSlots(SlotMap):
    """Slots of which every query of a prompt's step sees what the step's first one does, and the step itself."""

    by_chunk = True

    def _mask(self, step: Step, new: list[int], width: int, stop: int) -> Tensor:
        if step.role == "prompt" and step.mask == "causal":
            step = replace(step, positions=step.positions[:, :1].expand(-1, width))
        return super()._mask(step, new, width, stop)


@method(
    "duo-attention",
    slot="cache",
    paper="2410.10819",
    lossless=False,
    config=DuoAttentionConfig,
    fit=fit_gates,
    fit_config=GateFitConfig,
)
class DuoAttentionCache(SplitHeadCache):
    """A KVCache of up to three pools: retrieval heads, streaming heads, and layers with a window of their own."""

    slack: int | None = DRAFTED

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        settings: DuoAttentionConfig = DuoAttentionConfig(),
        *,
        adapter: Adapter | None = None,
    ):
        self.settings, self.retrieval = settings, _retrieval_heads(config, settings, adapter)  # [layers, Hk] bool
        official = settings.prefill == "official"
        streaming = (ChunkSlots if official else SlotMap)(
            batch, capacity, device, settings.window + official, settings.sinks, DRAFTED
        )
        windowed = SlotMap(batch, capacity, device, config.sliding_window, 0, DRAFTED)
        split = gated_layers(config)[:, None]
        rules = [
            (SlotMap(batch, capacity, device), self.retrieval & split),
            (streaming, ~self.retrieval),
            (windowed, (~split).expand_as(self.retrieval)),
        ]
        super().__init__(config, batch, dtype, device, rules)
        self.max_step = settings.chunk
        if all(pool.slots.window is None for pool in self.pools):
            self.slack = None


def _retrieval_heads(config: ModelConfig, settings: DuoAttentionConfig, adapter: Adapter | None) -> Tensor:
    if settings.sparsity == 0:
        return torch.ones(config.layers, config.kv_heads, dtype=torch.bool)
    if adapter is None:
        raise UsageError("duo-attention needs the gates of this model: run `fewer train duo-attention` with it first")
    return retrieval_heads(gates_of(adapter, config), settings.sparsity, config, settings.seed)
