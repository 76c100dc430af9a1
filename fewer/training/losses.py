"""Losses: next-token cross-entropy, distillation by KL divergence, distance of hidden states. All in float32, in nats.

Distillation: Distilling the Knowledge in a Neural Network, arXiv 1503.02531; the reverse direction as in MiniLLM,
arXiv 2306.08543.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional

from fewer.errors import UsageError


def next_token_loss(logits: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of -log p(token t+1 | tokens 0..t): logits [B, T, V], tokens [B, T], mask [B, T] bool = tokens scored."""
    targets = tokens[:, 1:]
    losses = functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten(), reduction="none")
    return _mean(losses.view(targets.shape), None if mask is None else mask[:, 1:])


def distillation(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    direction: Literal["forward", "reverse"] = "forward",
    mask: Tensor | None = None,
) -> Tensor:
    """T²·KL between softmax(teacher / T) and softmax(student / T), mean over positions: logits [.., V], mask [..] bool.

    "forward" is KL(teacher ‖ student), which covers all that the teacher may say; "reverse" is KL(student ‖ teacher),
    which stays where the teacher is sure. T² keeps the gradient's size when T changes.
    """
    if temperature <= 0:
        raise UsageError(f"a distillation temperature of {temperature} is not allowed: use a number above 0")
    log_student = (student.float() / temperature).log_softmax(-1)
    log_teacher = (teacher.float() / temperature).log_softmax(-1)
    if direction == "forward":
        divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(-1)
    elif direction == "reverse":
        divergence = (log_student.exp() * (log_student - log_teacher)).sum(-1)
    else:
        raise UsageError(f"unknown direction '{direction}' of distillation: use forward or reverse")
    return _mean(divergence, mask) * temperature**2


def hidden_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared distance of hidden states [.., d], over the teacher's mean square: zeros would score 1."""
    distance = _mean((student.float() - teacher.float()).square().mean(-1), mask)
    return distance / _mean(teacher.float().square().mean(-1), mask).clamp_min(1e-12)


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return values.mean()
    weights = mask.to(values.dtype)
    return (values * weights).sum() / weights.sum().clamp_min(1.0)
