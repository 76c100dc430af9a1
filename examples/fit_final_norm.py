"""Fit something: give back part of what int4 lost by fitting the final norm's gain (d numbers) by distillation.

    python examples/fit_final_norm.py [MODEL] [STEPS]

The uncompressed model writes the text and is the teacher; KL is measured on text that was held out.
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import fewer
from fewer import training
from fewer.model.norm import rms_norm
from fewer.model.step import Step

STARTS = ["The sea", "A list of", "Once upon a time", "def main", "In the year", "She said"]


def run(model: fewer.LanguageModel, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """tokens [B, T] -> hidden states before the final norm [B, T, d], logits [B, T, V]."""
    places, last = torch.arange(tokens.shape[1]).expand_as(tokens).contiguous(), model.config.layers
    output = model.runner.step(Step(tokens, places, logits="all", taps=(last,)), model.new_cache(*tokens.shape))
    assert output.logits is not None
    return output.taps[last].clone(), output.logits.clone()


def main(model: str = "smollm2", steps: str = "40") -> None:
    teacher, student = (fewer.load(model, weights=spec) for spec in ("dense", "int4:group=64"))
    prompts = [teacher.encode(start, raw=True) for start in STARTS]
    fitted, held_out = (training.sample_tokens(teacher.session(len(prompts)), prompts, 48, seed) for seed in (1, 2))
    network = student.transformer
    head = network.head.dequantize(torch.float32)  # [V, d]
    gain = nn.Parameter(network.norm.clone())  # [d]

    def loss(tokens: Tensor) -> Tensor:
        logits = rms_norm(run(student, tokens)[0], gain, student.config.norm_eps, torch.float32) @ head.T
        return training.distillation(logits, run(teacher, tokens)[1])

    def held_out_kl() -> float:
        return float(training.distillation(run(student, held_out)[1], run(teacher, held_out)[1]))

    before, blocks = held_out_kl(), training.TokenBlocks(fitted, batch_size=4)
    config = training.TrainerConfig(steps=int(steps), learning_rate=0.01)
    training.Trainer({"norm.weight": gain}, loss, blocks, config).run()
    with tempfile.TemporaryDirectory() as folder:
        network.norm = gain.detach()
        metrics = {"kl_before": before, "kl_after": held_out_kl()}
        origin = training.Provenance("final-norm", {}, teacher.checkpoint.fingerprint(), blocks.fingerprint, 0, metrics)
        path = Path(folder) / "norm.safetensors"
        nbytes = training.save_adapter(path, training.Adapter({"norm.weight": gain}, origin))
        network.norm = training.load_adapter(path, "final-norm", origin.model).tensors["norm.weight"]
    print(f"KL on held-out text: {before:.5f} before, {held_out_kl():.5f} after, with an adapter of {nbytes} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
