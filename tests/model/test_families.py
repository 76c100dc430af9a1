"""Every family gives the logits of transformers on the same checkpoint, in the prefill and token by token."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from fewer.language_model import load
from tests.model.families import FAMILIES, reference_logits, write_tiny_model
from tests.random_model import random_tokens

PROMPT, STEPS = 40, 32  # the prompt is longer than the window of any family
TOLERANCE = 1e-4  # of the logits' range


def assert_same_logits(ours: Tensor, theirs: Tensor) -> None:
    difference = float((ours - theirs).abs().max() / (theirs.max() - theirs.min()))
    assert difference <= TOLERANCE, f"logits differ by {difference:.2e} of their range"


@pytest.mark.parametrize("name", FAMILIES)
def test_prefill_and_cached_decoding_equal_transformers(name: str, tmp_path: Path) -> None:
    model = write_tiny_model(name, tmp_path)
    tokens = random_tokens(PROMPT + STEPS, seed=1, vocab_size=96)
    expected = reference_logits(model, [tokens])[0]  # [T, V]
    session = load(tmp_path, weights="dense", dtype="float32", device="cpu").session()
    assert_same_logits(session.prefill([tokens[:PROMPT]])[0], expected[PROMPT - 1])
    for position in range(PROMPT, PROMPT + STEPS):
        assert_same_logits(session.decode([tokens[position]])[0], expected[position])
