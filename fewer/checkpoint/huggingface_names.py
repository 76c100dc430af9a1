"""Hugging Face tensor names to the canonical ones, with the shapes that the config asks for.

One stored tensor may hold several canonical ones: the fused q, k, v and gate, up of Phi-3 as runs of rows, and the
experts of a layer as one tensor [E, N, K]. A `Source` names the run and what happens to its rows; nothing is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fewer.checkpoint.huggingface_config import FAMILIES
from fewer.checkpoint.safetensors_header import HeaderEntry
from fewer.errors import CheckpointError
from fewer.model.config import ModelConfig

PREFIXES = ("model.", "", "language_model.model.", "model.language_model.")  # the last two: decoders of larger models
HEADS = {"language_model.model.": "language_model.lm_head.weight"}
FLOATS = ("F32", "F16", "BF16", "F64")
_BUFFER = re.compile(r"self_attn\.rotary_emb\.inv_freq$")  # early files store what the config already says


@dataclass(frozen=True, slots=True)
class Source:
    """Where a canonical tensor lies."""

    tensor: str
    shape: tuple[int, ...]
    first_row: int = 0  # of a vector: its first element
    expert: int | None = None  # index into a stacked tensor [E, N, K]
    paired_heads: int = 0  # heads whose rotary rows must be interleaved; 0 = none
    plus_one: bool = False  # a norm stored as weight - 1


def sources(folder: Path, entries: Mapping[str, HeaderEntry], config: ModelConfig) -> dict[str, Source]:
    """Every canonical tensor of the model. One that is missing, of another shape, or left over raises
    `CheckpointError`."""
    return _Sources(folder, entries, config).collect()


class _Sources:
    def __init__(self, folder: Path, entries: Mapping[str, HeaderEntry], config: ModelConfig):
        self.folder, self.entries, self.config = folder, entries, config
        self.gemma = FAMILIES[config.architecture].gemma
        known = (prefix for prefix in PREFIXES if f"{prefix}embed_tokens.weight" in entries)
        self.prefix = next(known, PREFIXES[0])
        self.found: dict[str, Source] = {}

    def collect(self) -> dict[str, Source]:
        config = self.config
        if config.layers > len(self.entries):
            raise CheckpointError(
                f"'{self.folder}': config.json claims {config.layers} layers, but the files hold only "
                f"{len(self.entries)} tensors; download both again"
            )
        embedding = (config.vocab_size, config.hidden_size)
        self._add("embed.weight", f"{self.prefix}embed_tokens.weight", embedding)
        for layer in range(config.layers):
            here, stored = f"layers.{layer}", f"{self.prefix}layers.{layer}"
            self._norms(here, stored)
            self._attention(f"{here}.attention", f"{stored}.self_attn")
            if config.has_experts(layer):
                self._experts(here, stored)
            else:
                self._block(f"{here}.feed_forward", f"{stored}.mlp", config.intermediate_size)
        self._norm("norm", f"{self.prefix}norm")
        if not config.tied_embeddings:
            self._add("head.weight", HEADS.get(self.prefix, "lm_head.weight"), embedding)
        self._check_nothing_left()
        return self.found

    def _check(self, tensor: str, shape: tuple[int, ...]) -> None:
        entry = self.entries.get(tensor)
        wanted = f"which a {self.config.architecture} model of its config.json needs as {list(shape)}"
        if entry is None:
            raise CheckpointError(f"'{self.folder}' lacks the tensor '{tensor}', {wanted}")
        if entry.shape != shape:
            raise CheckpointError(f"tensor '{tensor}' in '{self.folder}' has the shape {list(entry.shape)}, {wanted}")
        if entry.dtype not in FLOATS:
            raise CheckpointError(
                f"tensor '{tensor}' in '{self.folder}' is stored as {entry.dtype}: allowed are {', '.join(FLOATS)}"
            )

    def _add(self, name: str, tensor: str, shape: tuple[int, ...], paired_heads: int = 0) -> None:
        """A stored tensor that is one canonical tensor."""
        self._check(tensor, shape)
        self.found[name] = Source(tensor, shape, paired_heads=paired_heads)

    def _norm(self, name: str, stored: str, width: int = 0, paired_heads: int = 0) -> None:
        tensor, shape = f"{stored}.weight", (width or self.config.hidden_size,)
        self._check(tensor, shape)
        self.found[f"{name}.weight"] = Source(tensor, shape, paired_heads=paired_heads, plus_one=self.gemma)

    def _norms(self, here: str, stored: str) -> None:
        placement = self.config.norm_placement
        if placement != "post":
            self._norm(f"{here}.attention_norm", f"{stored}.input_layernorm")
        if placement == "pre":
            self._norm(f"{here}.feed_forward_norm", f"{stored}.post_attention_layernorm")
            return
        self._norm(f"{here}.post_attention_norm", f"{stored}.post_attention_layernorm")
        self._norm(f"{here}.post_feed_forward_norm", f"{stored}.post_feedforward_layernorm")
        if placement == "sandwich":
            self._norm(f"{here}.feed_forward_norm", f"{stored}.pre_feedforward_layernorm")

    def _attention(self, here: str, stored: str) -> None:
        config = self.config
        query, key, hidden = config.heads * config.head_dim, config.kv_heads * config.head_dim, config.hidden_size
        rows = {"q": (query, config.heads), "k": (key, config.kv_heads), "v": (key, 0)}
        fused = f"{stored}.qkv_proj"
        for ending in ("weight", "bias") if config.attention_bias else ("weight",):
            columns = (hidden,) if ending == "weight" else ()
            if f"{fused}.{ending}" in self.entries:
                runs = {f"{here}.{part}.{ending}": run for part, run in rows.items()}
                self._add_runs(f"{fused}.{ending}", runs, columns)
                continue
            for part, (count, heads) in rows.items():
                self._add(f"{here}.{part}.{ending}", f"{stored}.{part}_proj.{ending}", (count, *columns), heads)
        self._add(f"{here}.o.weight", f"{stored}.o_proj.weight", (hidden, query))
        if config.output_bias:
            self._add(f"{here}.o.bias", f"{stored}.o_proj.bias", (hidden,))
        for part, heads in (("q", config.heads), ("k", config.kv_heads)):
            if config.qk_norm != "none":
                normed = heads if config.qk_norm == "all" else 1
                self._norm(f"{here}.{part}_norm", f"{stored}.{part}_norm", normed * config.head_dim, normed)

    def _add_runs(self, tensor: str, runs: Mapping[str, tuple[int, int]], columns: tuple[int, ...]) -> None:
        """A stored tensor that holds several, one below the other: name -> (rows, heads to pair)."""
        self._check(tensor, (sum(rows for rows, _ in runs.values()), *columns))
        first = 0
        for name, (rows, heads) in runs.items():
            self.found[name] = Source(tensor, (rows, *columns), first, paired_heads=heads)
            first += rows

    def _block(self, here: str, stored: str, inner: int, parts: tuple[str, str, str] | None = None) -> None:
        """A gated feed-forward block; `parts`: the stored names of gate, up and down."""
        gate, up, down = parts or ("gate_proj", "up_proj", "down_proj")
        hidden = self.config.hidden_size
        for ending in ("weight", "bias") if self.config.mlp_bias else ("weight",):
            columns = (hidden,) if ending == "weight" else ()
            if f"{stored}.gate_up_proj.{ending}" in self.entries:
                runs = {f"{here}.gate.{ending}": (inner, 0), f"{here}.up.{ending}": (inner, 0)}
                self._add_runs(f"{stored}.gate_up_proj.{ending}", runs, columns)
            else:
                self._add(f"{here}.gate.{ending}", f"{stored}.{gate}.{ending}", (inner, *columns))
                self._add(f"{here}.up.{ending}", f"{stored}.{up}.{ending}", (inner, *columns))
            self._add(
                f"{here}.down.{ending}",
                f"{stored}.{down}.{ending}",
                (hidden, inner) if ending == "weight" else (hidden,),
            )

    def _experts(self, here: str, layer: str) -> None:
        experts, hidden = self.config.experts, self.config.hidden_size
        assert experts is not None
        old = f"{layer}.block_sparse_moe"  # Mixtral's name
        stored = old if f"{old}.gate.weight" in self.entries else f"{layer}.mlp"
        self._add(f"{here}.router.weight", f"{stored}.gate.weight", (experts.count, hidden))
        if f"{stored}.experts.gate_up_proj" in self.entries:
            self._stacked_experts(f"{here}.experts", f"{stored}.experts", experts.count, experts.intermediate_size)
        else:
            parts = ("w1", "w3", "w2") if f"{stored}.experts.0.w1.weight" in self.entries else None
            for expert in range(experts.count):
                place = f"experts.{expert}"
                self._block(f"{here}.{place}", f"{stored}.{place}", experts.intermediate_size, parts)
        if shared := experts.shared_intermediate_size:
            self._block(f"{here}.shared_expert", f"{stored}.shared_expert", shared)
            self._add(f"{here}.shared_expert_gate.weight", f"{stored}.shared_expert_gate.weight", (1, hidden))

    def _stacked_experts(self, here: str, stored: str, count: int, inner: int) -> None:
        """gate_up_proj [E, 2·inner, d], gate above up, and down_proj [E, d, inner]."""
        hidden = self.config.hidden_size
        both, down = f"{stored}.gate_up_proj", f"{stored}.down_proj"
        self._check(both, (count, 2 * inner, hidden))
        self._check(down, (count, hidden, inner))
        for expert in range(count):
            self.found[f"{here}.{expert}.gate.weight"] = Source(both, (inner, hidden), 0, expert)
            self.found[f"{here}.{expert}.up.weight"] = Source(both, (inner, hidden), inner, expert)
            self.found[f"{here}.{expert}.down.weight"] = Source(down, (hidden, inner), 0, expert)

    def _check_nothing_left(self) -> None:
        """A tensor of a layer that nothing asks for means that the config describes another model."""
        used = {source.tensor for source in self.found.values()}
        for name in sorted(self.entries.keys() - used):
            if name.startswith(f"{self.prefix}layers.") and not _BUFFER.search(name):
                raise CheckpointError(
                    f"'{self.folder}' holds the tensor {name[:100]!r}, which a {self.config.architecture} model of its "
                    "config.json has no place for; download both again"
                )
