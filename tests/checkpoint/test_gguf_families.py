"""GGUF files in the layout of llama.cpp's converter compute what transformers computes from the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewer.cache import FullCache
from fewer.checkpoint.gguf import GGUFCheckpoint
from fewer.engine.loading import MatrixLoader
from fewer.engine.runner import Runner
from fewer.engine.session import Session
from fewer.formats import Int4Format, Int8Format
from fewer.model.step import Step
from fewer.slots import parse_spec
from tests.checkpoint.gguf_files import write_gguf
from tests.model.families import reference_logits, tiny_models

CPU = torch.device("cpu")
PROMPT, DECODED = 40, 32

# What the converter can say of each family; settings that it cannot write are set to what a reader assumes.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama2": {},
    "llama3": {},
    "llama-linear": {},
    "llama-yarn": {},
    "llama-biases": {},
    "mistral": {"sliding_window": None},  # a window of Mistral is not written
    "smollm2": {},
    "smollm3": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {},
    "gemma3": {},
    "phi3": {},
    "phi3-longrope": {},
    "phi3-shortrope": {},
    "olmo2": {},
    "mixtral": {},
    "qwen2-moe-all": {},
    "qwen3-moe": {},
    "olmoe": {"clip_qkv": None},  # nor OLMoE's clipping
}


def opened(model: Any, folder: Path, kind: str = "F32") -> GGUFCheckpoint:
    write_gguf(model, folder, folder / "model.gguf", kind)
    return GGUFCheckpoint(folder / "model.gguf")


def session_of(checkpoint: GGUFCheckpoint) -> Session:
    network = MatrixLoader(checkpoint, parse_spec("weights", "dense"), torch.float32, CPU).transformer(torch.float32)
    return Session(Runner(network), FullCache(network.config, 1, 8, torch.float32, CPU))


def tokens_of(count: int) -> list[int]:
    return torch.randint(3, 96, (count,), generator=torch.Generator().manual_seed(7)).tolist()


def one_pass(session: Session, tokens: list[int]) -> Tensor:
    step = Step(torch.tensor([tokens]), torch.arange(len(tokens))[None], logits="all")
    session.cache.reserve(len(tokens))
    logits = session.runner.step(step, session.cache).logits
    assert logits is not None
    return logits[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gguf_file_gives_the_logits_of_transformers(family: str, tmp_path: Path) -> None:
    """Prefill of every position, then 32 cached decode steps: float32, within 1e-4 of the range of the logits."""
    _, model = tiny_models(family, **FAMILIES[family])
    tokens = tokens_of(PROMPT + DECODED)
    expected = reference_logits(model, [tokens])[0]
    allowed = 1e-4 * float(expected.max() - expected.min())
    checkpoint = opened(model, tmp_path)

    prefilled = one_pass(session_of(checkpoint), tokens)
    assert (prefilled - expected).abs().max() <= allowed

    session = session_of(checkpoint)
    steps = [session.prefill([tokens[:PROMPT]])]
    steps += [session.decode([token]) for token in tokens[PROMPT:]]
    assert (torch.cat(steps) - expected[PROMPT - 1 :]).abs().max() <= allowed
