"""One decoder layer that drafts: of the target's shape, with weights of its own, for training and for drafting.

It has the target's heads, rotation and kind of feed-forward block; norms of queries and keys, windows, biases and caps
are left out. Training runs all positions at once (`branch_attention`), drafting one position after the other over a
`DraftCache`; both compute the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewer.formats import Int8Format, WeightFormat
from fewer.formats.int8 import VECTOR
from fewer.kernels.attention import attention
from fewer.model.config import ModelConfig
from fewer.model.feed_forward import ACTIVATIONS
from fewer.model.norm import rms_norm
from fewer.model.rope import Rotary

Matrix = Tensor | WeightFormat


def drawn(rows: int, columns: int, scale: float = 1.0) -> nn.Parameter:
    """A fresh matrix [rows, columns] whose products have the size of their input, times `scale`."""
    return nn.Parameter(torch.randn(rows, columns) * (scale * columns**-0.5))


def product(x: Tensor, weight: Matrix) -> Tensor:
    """x [.., K] times weight [N, K] -> [.., N], in the weight's dtype."""
    return functional.linear(x.to(weight.dtype), weight) if isinstance(weight, Tensor) else weight.matmul(x)


def narrow(network: nn.Module) -> None:
    """Round what is drafted with to 8 bits: a single row's product takes the time of reading the matrix. Matrices
    [N, K] become formats, and stacks of them [n, N, K] lists."""
    for module in network.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight.dim() > 1 and name != "bias" and weight.shape[-1] % VECTOR == 0:
                delattr(module, name)
                parts = [Int8Format.from_dense(part.float()) for part in (weight if weight.dim() == 3 else [weight])]
                setattr(module, name, parts if weight.dim() == 3 else parts[0])


class DraftLayer(nn.Module):
    """x [.., d] -> x + attention + feed-forward block."""

    def __init__(self, config: ModelConfig, intermediate: int, input_norm: bool = True):
        """`intermediate`: width of the feed-forward block. `input_norm`: what attention reads is normed first."""
        super().__init__()
        self.config = config
        width, query, key = config.hidden_size, config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.sizes = query, key, key
        self.attention_norm = nn.Parameter(torch.ones(width)) if input_norm else None
        self.q: Matrix = drawn(query, width)
        self.kv: Matrix = drawn(2 * key, width)
        self.o: Matrix = drawn(width, query, 0.5)
        self.feed_forward_norm = nn.Parameter(torch.ones(width))
        self.gate_up: Matrix = drawn(2 * intermediate, width)
        self.down: Matrix = drawn(width, intermediate, 0.5)
        rotary_dim = config.rotary_dim or config.head_dim
        self.rotary = Rotary(rotary_dim, config.head_dim, config.rope_theta, config.context_length, config.rope_scaling)
        self.scale = config.head_dim**-0.5

    def project(self, x: Tensor) -> Tensor:
        """x [.., d] -> queries, keys and values side by side [.., (H + 2 Hk) D], not rotated."""
        x = self._normed(x, self.attention_norm)
        return torch.cat((product(x, self.q), product(x, self.kv)), dim=-1)

    def keys_values(self, x: Tensor) -> Tensor:
        """x [.., d] -> keys and values alone [.., 2 Hk D]."""
        return product(self._normed(x, self.attention_norm), self.kv)

    def heads(self, projected: Tensor, positions: Tensor, kinds: str = "qkv") -> list[Tensor]:
        """projected [B, T, ..], positions [B, T] -> for each letter of `kinds` [B, heads, T, D], q and k rotated."""
        sizes = [self.sizes["qkv".index(kind)] for kind in kinds]
        found = []
        for kind, part in zip(kinds, projected.split(sizes, dim=-1), strict=True):
            heads = part.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
            found.append(heads if kind == "v" else self.rotary.apply(heads, positions))
        return found

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """x [B, T, d] and what attention found [B, H, T, D] -> the layer's output [B, T, d]."""
        x = x + product(attended.transpose(1, 2).flatten(2), self.o)
        gate, up = product(self._normed(x, self.feed_forward_norm), self.gate_up).chunk(2, dim=-1)
        return x + product(ACTIVATIONS[self.config.activation](gate) * up, self.down)

    def _normed(self, x: Tensor, gain: Tensor | None) -> Tensor:
        if gain is None:
            return x
        if torch.is_grad_enabled() and gain.requires_grad:  # also where x, a true hidden state, wants no gradient
            values = x.float()
            return (values * (values.square().mean(-1, keepdim=True) + self.config.norm_eps).rsqrt() * gain).to(x.dtype)
        return rms_norm(x, gain.float(), self.config.norm_eps, x.dtype)


def branch_attention(
    q: Tensor, causal: Sequence[tuple[Tensor, Tensor]], own: Sequence[tuple[Tensor, Tensor]], scale: float
) -> Tensor:
    """Attention of R branches at once: row i of q [B, H, R, D] -> [B, H, R, D].

    Keys and values come in blocks of R rows [B, Hk, R, D]. Of a `causal` block row i sees rows 0..i, of an `own` block
    row i alone: what its branch has drafted.
    """
    batch, heads, rows, width = q.shape
    keys = torch.cat([k for k, _ in causal], dim=2)
    grouped = q.view(batch, keys.shape[1], -1, rows, width)  # [B, Hk, G, R, D]
    lower = torch.ones(rows, rows, dtype=torch.bool, device=q.device).tril().repeat(1, len(causal))
    scores = (grouped @ keys[:, :, None].transpose(-1, -2)).float().mul(scale).masked_fill(~lower, float("-inf"))
    drafted = [(grouped * k[:, :, None]).float().sum(-1, keepdim=True) * scale for k, _ in own]
    weights = torch.cat([scores, *drafted], dim=-1).softmax(-1).to(q.dtype)
    out = weights[..., : scores.shape[-1]] @ torch.cat([v for _, v in causal], dim=2)[:, :, None]
    for place, (_, v) in enumerate(own):
        out = out + weights[..., scores.shape[-1] + place, None] * v[:, :, None]
    return out.reshape(batch, heads, rows, width)


class DraftCache:
    """Keys and values of one sequence: those of committed tokens, and behind them those of the draft under way."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device):
        self.keys = torch.empty(1, config.kv_heads, 256, config.head_dim, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        self.committed = 0  # slots
        self.used = 0

    def append(self, k: Tensor, v: Tensor, commit: bool = False) -> None:
        """k (rotated) and v [1, Hk, n, D]. What is committed takes the place of the draft."""
        start = self.committed if commit else self.used
        stop = start + k.shape[2]
        if stop > self.keys.shape[2]:
            more = max(stop, 2 * self.keys.shape[2])
            self.keys, self.values = (_grown(part, start, more) for part in (self.keys, self.values))
        self.keys[:, :, start:stop], self.values[:, :, start:stop] = k, v
        self.used = stop
        if commit:
            self.committed = stop

    def forget_draft(self) -> None:
        self.used = self.committed

    def mask(self, seen: Sequence[Sequence[int]]) -> Tensor | None:
        """For each row the draft's slots that it sees -> [m, n] bool, or None where a single row sees them all."""
        drafted = self.used - self.committed
        if len(seen) == 1 and len(seen[0]) == drafted:
            return None
        mask = torch.zeros(len(seen), drafted, dtype=torch.bool)
        for row, slots in enumerate(seen):
            mask[row, list(slots)] = True
        return mask.to(self.keys.device)

    def attend(self, q: Tensor, scale: float, sees: Tensor | None = None) -> Tensor:
        """q [1, H, m, D] -> [1, H, m, D]. All see what is committed; of the draft's n slots row i sees those that
        `sees` [m, n] bool says, by default all."""
        keys, values = self.keys[:, :, : self.used], self.values[:, :, : self.used]
        mask = None if sees is None else functional.pad(sees, (self.committed, 0), value=True)
        return attention(q, keys, values, scale, mask)


def _grown(part: Tensor, kept: int, slots: int) -> Tensor:
    larger = part.new_empty(*part.shape[:2], slots, part.shape[3])
    larger[:, :, :kept] = part[:, :, :kept]
    return larger
