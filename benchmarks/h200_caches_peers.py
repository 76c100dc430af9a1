"""Other implementations on the same shapes in the same run: PyTorch's attentions, FlexAttention, and transformers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.h200_caches_bench import Bench
from benchmarks.h200_report import Results
from benchmarks.h200_timing import seconds_in_graph, seconds_of, synchronize
from fewer.kernels.attention import attention
from fewer.kernels.tile_attention import EVERYTHING, Lambda, attend_tiles
from fewer.kernels.triton.attention_decode import attention_decode


def each(calls: Mapping[str, Callable[[], float]]) -> Results:
    """Seconds of each; one that fails loses only itself."""
    found: Results = {}
    for name, call in calls.items():
        try:
            found[name] = call()
        except Exception as error:
            found[name] = repr(error)[:200]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return found


def _random(bench: Bench, heads: int, tokens: int) -> Tensor:
    return torch.randn(1, heads, tokens, bench.config.head_dim, dtype=torch.bfloat16, device=bench.device)


@torch.inference_mode()
def decode_attention(bench: Bench, context: int) -> Results:
    """One new token over `context` keys, one layer: seconds, and bytes that have to be read."""
    config = bench.config
    q, scale = _random(bench, config.heads, 1), config.scale
    k, v = (_random(bench, config.kv_heads, context) for _ in "kv")
    lengths = torch.tensor([context], dtype=torch.int32, device=bench.device)
    repeats = 1 if bench.tiny else 4

    def timed(call: Callable[[], object]) -> float:
        call()
        return seconds_in_graph([call] * repeats)

    def flex() -> float:
        from torch.nn.attention.flex_attention import flex_attention

        run = flex_attention if bench.tiny else torch.compile(flex_attention)
        return timed(partial(run, q, k, v, scale=scale, enable_gqa=True))

    sdpa = functional.scaled_dot_product_attention
    calls = {
        "ours": lambda: timed(partial(attention_decode, q[:, :, 0], k, v, lengths, scale)),
        "sdpa, a group's queries as rows": lambda: timed(partial(attention, q, k, v, scale)),
        "sdpa, enable_gqa": lambda: timed(partial(sdpa, q, k, v, scale=scale, enable_gqa=True)),
        "flex": flex,
    }
    read = k.nbytes + v.nbytes
    return {"context": context, "bytes": read, "floor_seconds": read / bench.rate, "seconds": each(calls)}


@torch.inference_mode()
def prefill_attention(bench: Bench, queries: int, context: int) -> Results:
    """The last `queries` of `context` tokens, one layer, each seeing all before it."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.bias import causal_lower_right

    config = bench.config
    q, scale = _random(bench, config.heads, queries), config.scale
    k, v = (_random(bench, config.kv_heads, context) for _ in "kv")
    heads = torch.zeros(config.heads, dtype=torch.int32, device=bench.device)
    square = queries == context
    mask = {"is_causal": True} if square else {"attn_mask": causal_lower_right(queries, context)}
    sdpa = partial(functional.scaled_dot_product_attention, q, k, v, scale=scale, enable_gqa=True, **mask)

    def under(backend: SDPBackend) -> float:
        with sdpa_kernel(backend):
            return seconds_of(sdpa, 3)

    calls: dict[str, Callable[[], float]] = {
        "as the engine does": lambda: seconds_of(partial(attention, q, k, v, scale, causal=True), 3),
        "our tiles": lambda: seconds_of(
            partial(attend_tiles, q, k, v, context - queries, Lambda(heads, heads + EVERYTHING), scale), 3
        ),
        "sdpa, flash": lambda: under(SDPBackend.FLASH_ATTENTION),
    }
    if square:
        calls["sdpa, cudnn"] = lambda: under(SDPBackend.CUDNN_ATTENTION)
    seen = queries * (context - queries) + queries * (queries + 1) / 2
    flops = 4.0 * config.heads * config.head_dim * seen
    return {"queries": queries, "context": context, "flops": flops, "seconds": each(calls)}


@torch.inference_mode()
def transformers_step(bench: Bench, context: int, count: int = 5) -> Results:
    """One decoding step of a Llama of these shapes, SDPA and a growing cache of random keys: no prompt was read."""
    import transformers

    bench.release()  # there are 15 GB of weights and 34 GB of keys to come
    config, device = bench.config, bench.device
    settings = transformers.LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers, num_attention_heads=config.heads, num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim, max_position_embeddings=config.context_length,
        attn_implementation="sdpa",  # type: ignore[call-arg]
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = transformers.LlamaForCausalLM(settings).eval()
    finally:
        torch.set_default_dtype(before)
    cache = transformers.DynamicCache()
    for layer in range(config.layers):
        cache.update(_random(bench, config.kv_heads, context), _random(bench, config.kv_heads, context), layer)
    token, taken = torch.zeros(1, 1, dtype=torch.int64, device=device), []
    for _ in range(1 + count):
        synchronize()
        start = time.perf_counter()
        token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        synchronize()
        taken.append(time.perf_counter() - start)
    return {
        "context": context, "seconds": statistics.median(taken[1:]), "runs": taken[1:],
        "version": transformers.__version__,
    }  # fmt: skip
