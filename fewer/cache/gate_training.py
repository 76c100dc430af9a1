"""Learning which key heads need the whole past: gates by distillation on passkeys, or from attention profiles.

Paper: DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads, arXiv 2410.10819, section
2.3. Two streams start from the same embeddings and run the ordinary network, through layers that stand where a cache
does. The teacher attends fully and keeps each layer's attention F, without gradients; the student's attention is

    alpha·F + (1 - alpha)·Z      Z: sinks and a window, over the student's own q, k, v;  alpha: one gate a key head

    loss = mean over labelled tokens and channels of (h_teacher - h_student)² + penalty · mean |alpha|

h is what the output head reads, after the final norm. Only the layers·Hk gates are trained; they start at 1, where the
student is the teacher. Differs from the paper: losses are means, as in its code, where the paper writes sums; Z follows
the mask to the token, where the code rounds it to blocks of 128; the haystack is a text of our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from fewer.cache.head_gates import GATES, gated_layers
from fewer.errors import UsageError
from fewer.kernels.attention import attention
from fewer.kernels.sink_window import sink_window_attention
from fewer.model.config import ModelConfig
from fewer.model.norm import rms_norm
from fewer.model.rope import Rotary
from fewer.model.step import LayerCache, Step

if TYPE_CHECKING:
    from fewer.training import Adapter, FittedModel, PasskeyBatch, TrainingRun, TrainingText

LONGEST = 32_000  # tokens of the longest context, where the model's is longer
HELD_OUT = 4  # contexts that are not trained on, for the metrics


@dataclass(frozen=True)
class GateFitConfig:
    recipe: Literal["distillation", "profile"] = "distillation"  # what gates come from; profiles need no training
    steps: int = 2000  # updates, one context each
    learning_rate: float = 0.02  # at the plateau; a fifth of the updates leads up to it, a fifth down
    penalty: float = 0.05  # weight of the mean gate in the loss
    sinks: int = 128  # first tokens that a streaming head sees
    window: int = 256  # most recent tokens that it sees, the current one included
    passkeys: int = 10  # hidden in one context
    words: int = 32  # of each passkey
    shortest: int = 1000  # tokens of the shortest context
    longest: int = 0  # tokens of the longest context; 0: the model's context, or 32000
    lengths: int = 50  # of contexts, evenly spaced
    labels: Literal["tail", "answers"] = "tail"  # tokens that the loss looks at: questions and answers, or answers
    full: Literal["teacher", "student"] = "teacher"  # whose full attention is mixed in; the paper's text: the student's
    seed: int = 0  # of the passkeys

    def __post_init__(self) -> None:
        for name in ("steps", "learning_rate", "window"):
            if getattr(self, name) <= 0:
                raise UsageError(f"gates: {name}={getattr(self, name)} is not allowed: use a number above 0")
        for name in ("penalty", "sinks", "longest"):
            if getattr(self, name) < 0:
                raise UsageError(f"gates: {name}={getattr(self, name)} is negative: use 0 or more")


def fit_gates(model: FittedModel, data: TrainingText, config: GateFitConfig, run: TrainingRun) -> Adapter:
    """The `fit` of methods that split heads: an adapter with the layout of `fewer.cache.head_gates`."""
    if not gated_layers(model.config).any():
        raise UsageError(
            "every layer of this model has a sliding window, so no head keeps the whole past: there is nothing to fit"
        )
    if config.recipe == "profile":
        from fewer.cache.gate_profile import profiled_gates

        gates = profiled_gates(model, data.text)
        return run.adapter({GATES: gates}, {"mean_gate": float(gates[gated_layers(model.config)].mean())})
    return _distil(model, data, config, run)


def _distil(model: FittedModel, data: TrainingText, config: GateFitConfig, run: TrainingRun) -> Adapter:
    from fewer.training import Haystack, PasskeyBatches, PasskeyConfig, TrainerConfig

    longest = config.longest or min(model.context_length, LONGEST)
    contexts = PasskeyConfig(
        config.passkeys, config.words, min(config.shortest, longest), longest, config.lengths, labels=config.labels
    )
    haystack = Haystack(data.text, model.tokenizer)
    gates = nn.Parameter(torch.ones(model.config.layers, model.config.kv_heads, device=model.transformer.device))
    streams = Streams(model, config)
    trainer = TrainerConfig(
        config.steps,
        config.learning_rate,
        schedule="trapezoid",
        warmup=config.steps // 5,
        final=0.1,
        clip=None,
        seed=config.seed,
    )

    def loss(batch: PasskeyBatch) -> dict[str, Tensor]:
        with torch.no_grad():
            gates.clamp_(0, 1)
        return {
            "distillation": streams.distance(batch, gates),
            "penalty": config.penalty * streams.mean_gate(gates),
        }

    run.train({GATES: gates}, loss, PasskeyBatches(haystack, contexts, config.seed), trainer)
    learnt = gates.detach().clamp(0, 1).cpu()
    learnt[~gated_layers(model.config)] = 1.0
    held_out = PasskeyBatches(haystack, contexts, config.seed + 1)
    return run.adapter({GATES: learnt}, streams.metrics([held_out.batch(index) for index in range(HELD_OUT)], learnt))


class Streams:
    """The teacher and the student of one model."""

    def __init__(self, model: FittedModel, config: GateFitConfig):
        self.transformer, self.config, self.fit = model.transformer, model.config, config
        self.gated = gated_layers(model.config).to(model.transformer.device)

    def distance(self, batch: PasskeyBatch, gates: Tensor) -> Tensor:
        """Mean square of what tells the student from the teacher, over labelled tokens and channels: a scalar."""
        tokens, device = batch.tokens, self.transformer.device
        step = Step(
            tokens=tokens.to(device),
            positions=torch.arange(tokens.shape[1], device=device)[None],
            taps=(self.config.layers,),
            logits="none",
        )
        teachers = [TeacherLayer(self.config, layer) for layer in range(self.config.layers)]
        with torch.no_grad():
            wanted = self._hidden(step, teachers)
        students = [
            StudentLayer(teacher, of_layer, self.fit) for teacher, of_layer in zip(teachers, gates, strict=True)
        ]
        found = self._hidden(step, students)
        labelled = batch.labels.to(device)
        return (wanted - found)[labelled].square().mean()

    def mean_gate(self, gates: Tensor) -> Tensor:
        """Mean of |alpha| over the layers that have gates."""
        return gates[self.gated].abs().mean()

    @torch.no_grad()
    def metrics(self, batches: list[PasskeyBatch], gates: Tensor) -> dict[str, float]:
        """On contexts that were not trained on: the distance, and that of a student whose heads all stream."""
        device = self.transformer.device
        learnt, none = gates.to(device), torch.zeros_like(gates, device=device)
        split = gates[self.gated.cpu()]
        return {
            "distillation": _mean([self.distance(batch, learnt) for batch in batches]),
            "all_streaming": _mean([self.distance(batch, none) for batch in batches]),
            "mean_gate": float(split.mean()),
            "share_above_half": float((split > 0.5).float().mean()),
        }

    def _hidden(self, step: Step, layers: Sequence[LayerCache]) -> Tensor:
        """[1, T, d] float32 after the final norm."""
        last = self.transformer.forward(step, Layers(layers)).taps[self.config.layers]
        return rms_norm(last.float(), self.transformer.norm, self.config.norm_eps, torch.float32)


@dataclass(frozen=True)
class Layers:
    """What the network takes for a cache."""

    layers: Sequence[LayerCache]


class TeacherLayer:
    """Full attention, or the window of a model that has one; what it gave is kept."""

    def __init__(self, config: ModelConfig, index: int):
        self.config = config
        self.window = config.sliding_window if config.is_sliding(index) else None
        self.output = torch.empty(0)  # [1, H, T, D]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, rotary: Rotary | None, step: Step) -> Tensor:
        self.output = self.of_rotated(*_rotated(q, k, rotary, step), v)
        return self.output

    def of_rotated(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale, softcap = self.config.scale, self.config.attention_softcap or 0.0
        if self.window is None:
            return attention(q, k, v, scale, causal=True, softcap=softcap)
        return sink_window_attention(q, k, v, 0, 0, self.window, scale, softcap)

    def skip(self, nothing: Tensor, step: Step) -> None:
        raise AssertionError("no layer is skipped while gates are learnt")


class StudentLayer:
    """What the teacher saw and what a streaming head would, mixed by a gate for each key head [Hk]."""

    def __init__(self, teacher: TeacherLayer, gates: Tensor, fit: GateFitConfig):
        self.teacher, self.gates, self.fit = teacher, gates, fit

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, rotary: Rotary | None, step: Step) -> Tensor:
        q, k = _rotated(q, k, rotary, step)
        if self.teacher.window is not None:
            return self.teacher.of_rotated(q, k, v)
        config, fit = self.teacher.config, self.fit
        softcap = config.attention_softcap or 0.0
        streaming = sink_window_attention(q, k, v, 0, fit.sinks, fit.window, config.scale, softcap)
        full = self.teacher.output if fit.full == "teacher" else self.teacher.of_rotated(q, k, v)
        gate = self.gates.clamp(0, 1).repeat_interleave(config.heads // config.kv_heads)[:, None, None]  # [H, 1, 1]
        return (gate * full.float() + (1 - gate) * streaming.float()).to(q.dtype)

    def skip(self, nothing: Tensor, step: Step) -> None:
        raise AssertionError("no layer is skipped while gates are learnt")


def _rotated(q: Tensor, k: Tensor, rotary: Rotary | None, step: Step) -> tuple[Tensor, Tensor]:
    if rotary is None:
        return q, k
    return rotary.apply(q, step.positions), rotary.apply(k, step.positions)


def _mean(values: list[Tensor]) -> float:
    return float(torch.stack(values).mean())
