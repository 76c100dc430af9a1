"""`Step`: everything one forward pass over T new tokens needs, and `Output`, what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from fewer.model.rope import Rotary

MaskKind = Literal["causal", "bidirectional", "tree"]
Role = Literal["prompt", "generated"]


@dataclass(slots=True)
class Step:
    """One forward pass over T new tokens of B sequences.

    Rows may be ragged: row b has `lengths[b]` new tokens, left-aligned; the rest is padding that nothing attends to.
    """

    tokens: Tensor | None  # [B, T] int64, or None when `embeddings` is given
    positions: Tensor  # [B, T] int64 absolute positions (a tree node: committed length + depth, not its slot)
    role: Role = "prompt"
    embeddings: Tensor | None = None  # [B, T, d] soft tokens, instead of `tokens`
    lengths: Sequence[int] | None = None  # new tokens of each row; None: T for all
    mask: MaskKind = "causal"
    ancestors: Tensor | None = None  # [B or 1, T, T] bool for "tree": [b, i, j] = j is i or an ancestor of i
    layer_plan: Tensor | None = None  # [B, T, L] bool: which layers run for a token; None: all
    taps: Sequence[int] = ()  # hidden states to return: 0 = embeddings, i = after layer i
    logits: Literal["last", "all", "none"] = "last"  # "last" = the last valid token of each row
    hidden: bool = False  # the final norm's output of all T tokens, whatever logits are asked for


@dataclass(slots=True)
class Output:
    """`logits` [B, V] for "last", [B, T, V] for "all", float32; `hidden` after the final norm, the same tokens."""

    logits: Tensor | None
    hidden: Tensor | None = None  # [B, d] for "last", [B, T, d] for "all" and where the step asks for `hidden`
    taps: dict[int, Tensor] = field(default_factory=dict)  # layer -> [B, T, d]


class LayerCache(Protocol):
    """What a layer asks of its cache; `fewer.slots.KVCache` is the whole seam."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, rotary: Rotary | None, step: Step) -> Tensor:
        """q [B, H, T, D], k and v [B, Hk, T, D] before rotation, x [B, T, d] the normed input -> [B, H, T, D]."""
        ...

    def skip(self, nothing: Tensor, step: Step) -> None:
        """No token of this step runs the layer: their slots hold nothing that may be attended to. `nothing` is zeros
        [B, Hk, T, D]."""
        ...


class LayerCaches(Protocol):
    @property
    def layers(self) -> Sequence[LayerCache]: ...
