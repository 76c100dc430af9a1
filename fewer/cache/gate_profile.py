"""Gates of key heads without training: how much of a head's attention would lie far back, from mean queries and keys.

A head's mean query looks at its mean key at each of many positions; only the rotary embedding tells these apart. The
gate is the mean of the cumulative attention from the front: near 1 where the weight lies far back, near 0 where it lies
on the last tokens. The paper of DuoAttention (arXiv 2410.10819, ablations) finds that profiles of attention choose
worse heads than distillation, so this is a baseline, and what can be had in seconds. The recipe is that of NVIDIA's
kvpress.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fewer.cache.gate_training import Layers, TeacherLayer
from fewer.errors import UsageError
from fewer.model.rope import Rotary
from fewer.model.step import Step

if TYPE_CHECKING:
    from fewer.training import FittedModel

SAMPLES = 50  # pieces of text …
LENGTH = 128  # … of so many tokens, that means are taken over
POSITIONS = 500  # places of the mean key


class ProfiledLayer(TeacherLayer):
    """Full attention that adds up the queries and keys that pass, before rotation."""

    q: Tensor | float = 0.0  # [H, D]
    k: Tensor | float = 0.0  # [Hk, D]
    rotary: Rotary | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, rotary: Rotary | None, step: Step) -> Tensor:
        self.q, self.k, self.rotary = self.q + q[0].float().mean(1), self.k + k[0].float().mean(1), rotary
        return super().attend(q, k, v, x, rotary, step)

    def gates(self, pieces: int) -> Tensor:
        """[Hk], on the CPU."""
        assert isinstance(self.q, Tensor) and isinstance(self.k, Tensor)
        places = torch.arange(POSITIONS, device=self.k.device)[None]
        query, keys = self.q[None, :, None] / pieces, (self.k / pieces)[None, :, None].expand(-1, -1, POSITIONS, -1)
        if self.rotary is not None:
            query, keys = self.rotary.apply(query, places[:, -1:]), self.rotary.apply(keys.contiguous(), places)
        grouped = query.view(len(self.k), -1, self.config.head_dim)  # [Hk, G, D]
        scores = grouped @ keys[0].transpose(1, 2) * self.config.scale  # [Hk, G, positions]
        return scores.softmax(-1).cumsum(-1).mean((1, 2)).cpu()


@torch.no_grad()
def profiled_gates(model: FittedModel, text: str) -> Tensor:
    """Gates [layers, Hk] of a model, from the text's first tokens. Raises UsageError where it has too few."""
    tokens = model.tokenizer.encode(text[: 16 * SAMPLES * LENGTH])[: SAMPLES * LENGTH]
    pieces = torch.tensor(tokens[: len(tokens) // LENGTH * LENGTH]).view(-1, 1, LENGTH)
    if not len(pieces):
        raise UsageError(f"the text has {len(tokens)} tokens, too few for a profile: give {LENGTH} or more")
    device = model.transformer.device
    layers = [ProfiledLayer(model.config, index) for index in range(model.config.layers)]
    for piece in pieces.to(device):
        step = Step(tokens=piece, positions=torch.arange(LENGTH, device=device)[None], logits="none")
        model.transformer.forward(step, Layers(layers))
    return torch.stack([layer.gates(len(pieces)) for layer in layers])
