"""Other engines on the same shapes in the same run: transformers with a static cache, and a compiled plain loop."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.h200_kernels import Results
from benchmarks.h200_timing import synchronize
from fewer.model.config import ModelConfig
from fewer.model.feed_forward import FeedForward
from fewer.model.transformer import Transformer


def transformers_speed(config: ModelConfig, prompt: int, tokens: int, device: torch.device, compiled: bool) -> Results:
    """`generate` of a Llama of these shapes, greedy; prefill is removed by the difference of two lengths."""
    import transformers

    settings = transformers.LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers, num_attention_heads=config.heads, num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim, max_position_embeddings=config.context_length,
        tie_word_embeddings=config.tied_embeddings,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = transformers.LlamaForCausalLM(settings).eval()
    finally:
        torch.set_default_dtype(before)
    ids = torch.randint(0, config.vocab_size, (1, prompt), device=device)
    extra = {"cache_implementation": "static"} if compiled else {}

    def seconds(count: int) -> float:
        synchronize()
        start = time.perf_counter()
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False,
            pad_token_id=0, **extra,
        )  # fmt: skip
        synchronize()
        return time.perf_counter() - start

    short, long = tokens // 4, tokens
    start = time.perf_counter()
    seconds(long), seconds(short)
    warm = time.perf_counter() - start
    rates = [(long - short) / (seconds(long) - seconds(short)) for _ in range(3)]
    return {"tokens_per_second": statistics.median(rates), "runs": rates, "warm_up_seconds": warm,
            "version": transformers.__version__, "static_compiled": compiled}  # fmt: skip


def compiled_loop_speed(model: Transformer, prompt: int, tokens: int) -> Results:
    """The network as plain PyTorch operations on static buffers, under torch.compile and in one CUDA graph: what
    gpt-fast does."""
    config, device = model.config, model.device
    capacity = prompt + tokens + 8
    shape = (config.layers, 2, 1, config.kv_heads, capacity, config.head_dim)
    pool = torch.randn(shape, device=device).to(torch.bfloat16)
    table = torch.view_as_real(model.rotary.table(capacity, device))  # [positions, r/2, 2]
    slots = torch.arange(capacity, device=device)
    step = torch.compile(lambda token, at: _plain_step(model, pool, table, slots, token, at))
    token, at = torch.zeros(1, dtype=torch.int64, device=device), torch.full((1,), prompt, device=device)
    start = time.perf_counter()
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        step(token, at)
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token.copy_(step(token, at))
    compile_seconds = time.perf_counter() - start
    rates = []
    for _ in range(4):
        at.fill_(prompt)
        synchronize()
        start = time.perf_counter()
        for _ in range(tokens):
            graph.replay()
            int(token)
            at.add_(1)
        rates.append(tokens / (time.perf_counter() - start))
    return {"tokens_per_second": statistics.median(rates[1:]), "runs": rates[1:], "compile_seconds": compile_seconds}


def _plain_step(model: Transformer, pool: Tensor, table: Tensor, slots: Tensor, token: Tensor, at: Tensor) -> Tensor:
    """token [1] at position `at` [1] -> the next token [1]."""
    config = model.config
    x = functional.embedding(token, model.embed.weight)  # type: ignore[attr-defined]
    turn = table[at]  # [1, r/2, 2]
    mask = (slots <= at)[None, None, None]
    query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim

    def norm(value: Tensor, gain: Tensor | None) -> Tensor:
        wide = value.float()
        return (wide * (wide.square().mean(-1, keepdim=True) + config.norm_eps).rsqrt() * gain).to(value.dtype)

    def rotate(value: Tensor) -> Tensor:
        pairs = value.float().unflatten(-1, (-1, 2))
        real = pairs[..., 0] * turn[..., 0] - pairs[..., 1] * turn[..., 1]
        imaginary = pairs[..., 0] * turn[..., 1] + pairs[..., 1] * turn[..., 0]
        return torch.stack((real, imaginary), -1).flatten(-2).to(value.dtype)

    for index, layer in enumerate(model.layers):
        block = layer.feed_forward
        assert isinstance(block, FeedForward)
        q, k, v = layer.attention.qkv(norm(x, layer.attention_norm)).split((query, key, key), -1)
        q = rotate(q.view(config.heads, config.head_dim)).view(1, config.heads, 1, config.head_dim)
        keys, values = pool[index, 0], pool[index, 1]
        keys[:, :, at] = rotate(k.view(config.kv_heads, config.head_dim)).view(1, config.kv_heads, 1, config.head_dim)
        values[:, :, at] = v.view(1, config.kv_heads, 1, config.head_dim)
        out = functional.scaled_dot_product_attention(q, keys, values, mask, scale=config.scale, enable_gqa=True)
        x = x + layer.attention.o(out.view(1, query))
        gate, up = block.gate_up(norm(x, layer.feed_forward_norm)).chunk(2, -1)
        x = x + block.down(functional.silu(gate) * up)
    return model.head.matmul(norm(x, model.norm)).argmax(-1)
