"""Compile every kernel launch of a program for Hopper, without a GPU: run with Triton's interpreter off.

    python -m tests.kernels.triton.compile_for_hopper

Launches on CPU tensors are compiled to machine code for the types, constants and specialisations that they would have
on CUDA, and not run. Prints how many differing ones there were.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from fewer.cache import FullCache
from fewer.cache.quantised_pages import RowLayout
from fewer.engine.cuda import CudaDecoder
from fewer.kernels.new_tokens import Fusion, NewTokens, Workspace
from fewer.kernels.tile_attention import Lambda, TileLists
from fewer.kernels.triton.attention_decode import attention_decode
from fewer.kernels.triton.chosen_tokens import attend_and_choose, attend_chosen
from fewer.kernels.triton.gather_rows import gather_rows
from fewer.kernels.triton.linear import Fused, dequantize, multiply
from fewer.kernels.triton.list_attention import attend_list
from fewer.kernels.triton.merge import merge
from fewer.kernels.triton.merge_heads import merge_into
from fewer.kernels.triton.norm import add_rms_norm, rms_norm
from fewer.kernels.triton.pack_new import pack_and_turn
from fewer.kernels.triton.packed_attention import attend_packed
from fewer.kernels.triton.page_selector import choose
from fewer.kernels.triton.rotate import rotate
from fewer.kernels.triton.scored_attention import ScoredKeys, attend_scored, place_new
from fewer.kernels.triton.shared_prefix import attend_prefix
from fewer.kernels.triton.shared_prefix import launch as prefix_launch
from fewer.kernels.triton.tile_attention import attend_tiles, column_sums
from fewer.kernels.triton.wide import multiply_wide
from tests.engine.test_cuda import FEATURES, SMALL, build
from tests.kernels.triton.test_linear import ACTIVATIONS, problem
from tests.kernels.triton.test_pack_new import stores_for
from tests.random_model import config_of

HOPPER = GPUTarget("cuda", 90, 32)
CPU = torch.device("cpu")
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.int64: "*i64",
}
ON_CUDA = {"ON_CPU": False, "PDL": True}  # what the callers say on Hopper
compiled: set[object] = set()


def launch(kernel: JITFunction[Any], *args: Any, grid: object, warmup: bool, **options: Any) -> None:
    """In place of `JITFunction.run`."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    for index, (parameter, value) in enumerate(zip(kernel.params, args, strict=True)):
        name = parameter.name
        if parameter.is_constexpr or (type(value) is int and value == 1):  # 1 is a constant to the compiler
            signature[name], constants[name] = "constexpr", ON_CUDA.get(name, value)
            continue
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):  # as CUDA allocates
            attributes[index,] = [["tt.divisibility", 16]]
        signature[name] = TYPES[value.dtype] if isinstance(value, torch.Tensor) else _scalar(value)
    warps = options.get("num_warps", 4)
    key: tuple[object, ...] = (kernel.fn.__name__, *signature.items(), *constants.items(), str(attributes), warps)
    if key not in compiled:
        compile(ASTSource(kernel, signature, constants, attributes), HOPPER, {"num_warps": warps, "launch_pdl": True})
        compiled.add(key)


def _scalar(value: object) -> str:
    return "fp32" if isinstance(value, float) else "i32"


def products() -> None:
    for kind in ("bfloat16", "int8", "int8-32", "int4-128"):
        gain, bias, matrix = torch.ones(128), torch.ones(64), problem(kind, 64, 128, CPU).matrix
        for count in (1, 3):
            x = torch.zeros(count, 128, dtype=torch.bfloat16)
            multiply(x, matrix, x.new_empty(count, 64), Fused(gain, 1e-5, bias, residual=torch.ones(count, 64)))
            for activation in ACTIVATIONS if (kind, count) == ("int8", 1) else ("silu",):
                multiply(x, matrix, x.new_empty(count, 32), Fused(gain, 1e-5, None, activation))
        multiply(x[:1], problem(kind, 1, 128, CPU).matrix, x.new_empty(1, 1))  # N = 1 is a constant
        dequantize(matrix, torch.bfloat16)


def norms() -> None:
    rms_norm(torch.ones(3, 80), torch.ones(80), 1e-5, torch.bfloat16)
    add_rms_norm(torch.ones(3, 80), torch.ones(3, 80), torch.ones(80), 1e-5, torch.bfloat16)


def attentions() -> None:
    for batch, group, head_dim, window, softcap in ((1, 4, 128, None, None), (3, 1, 80, 1, None), (2, 3, 8, 4, 2.0)):
        keys = torch.ones(batch, 2, 200, head_dim, dtype=torch.bfloat16)
        q, lengths = keys.new_ones(batch, 2 * group, head_dim), torch.ones(batch, dtype=torch.int32)
        attention_decode(q, keys, keys.clone(), lengths, 0.1, window, softcap)


def parts_of_keys() -> None:
    lengths = torch.ones(2, dtype=torch.int32)
    for group, head_dim, page_size, lists, unit, softcap in (
        (4, 128, 64, torch.ones(2, 2, 9, dtype=torch.int32), "page", None),
        (3, 80, 16, torch.ones(2, 6, 9, dtype=torch.int32), "token", 2.0),
        (1, 64, 200, None, "page", None),
    ):
        pool = torch.ones(2, 6, 2, page_size, head_dim, dtype=torch.bfloat16)
        q = pool.new_ones(2, 2 * group, head_dim)
        table = torch.ones(2, 1 if lists is None else 3, dtype=torch.int32)
        attend_list(q, *pool, table, lists, None, unit, lengths, 0.1, softcap, want_scores=softcap is None)
        attend_prefix(q, *pool, table, lengths, torch.ones(3, dtype=torch.int32), 0.1, softcap)


def packed_rows() -> None:
    cases: list[tuple[Any, list[int], int, int, float | None]] = [
        (16, [0, -1], 4, 128, None),
        (8, [0, 1], 3, 24, 2.0),
        (4, [0], 1, 64, None),
    ]
    for bits, homes, group, head_dim, softcap in cases:
        layout = RowLayout(head_dim, bits, torch.bfloat16)
        stores = stores_for(layout, homes, 2, CPU)
        stores = replace(stores, bounds=stores.bounds.bfloat16())
        kv_heads, heads = len(homes), len(homes) * group
        projected = torch.zeros(2, (heads + 2 * kv_heads) * head_dim, dtype=torch.bfloat16)
        fusion = Fusion(torch.ones(8, head_dim // 2, 2), head_dim, torch.ones(head_dim), torch.ones(head_dim), 1e-5)
        out, positions = projected.new_zeros(2, heads * head_dim), torch.zeros(2, dtype=torch.int32)
        new = NewTokens(projected, positions, out, heads, kv_heads, 0.1, softcap, fusion, Workspace(CPU), True)
        lists = torch.zeros(2, stores.pages.shape[2] * (group if bits == 16 else 1), 4, dtype=torch.int32)
        queries = pack_and_turn(new, stores)
        choose(new, queries, stores, torch.ones(2, dtype=torch.int32), lists, 3)
        attend_packed(new, queries, stores, lists, 48, fresh=bits == 8)


def tiles() -> None:
    rules, kinds = torch.ones(8, dtype=torch.int32), torch.ones(1, 8, dtype=torch.int32)
    lists = torch.ones(8, 4, 3, dtype=torch.int32)
    for kept in (Lambda(rules, rules), TileLists(lists, lists[..., 0], kinds)):
        q, k = (torch.ones(1, heads, 200, 128, dtype=torch.bfloat16) for heads in (8, 2))
        _, lse = attend_tiles(q, k, k.clone(), 0, kept, 0.1)
        column_sums(q, k, lse, torch.ones(200), 0, kept, 0.1)


def prompts() -> None:
    out = torch.ones(1, 64, 8, 128, dtype=torch.bfloat16).transpose(1, 2)
    rotate(out, torch.ones(1, 64, 64, dtype=torch.complex64))
    rotate(out[..., :80], torch.ones(1, 64, 16, dtype=torch.complex64))
    merge([(out, torch.ones(1, 8, 64))] * 3)
    table, lengths = torch.ones(1, 3, dtype=torch.int32), torch.ones(1, dtype=torch.int64)
    for bits, width in ((16, 128), (8, 132), (4, 68)):
        storage = torch.ones(2, 6, 4, 64, width, dtype=torch.bfloat16 if bits == 16 else torch.uint8)
        gather_rows(storage, slice(0, 2), table, lengths, 190, 128, bits, torch.bfloat16)


def selections() -> None:
    for lists, length in ((8, 300_000), (2, 1000)):
        keys = torch.zeros(1, 2, length, 64, dtype=torch.bfloat16)
        new = NewTokens(
            keys.new_zeros(1, 12 * 64), torch.ones(1, dtype=torch.int32), keys.new_zeros(1, 8 * 64), 8, 2, 0.1, None,
            Fusion(torch.zeros(8, 32, 2), 64), Workspace(CPU), False,
        )  # fmt: skip
        tensors = keys, keys.clone(), torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, lists, 48, dtype=torch.int32)
        attend_and_choose(new, *tensors)
        attend_chosen(new, *tensors)


def evictions() -> None:
    """Scored keys of two layers, with scores and without."""
    keys = torch.zeros(1, 2, 300, 64, dtype=torch.bfloat16)
    new = NewTokens(
        keys.new_zeros(1, 12 * 64), torch.ones(1, dtype=torch.int32), keys.new_zeros(1, 8 * 64), 8, 2, 0.1, None,
        Fusion(torch.zeros(8, 32, 2), 64), Workspace(CPU), False,
    )  # fmt: skip
    held, places = torch.zeros(2, 1, 2, 300, dtype=torch.int32), torch.zeros(2, 1, 2, dtype=torch.int32)
    for slots in (300, 0):
        logits, rows = torch.zeros(2, 1, 8, slots), torch.zeros(1, 4, dtype=torch.int32)
        scored = ScoredKeys(torch.zeros(2, 1, 2, 300), held, logits, torch.zeros(2, 1, 8), places, rows)
        place_new(new, scored, 0.5, together=slots == 0)
        attend_scored(new, keys, keys.clone(), scored, 0)


def many_rows() -> None:
    """What a wide batch launches: products that cuBLAS makes a part of, prefixes under some of its rows, the merge."""
    x, workspace = torch.zeros(3, 128, dtype=torch.bfloat16), Workspace(CPU)
    for fused in (Fused(torch.ones(128), 1e-5, torch.ones(64), "silu"), Fused(residual=torch.ones(3, 64))):
        size = 32 if fused.activation == "silu" else 64
        multiply_wide(x, problem("bfloat16", 64, 128, CPU).matrix, x.new_empty(3, size), workspace, fused, pdl=True)
    pool, lengths = torch.ones(2, 2, 2, 200, 128, dtype=torch.bfloat16), torch.ones(2, dtype=torch.int32)
    q, parts, sums = pool.new_ones(3, 8, 128), torch.ones(2, 3, 8, 128), torch.ones(2, 3, 8)
    prefixes = lengths[:, None], lengths, torch.ones(3, dtype=torch.int32)
    for members in (None, torch.ones(2, dtype=torch.int64)):
        prefix_launch(q, *pool, *prefixes, parts[0], sums[0], 0.1, None, members, pdl=True)
    merge_into(torch.empty(3, 1024, dtype=torch.bfloat16), parts, sums, pdl=True)


def decoders() -> None:
    everything = FEATURES["biases everywhere"] | FEATURES["norms of heads"] | FEATURES["a layer without positions"]
    for kind, changes, batch in (("dense", everything, 3), ("int4", FEATURES["caps and scales"], 1)):
        model = build(config_of(**SMALL | changes), kind, CPU, torch.bfloat16)
        cache = FullCache(model.config, batch, 8, model.dtype, CPU)
        CudaDecoder(model).run([0] * batch, [0] * batch, cache.contiguous_capture())


if __name__ == "__main__":
    JITFunction.run = launch
    norms()
    attentions()
    parts_of_keys()
    packed_rows()
    tiles()
    prompts()
    selections()
    evictions()
    products()
    many_rows()
    decoders()
    print(len(compiled))
