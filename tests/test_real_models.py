"""SmolLM2 itself, from its GGUF file: the same greedy text as transformers, and the file's own 4-bit codes in memory.

The model is fetched (0.1 GB) where it is not installed, as `make demo` does. `benchmarks/exactness.py` is the long
form, with three models; speed is measured in `benchmarks/`, never asserted here.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fewer
from benchmarks.exactness import agreement, exactness_prompts, load_reference, our_answers, reference_answers
from fewer.checkpoint.names import resolve
from fewer.errors import DownloadError
from fewer.formats import Int4Format, Int8Format

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm2() -> Path:
    try:
        return resolve("smollm2")
    except DownloadError as fault:
        if "SHA-256" in str(fault):  # what came is wrong: that is no missing network
            raise
        pytest.skip(f"smollm2 is not installed and cannot be fetched: {fault}")


def test_greedy_text_equals_transformers_in_float32(smollm2: Path) -> None:
    model = fewer.load(smollm2, weights="dense", dtype="float32", device="cpu")
    prompts = [model.encode(prompt) for prompt in exactness_prompts()[:6]]
    ours = our_answers(model, prompts, 32)
    theirs = reference_answers(load_reference(smollm2), prompts, 32)
    found = agreement(ours, theirs)
    assert found.differences == [] and found.compared_tokens == 6 * 32
    assert found.largest_logit_difference <= 1e-4


def test_auto_keeps_the_files_four_and_eight_bit_codes(smollm2: Path) -> None:
    model = fewer.load(smollm2, device="cpu")
    stored = {name: model.checkpoint[name] for name in model.checkpoint.names()}
    assert {tensor.kind for name, tensor in stored.items() if len(tensor.shape) == 2} == {"Q4_1", "Q8_0"}
    formats = dict(model.transformer.matrices())
    assert isinstance(formats.pop("embed"), Int8Format)
    assert len(formats) == 4 * model.config.layers
    assert all(isinstance(matrix, Int4Format) and matrix.group_size == 32 for matrix in formats.values())
    assert model.weight_bytes < 1.05 * smollm2.stat().st_size  # scales of two bytes, those of 8-bit groups twice


def test_auto_changes_values_by_no_more_than_the_rounding_of_scales(smollm2: Path) -> None:
    model = fewer.load(smollm2, device="cpu")
    for name in ("feed_forward.down", "attention.o"):
        exact = model.checkpoint[f"layers.7.{name}.weight"].dense(torch.float32)
        kept = dict(model.transformer.matrices())[f"layers.7.{name}"].dequantize().float()
        # Q4_1 is q * d + m with q in 0..15; ours (q - 8) * d + (m + 8d), both factors rounded to bfloat16.
        low, high = (end(exact.unflatten(1, (-1, 32)), -1) for end in (torch.amin, torch.amax))
        allowed = (8 * (high - low) / 15 + (low + 8 * (high - low) / 15).abs()) * 2**-8
        assert ((kept - exact).unflatten(1, (-1, 32)).abs() <= allowed[..., None]).all()
