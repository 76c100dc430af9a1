"""The gated feed-forward block: down(activation(gate(x)) · up(x))."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from fewer.model.linear import Linear


def gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": gelu_tanh,
}


@dataclass(slots=True)
class FeedForward:
    gate_up: Linear  # gate's rows, then up's
    down: Linear
    activation: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., d] -> [..., d]."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(self.activation(gate) * up)

    @property
    def nbytes(self) -> int:
        return self.gate_up.nbytes + self.down.nbytes
