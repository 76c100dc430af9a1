"""Whole models of real shapes with random weights: decoding and prefill through the engine's own Session."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.h200_kernels import Results, random_matrix, relative_error
from benchmarks.h200_timing import seconds_in_graph, seconds_of, synchronize
from fewer.cache.full import FullCache
from fewer.engine.runner import Runner
from fewer.engine.session import Session
from fewer.formats import DenseFormat, Int4Format, Int8Format, WeightFormat
from fewer.model.config import ModelConfig
from fewer.model.transformer import Transformer

LLAMA_8B = ModelConfig(
    architecture="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, layers=32, heads=32, kv_heads=8,
    head_dim=128, context_length=16384, rope_theta=500000.0,
)  # fmt: skip
SMOLLM2_135M = ModelConfig(
    architecture="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, layers=30, heads=9, kv_heads=3,
    head_dim=64, context_length=8192, rope_theta=100000.0, tied_embeddings=True,
)  # fmt: skip
TINY = ModelConfig(
    architecture="llama", vocab_size=160, hidden_size=128, intermediate_size=256, layers=2, heads=4, kv_heads=2,
    head_dim=32, context_length=512,
)  # fmt: skip


def random_format(kind: str, rows: int, columns: int, device: torch.device) -> WeightFormat:
    group = {"dense": 0, "int8": 0, "int4": 128 if columns % 128 == 0 else 64}[kind]
    matrix = random_matrix(kind, rows, columns, group, device)
    if kind == "dense":
        return DenseFormat(matrix.codes)
    assert matrix.scale is not None
    if kind == "int8":
        return Int8Format((rows, columns), matrix.codes, matrix.scale)
    return Int4Format((rows, columns), group, matrix.codes, matrix.scale, matrix.zero)


def random_model(config: ModelConfig, kind: str, device: torch.device) -> Transformer:
    """Every matrix, embedding and head too, in one format; norms of ones."""
    shapes = {
        "q": (config.heads * config.head_dim, config.hidden_size),
        "k": (config.kv_heads * config.head_dim, config.hidden_size),
        "v": (config.kv_heads * config.head_dim, config.hidden_size),
        "o": (config.hidden_size, config.heads * config.head_dim),
        "gate": (config.intermediate_size, config.hidden_size),
        "up": (config.intermediate_size, config.hidden_size),
        "down": (config.hidden_size, config.intermediate_size),
        "embed": (config.vocab_size, config.hidden_size),
        "head": (config.vocab_size, config.hidden_size),
    }

    def matrix(name: str) -> WeightFormat:
        return random_format(kind, *shapes[name.split(".")[-2]], device)

    def vector(name: str) -> Tensor:
        return torch.ones(config.hidden_size, device=device)

    return Transformer(config, matrix, vector, torch.bfloat16, device)


def new_session(runner: Runner, capacity: int, batch: int = 1) -> Session:
    cache = FullCache(runner.config, batch, capacity, runner.dtype, runner.device)
    return Session(runner, cache)


def random_prompt(config: ModelConfig, length: int) -> list[int]:
    return torch.randint(0, config.vocab_size, (length,), generator=torch.Generator().manual_seed(1)).tolist()


@torch.inference_mode()
def decode_speed(runner: Runner, prompt: int, tokens: int, repeats: int = 3) -> Results:
    """Greedy decoding of one sequence, as `generate` does it: tokens a second of the whole loop."""
    session = new_session(runner, prompt + tokens * (repeats + 1) + 8)
    token = int(session.prefill([random_prompt(runner.config, prompt)])[0].argmax())
    rates = []
    for _ in range(repeats + 1):
        synchronize()
        start = time.perf_counter()
        for following in session.greedy(token, tokens):
            token = following
        synchronize()
        rates.append(tokens / (time.perf_counter() - start))
    found: Results = {"tokens_per_second": statistics.median(rates[1:]), "runs": rates[1:]}
    found["weight_bytes"] = runner.model.nbytes
    if runner.cuda is not None and runner.device.type == "cuda":
        decoder = runner.cuda
        work, graph = decoder.buffers[1], next(reversed(decoder.graphs.values()))  # the last pass of one row

        def replays() -> None:
            work.inputs[1].fill_(prompt + tokens)  # a pass moves its lengths on: they must stay inside the cache
            for _ in range(20):
                graph.replay()

        found["graph_seconds"] = seconds_of(replays) / 20
        embedding = 0 if runner.config.tied_embeddings else runner.model.embed.nbytes
        found["graph_bytes_per_second"] = (runner.model.nbytes - embedding) / float(str(found["graph_seconds"]))
        found["pdl"] = decoder.pdl
    return found


@torch.inference_mode()
def decode_agrees(runner: Runner, prompt: int, steps: int = 4) -> Results:
    """The fast path's logits against the general path's, on the same tokens."""
    sessions = [new_session(runner, prompt + steps + 1) for _ in range(2)]
    tokens = random_prompt(runner.config, prompt + steps)
    for session in sessions:
        session.prefill([tokens[:prompt]])
    errors = []
    for token in tokens[prompt:]:
        fast = sessions[0].decode([token]).clone()
        decoder, runner.cuda = runner.cuda, None
        slow = sessions[1].decode([token])
        runner.cuda = decoder
        errors.append(relative_error(fast, slow))
    return {"fast_path": runner.cuda is not None, "relative_errors": errors}


@torch.inference_mode()
def decode_batch(runner: Runner, prompts: list[int], tokens: int) -> Results:
    """Rows of unequal lengths decoding together: tokens a second of all rows."""
    session = new_session(runner, max(prompts) + tokens + 16, len(prompts))
    last = session.prefill([random_prompt(runner.config, length) for length in prompts]).argmax(-1)
    for _ in range(4):
        last = session.decode(last.tolist()).argmax(-1)
    synchronize()
    start = time.perf_counter()
    for _ in range(tokens):
        last = session.decode(last.tolist()).argmax(-1)
    synchronize()
    return {"rows": len(prompts), "tokens_per_second": tokens * len(prompts) / (time.perf_counter() - start)}


@torch.inference_mode()
def prefill_speed(runner: Runner, length: int, matrix_flops: float) -> Results:
    """One prompt from an empty cache, as a fraction of the matrix rate; attention counts its causal half."""
    config = runner.config
    prompt = random_prompt(config, length)

    def run() -> None:
        new_session(runner, length + 8).prefill([prompt])

    seconds = seconds_of(run, 3)
    block = config.hidden_size * config.head_dim * (2 * config.heads + 2 * config.kv_heads)
    block += 3 * config.hidden_size * config.intermediate_size
    flops = 2 * config.layers * block * length + 2 * config.vocab_size * config.hidden_size
    flops += 2 * config.layers * config.heads * config.head_dim * length**2
    return {
        "seconds": seconds,
        "tokens_per_second": length / seconds,
        "flops_per_second": flops / seconds,
        "of_matrix_rate": flops / seconds / matrix_flops,
    }


@torch.inference_mode()
def prefill_parts(config: ModelConfig, length: int, device: torch.device) -> Results:
    """Seconds of one layer's parts at the prefill's shapes, to see where the rest goes."""
    x = torch.randn(length, config.hidden_size, device=device).bfloat16()
    found: Results = {}
    shapes = {
        "qkv": ((config.heads + 2 * config.kv_heads) * config.head_dim, config.hidden_size),
        "o": (config.hidden_size, config.heads * config.head_dim),
        "gate_up": (2 * config.intermediate_size, config.hidden_size),
        "down": (config.hidden_size, config.intermediate_size),
    }
    for name, (rows, columns) in shapes.items():
        weight = torch.empty(rows, columns, dtype=torch.bfloat16, device=device).normal_(0, 0.02)
        given = x if columns == x.shape[1] else torch.randn(length, columns, device=device).bfloat16()
        found[name] = seconds_in_graph([lambda a=given, w=weight: torch.nn.functional.linear(a, w)] * 4)
    q = torch.randn(1, config.heads, length, config.head_dim, device=device).bfloat16()
    k, v = (torch.randn(1, config.kv_heads, length, config.head_dim, device=device).bfloat16() for _ in "kv")
    found.update(_attention_parts(q, k, v))
    return found


def _attention_parts(q: Tensor, k: Tensor, v: Tensor) -> Results:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attend() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    found: Results = {}
    backends: dict[str, Callable[[], object]] = {
        "flash": lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION),
        "cudnn": lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION),
    }
    found["attention default"] = seconds_of(attend)
    for name, context in backends.items():
        try:
            with context():  # type: ignore[attr-defined]
                found[f"attention {name}"] = seconds_of(attend)
        except RuntimeError as error:
            found[f"attention {name}"] = repr(error)[:200]
    return found
