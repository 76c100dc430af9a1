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
from fewer.registry import parse_spec
from tests.checkpoint.gguf_files import Experts, write_gguf
from tests.model.families import reference_logits, tiny_models

CPU = torch.device("cpu")
PROMPT, DECODED = 40, 32

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
# Test -> the family and, where the converter cannot write a setting of it, what a reader assumes instead.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("llama2", {}),
    "llama3": ("llama3", {}),
    "llama-linear": ("llama-linear", {}),
    "llama-yarn": ("llama-yarn", {}),
    "llama-yarn-tuned": (
        "llama-yarn",
        {"rope_parameters": {**YARN, "attention_factor": 1.3, "beta_fast": 8.0, "beta_slow": 2.0}},
    ),
    "llama-biases": ("llama-biases", {}),
    "mistral": ("mistral", {"sliding_window": None}),  # a window of Mistral is not written
    "smollm2": ("smollm2", {}),
    "smollm3": ("smollm3", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma2": ("gemma2", {}),
    # only its depth tells that the largest Gemma 2 scales attention by hidden size / heads
    "gemma2-27b": ("gemma2", {"num_hidden_layers": 46, "head_dim": 32, "query_pre_attn_scalar": 16}),
    "gemma3": ("gemma3", {}),
    "phi3": ("phi3", {}),
    "phi3-longrope": ("phi3-longrope", {}),
    "phi3-shortrope": ("phi3-shortrope", {}),
    "olmo2": ("olmo2", {}),
    "mixtral": ("mixtral", {}),
    "qwen2-moe": ("qwen2-moe-all", {}),  # the converter knows no Qwen2-MoE with dense layers between
    "qwen3-moe": ("qwen3-moe", {}),
    "olmoe": ("olmoe", {"clip_qkv": None}),  # nor OLMoE's clipping
}


def tiny_model(name: str) -> Any:
    family, changes = MODELS[name]
    return tiny_models(family, **changes)[1]


def opened(model: Any, folder: Path, kind: str = "F32", experts: Experts = "stacked") -> GGUFCheckpoint:
    path = folder / f"{kind}-{experts}.gguf"
    write_gguf(model, folder, path, kind, experts)
    return GGUFCheckpoint(path)


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


@pytest.mark.parametrize("name", MODELS)
def test_a_gguf_file_gives_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    """Prefill of every position, then 32 cached decode steps: float32, within 1e-4 of the range of the logits."""
    model = tiny_model(name)
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


@pytest.mark.parametrize("layout", ["fused", "separate"])
@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "olmoe"])
def test_experts_are_the_same_in_every_layout(name: str, layout: Experts, tmp_path: Path) -> None:
    model = tiny_model(name)
    stacked, other = opened(model, tmp_path), opened(model, tmp_path, experts=layout)
    assert stacked.names() == other.names()
    assert any(".experts.5.up." in tensor for tensor in stacked.names())
    assert set(stacked.file.tensors) != set(other.file.tensors)
    for tensor in stacked.names():
        assert torch.equal(stacked[tensor].dense(), other[tensor].dense()), tensor


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_1", "Q8_0"])
@pytest.mark.parametrize("name", ["qwen2", "phi3", "mixtral"])  # rows paired; fused and paired; experts stacked
def test_rows_are_sliced_and_paired_as_stored_blocks(name: str, kind: str, tmp_path: Path) -> None:
    """A matrix read from blocks is the float32 one, up to the quantisation: no row has gone elsewhere."""
    model = tiny_model(name)
    exact, coarse = opened(model, tmp_path), opened(model, tmp_path, kind)
    largest_error = {"F16": 2**-11, "BF16": 2**-8, "Q8_0": 0.005, "Q5_1": 0.05, "Q4_1": 0.08, "Q4_0": 0.13}[kind]
    matrices = [tensor for tensor in exact.names() if len(exact[tensor].shape) == 2]
    assert len(matrices) > 15
    for tensor in matrices:
        whole, read = exact[tensor].dense(), coarse[tensor].dense()
        assert (read - whole).abs().max() <= largest_error * whole.abs().max(), tensor
        assert coarse[tensor].nbytes <= exact[tensor].nbytes


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("name", ["qwen2", "phi3", "mixtral"])
def test_direct_formats_of_slices_hold_the_values_of_the_file(name: str, kind: str, tmp_path: Path) -> None:
    checkpoint = opened(tiny_model(name), tmp_path, kind)
    for tensor in (checkpoint[tensor] for tensor in checkpoint.names() if "norm" not in tensor):
        stored = tensor.format()
        if tensor.kind == "F32":  # routers and biases
            assert stored is None
            continue
        assert isinstance(stored, Int8Format if kind == "Q8_0" else Int4Format)
        values = tensor.dense()
        assert (stored.dequantize() - values).abs().max() <= 2**-7 * values.abs().max(), tensor.name


def test_a_model_runs_on_the_blocks_of_its_file(tmp_path: Path) -> None:
    """The default weights method keeps Q8_0 as int8 and answers as the float32 model does."""
    model, tokens = tiny_model("phi3"), tokens_of(PROMPT)
    expected = reference_logits(model, [tokens])[0]
    checkpoint = opened(model, tmp_path, "Q8_0")
    network = MatrixLoader(checkpoint, parse_spec("weights", "auto"), torch.float32, CPU).transformer(torch.float32)
    assert {stored.name for _, stored in network.matrices()} == {"int8"}
    session = Session(Runner(network), FullCache(network.config, 1, 8, torch.float32, CPU))
    error = (one_pass(session, tokens) - expected).norm() / expected.norm()
    assert error < 0.05
