"""GGUF metadata that contradicts itself, the tensors or what the network can be: one sentence that names the key."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewer.checkpoint.gguf_config import FAMILIES
from tests.checkpoint.raw_gguf import (
    BLOCK,
    EDGES,
    HEADS,
    INNER,
    QUERY,
    SHAPES,
    WIDTH,
    array,
    entry,
    fault_of,
    metadata_of,
    number_entry,
    string,
    text_entry,
    tiny_file,
    use,
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf") / "model.gguf"


def number(key: str, value: int) -> dict[str, bytes | None]:
    return {f"llama.{key}": number_entry(f"llama.{key}", value)}


def real(key: str, value: float) -> dict[str, bytes | None]:
    return {f"llama.{key}": entry(f"llama.{key}", 6, struct.pack("<f", value))}


CONTRADICTIONS: dict[str, tuple[bytes, str]] = {
    "no architecture": (tiny_file({"general.architecture": None}), "has no architecture, which fewer does not know"),
    "unknown architecture": (
        tiny_file({"general.architecture": text_entry("general.architecture", "mamba\n")}),
        r"'mamba\n', which fewer does not know: it reads GGUF files of llama",
    ),
    "architecture is a number": (
        tiny_file({"general.architecture": number_entry("general.architecture", 7)}),
        "architecture '7'",
    ),
    **{
        f"no {key}": (tiny_file({key: None}), f"the metadata key '{key}' is missing")
        for key in metadata_of()
        if key not in ("general.architecture", "llama.attention.head_count_kv")
    },
    "count is text": (
        tiny_file({"llama.block_count": text_entry("llama.block_count", "one")}),
        "'llama.block_count' is 'one', and a whole number",
    ),
    "no layers": (tiny_file(number("block_count", 0)), "'llama.block_count' is '0'"),
    "many layers": (
        tiny_file(number("block_count", 1 << 30)),
        f"is {1 << 30}, but the file holds {len(SHAPES)} tensors",
    ),
    "two layers": (tiny_file(number("block_count", 2)), "lacks the tensor 'blk.1.attn_norm.weight'"),
    "a layer too many": (
        tiny_file(tensors={"blk.7.attn_q.weight": (WIDTH,)}),
        "'blk.7.attn_q.weight', but its metadata gives the model only 1 layers",
    ),
    "a layer without end": (
        tiny_file(tensors={"blk." + "9" * 5000: (WIDTH,)}),
        "but its metadata gives the model only 1 layers",
    ),
    "hidden size": (
        tiny_file(number("embedding_length", 64)),
        "has the shape [8, 32], which a llama model of the file's metadata needs as [8, 64]",
    ),
    "heads": (tiny_file(number("attention.head_count_kv", 1)), "needs as [16, 32]"),
    "heads beyond the width": (
        tiny_file(number("attention.head_count", 64)),
        "64 heads are claimed for a hidden size of 32",
    ),
    "uneven heads": (tiny_file(number("attention.head_count", 3)), "3 heads cannot share 2 key-value heads evenly"),
    "no heads": (tiny_file(number("attention.head_count", 0)), "'llama.attention.head_count' is '0'"),
    "values of another size": (
        tiny_file(number("attention.key_length", 16) | number("attention.value_length", 8)),
        "keys and values of different sizes",
    ),
    "context": (tiny_file(number("context_length", 0)), "'llama.context_length' is '0'"),
    "inner size": (tiny_file(number("feed_forward_length", 1 << 30)), "needs as [1073741824, 32]"),
    "vocabulary": (tiny_file(number("vocab_size", 9)), "needs as [9, 32]"),
    "tokens beyond it": (
        tiny_file({"t": entry("tokenizer.ggml.tokens", 9, array(8, 9, string("a") * 9))}),
        "the tokenizer has 9 tokens, but the model's vocabulary only 8",
    ),
    "end token": (
        tiny_file({"t": number_entry("tokenizer.ggml.eos_token_id", 8)}),
        "'tokenizer.ggml.eos_token_id' is '8', and a token from 0 to 7 is needed",
    ),
    "epsilon": (
        tiny_file(real("attention.layer_norm_rms_epsilon", float("nan"))),
        "is 'nan', and a number of at least 0",
    ),
    "rotary base": (tiny_file(real("rope.freq_base", 1.0)), "'llama.rope.freq_base' is 1, and a number above 1"),
    "rotary size": (tiny_file(number("rope.dimension_count", 18)), "is 18, and an even number up to the head size 16"),
    "odd rotary size": (tiny_file(number("rope.dimension_count", 7)), "is 7, and an even number"),
    "rotary scaling": (
        tiny_file({"x": text_entry("llama.rope.scaling.type", "\x1b]0;")}),
        r"'\x1b]0;' is unknown: allowed are none, linear",
    ),
    "rotary scaling of one token": (
        tiny_file(number("rope.scaling.original_context_length", 1)),
        "is '1', and a whole number from 2",
    ),
    "rotary factors": (tiny_file(tensors={"rope_freqs.weight": (7,)}), "but the metadata asks for F32 of shape [8]"),
    "rotary factors of zero": (
        tiny_file(tensors={"rope_freqs.weight": (8,)}),
        "a rope factor that is not a positive number",
    ),
    "missing tensor": (
        tiny_file(tensors={QUERY: None}),
        f"lacks the tensor '{QUERY}', which a llama model of the file's metadata needs as [32, 32]",
    ),
    "missing embedding": (
        tiny_file(number("vocab_size", 8), {"token_embd.weight": None}),
        "lacks the tensor 'token_embd.weight'",
    ),
    "tensor of another shape": (tiny_file(tensors={QUERY: (WIDTH, INNER)}), f"tensor '{QUERY}'"),
    "norm of another shape": (tiny_file(tensors={"output_norm.weight": (33,)}), "has the shape [33]"),
    "experts": (tiny_file(number("expert_count", 8) | number("expert_used_count", 9)), "9 of 8 experts cannot be used"),
    "experts without number": (tiny_file(number("expert_count", 8)), "'llama.expert_used_count' is missing"),
    "too many experts": (
        tiny_file(number("expert_count", 5000) | number("expert_used_count", 2)),
        "5000 experts in each of 1 layers are claimed, at most 4096",
    ),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_metadata_that_contradicts_itself_or_the_tensors_is_named(case: str, path: Path) -> None:
    data, expected = CONTRADICTIONS[case]
    assert expected in fault_of(data, path)


def test_zeros_that_stand_for_the_usual_value_are_taken_as_it(path: Path) -> None:
    yarn: dict[str, bytes | None] = {"type": text_entry("llama.rope.scaling.type", "yarn")}
    zeros = ("rope.scaling.factor", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "attention.clamp_kqv")
    for key in zeros:
        assert use(tiny_file({**yarn, **real(key, 0.0)}), path), key


KEYS = [
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.clamp_kqv",
    "attention.layer_norm_rms_epsilon", "attention.sliding_window", "attention.sliding_window_pattern",
    "attn_logit_softcapping", "final_logit_softcapping", "rope.dimension_count", "rope.freq_base", "rope.freq_base_swa",
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.attn_factor",
    "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_attn_factor", "rope.scale_linear", "expert_count",
    "expert_used_count", "expert_feed_forward_length", "expert_weights_norm",
]  # fmt: skip
VALUES = st.one_of(
    st.sampled_from(EDGES).map(lambda n: (4, struct.pack("<I", n & 0xFFFFFFFF))),
    st.sampled_from([-1, -(1 << 31)]).map(lambda n: (5, struct.pack("<i", n))),
    st.sampled_from(EDGES).map(lambda n: (10, struct.pack("<Q", n))),
    st.floats(width=32).map(lambda x: (6, struct.pack("<f", x))),
    st.floats().map(lambda x: (12, struct.pack("<d", x))),
    st.booleans().map(lambda flag: (7, bytes([flag]))),
    st.sampled_from(["yarn", "linear", "longrope", "none", ""]).map(lambda text: (8, string(text))),
    st.lists(st.integers(0, 3), max_size=3).map(lambda v: (9, array(4, len(v), struct.pack(f"<{len(v)}I", *v)))),
)


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(list(FAMILIES)), st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=4))
def test_any_values_of_any_keys_open_or_are_refused(
    path: Path, architecture: str, values: dict[str, tuple[int, bytes]]
) -> None:
    entries: dict[str, bytes | None] = dict.fromkeys(metadata_of())
    entries |= metadata_of(architecture)
    entries |= {(name := f"{architecture}.{key}"): entry(name, *value) for key, value in values.items()}
    names = ("attn_q_norm", "attn_k_norm", "post_attention_norm", "post_ffw_norm")
    heads_or_row = (WIDTH,) if architecture == "olmo2" else (WIDTH // HEADS,)
    norms = {f"{BLOCK}.{name}.weight": heads_or_row if "attn_" in name else (WIDTH,) for name in names}
    use(tiny_file(entries, norms), path)
