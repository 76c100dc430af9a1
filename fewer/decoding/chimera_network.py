"""Chimera's network: a trigram encoder, one decoder layer over two kinds of slots, and a head for each offset.

    g_i = W2 (u_i + SiLU(W1 u_i + b1))      u_i = [e(x_{i-2}); e(x_{i-1}); e(x_i)]
    o^0_i: the layer's output at g_{i+1}, which sees h_0 .. h_i and g_1 .. g_{i+1}: a stand-in for h_{i+1}
    o^k_i: at the trigram of the last guess, which sees the same, and o^0 .. o^{k-1} and the trigrams of its own branch
    logits of guess k: head k of [h_i; o^k_i]

W1 is 0 at first, so g begins as a product of the embeddings; by default it has a low rank (`trigram_rank`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewer.decoding.draft_heads import HeadKind, OffsetHeads
from fewer.decoding.draft_layer import DraftLayer, Matrix, branch_attention, drawn, product
from fewer.decoding.draft_training import DraftFitConfig, DraftNetwork, Lesson, classes_of, cross_entropy
from fewer.decoding.frozen_target import FrozenTarget
from fewer.errors import UsageError

MaskKind = Literal["branch", "paper", "code"]


@dataclass(frozen=True)
class ChimeraFitConfig(DraftFitConfig):
    heads: int = 4  # guesses in a row, each with a head
    head: HeadKind = "shared"  # the target's head behind a small product, or a head of its own (V' x 2d each)
    rank: int = 96  # of a shared head's product
    trigram_rank: int = 96  # of the trigram encoder's W1; 0: full, 3d x 3d
    intermediate: int = 0  # of the layer's feed-forward block; 0: the target's, at most twice the hidden size
    distil: float = 1.0  # weight of the distance between o^0 and h in the loss; 0: none, as in the released code
    mask: MaskKind = "branch"  # what later guesses see: their branch, or as in the paper, or as its code does
    trigram: bool = True  # false: the layer is given the last token alone
    layer: bool = True  # false: heads are given the trigram instead of the layer's output

    def __post_init__(self) -> None:
        DraftFitConfig.__post_init__(self)
        if not 1 <= self.heads <= 15:
            raise UsageError(f"chimera: heads={self.heads} is out of range: use 1 to 15")
        if self.rank < 1 or self.trigram_rank < 0 or self.intermediate < 0 or self.distil < 0:
            raise UsageError("chimera: rank is at least 1, and trigram_rank, intermediate and distil are not negative")


class ChimeraNetwork(DraftNetwork):
    def __init__(self, target: FrozenTarget, config: ChimeraFitConfig):
        super().__init__()
        self.target, self.config = target, config
        width = target.config.hidden_size
        self.seen = (3 if config.trigram else 1) * width  # numbers in u
        if config.trigram:
            self.w1_down: Matrix | None = drawn(config.trigram_rank, self.seen) if config.trigram_rank else None
            self.w1: Matrix = nn.Parameter(torch.zeros(self.seen, config.trigram_rank or self.seen))
            self.b1 = nn.Parameter(torch.zeros(self.seen))
        self.w2: Matrix = drawn(width, self.seen)
        if config.layer:
            wide = config.intermediate or min(target.config.intermediate_size, 2 * width)
            self.layer = DraftLayer(target.config, wide)
        self.heads = OffsetHeads(target, config.heads, config.head, config.rank)

    def encode(self, trigrams: Tensor) -> Tensor:
        """Three tokens in a row [.., 3] -> g [.., d]."""
        if not self.config.trigram:
            return product(self.target.embed(trigrams[..., 2]).to(self.dtype), self.w2)
        u = self.target.embed(trigrams).flatten(-2).to(self.dtype)
        inner = u if self.w1_down is None else product(u, self.w1_down)
        return product(u + functional.silu(product(inner, self.w1) + self.b1), self.w2)

    def losses(self, lesson: Lesson) -> dict[str, Tensor]:
        from fewer.training.losses import hidden_mse

        table = self.target.class_of()
        found: dict[str, Tensor] = {}
        for offset, (logits, o) in enumerate(self.stages(lesson)):
            right = lesson.right(offset)
            found[f"guess_{offset}"] = cross_entropy(logits, classes_of(table, right))
            if offset == 0 and self.config.distil:
                found["hidden"] = self.config.distil * hidden_mse(o, lesson.hidden[:, 1:], right >= 0)
        return found

    def guesses(self, lesson: Lesson) -> list[Tensor]:
        return [self.target.tokens(logits.argmax(-1)) for logits, _ in self.stages(lesson)]

    def stages(self, lesson: Lesson) -> Iterator[tuple[Tensor, Tensor]]:
        """(logits [B, R, V'], o [B, R, d]) of each offset, for all rows at once; later ones see the argmax of earlier
        ones, through which no gradient flows."""
        h = lesson.hidden[:, :-1].to(self.dtype)
        two, one = lesson.tokens[:, :-1], lesson.tokens[:, 1:]  # the last two tokens that each row knows
        g = self.encode(leading_trigrams(lesson.tokens)[:, 1:])
        branches = Branches(self.layer, h, self.config.mask) if self.config.layer else None
        for offset in range(self.config.heads):
            o = g if branches is None else branches.attended(g)
            logits = self.heads(offset, h, o)
            yield logits, o
            if offset + 1 < self.config.heads:
                guess = self.target.tokens(logits.detach().argmax(-1))
                g = self.encode(torch.stack((two, one, guess), dim=-1))
                two, one = one, guess
                if branches is not None:
                    branches.stand_in(o.detach())


class Branches:
    """The layer at all rows of a text at once: row i is a branch that knows h_0 .. h_i and x_{i+1}."""

    def __init__(self, layer: DraftLayer, h: Tensor, mask: MaskKind):
        self.layer, self.mask = layer, mask
        self.positions = torch.arange(h.shape[1], device=h.device).expand(h.shape[:2])
        self.states = self._keys_values(h, self.positions)
        self.trigrams: list[tuple[Tensor, Tensor]] = []  # of each stage
        self.stand_ins: list[tuple[Tensor, Tensor]] = []

    def attended(self, g: Tensor) -> Tensor:
        """g [B, R, d] of the next stage -> o [B, R, d]."""
        stage = len(self.trigrams)
        q, k, v = self.layer.heads(self.layer.project(g), self.positions + 1 + stage)
        self.trigrams.append((k, v))
        if self.mask == "branch":
            causal, own = [self.states, self.trigrams[0]], [*self.stand_ins, *self.trigrams[1:]]
        else:  # the trigrams of this stage, of all branches up to one's own
            causal, own = [self.states, (k, v)], self.stand_ins if self.mask == "paper" else []
        return self.layer.finish(g, branch_attention(q, causal, own, self.layer.scale))

    def stand_in(self, o: Tensor) -> None:
        """The last stage's output, where the hidden state that it guesses would be."""
        self.stand_ins.append(self._keys_values(o, self.positions + len(self.trigrams)))

    def _keys_values(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.layer.heads(self.layer.keys_values(x), positions, "kv")
        return k, v


def leading_trigrams(tokens: Tensor) -> Tensor:
    """tokens [B, T] -> the trigram that ends at each [B, T, 3]. The first two are (0, 0, 0) and (0, 1, 1)."""
    first, second = tokens[:, :1], tokens[:, 1:2]
    two = torch.cat((first, first, tokens[:, :-2]), dim=1)[:, : tokens.shape[1]]
    one = torch.cat((first, second, tokens[:, 1:-1]), dim=1)[:, : tokens.shape[1]]
    return torch.stack((two, one, tokens), dim=-1)
