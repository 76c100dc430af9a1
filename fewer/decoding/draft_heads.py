"""Heads that turn [h; o] into logits, one for each offset: h is the target's last hidden state, o what a drafter
computed for the offset.

    shared   logits = W_lm (o + U_k D_k [h; o])     U_k [d, r] zero at first, D_k [r, 2d]; W_lm is the target's
    own      logits = A_k [h; o]                    A_k [V', 2d], at first [W_lm | W_lm]

`shared` is ours, for small models, whose head outweighs their layers: it begins as the target's head on o.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from fewer.decoding.draft_layer import product
from fewer.decoding.frozen_target import FrozenTarget

HeadKind = Literal["shared", "own"]


class OffsetHeads(nn.Module):
    def __init__(self, target: FrozenTarget, count: int, kind: HeadKind, rank: int):
        super().__init__()
        self.target, self.kind = target, kind
        width = target.config.hidden_size
        if kind == "own":
            weight = target.head.dequantize(torch.float32)
            self.weight = nn.Parameter(torch.cat((weight, weight), dim=1).repeat(count, 1, 1))  # [n, V', 2d]
        else:
            self.down = nn.Parameter(torch.randn(count, rank, 2 * width) * (2 * width) ** -0.5)
            self.up = nn.Parameter(torch.zeros(count, width, rank))

    def forward(self, offset: int, h: Tensor, o: Tensor) -> Tensor:
        """h and o [.., d] -> the logits of guess number `offset` [.., V'] float32."""
        both = torch.cat((h, o), dim=-1)
        if self.kind == "own":
            return self.target.scaled(product(both, self.weight[offset]).float())
        return self.target.logits(o + product(product(both, self.down[offset]), self.up[offset]).to(o.dtype))
