"""GGUF's tensor names to the canonical ones, with the shapes that the config asks for.

One stored tensor may hold several canonical ones as runs of rows: the fused q, k, v and gate, up of Phi-3, and the
experts of a layer, stacked [E, N, K]. A `Source` names the run and what must happen to its rows; nothing is decoded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fewer.checkpoint.gguf_config import FAMILIES
from fewer.checkpoint.gguf_header import SHOWN
from fewer.checkpoint.gguf_reader import GGUFFile
from fewer.errors import CheckpointError
from fewer.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Source:
    """Where a canonical tensor lies: rows of a stored one (of a vector: its elements)."""

    tensor: str
    shape: tuple[int, ...]
    first_row: int = 0
    paired_heads: int = 0  # heads whose rotary rows are stored half-split and must be interleaved; 0 = none


def sources(file: GGUFFile, config: ModelConfig) -> dict[str, Source]:
    """Every canonical tensor of the model. One that is missing or of another shape raises `CheckpointError`."""
    return _Sources(file, config).collect()


class _Sources:
    def __init__(self, file: GGUFFile, config: ModelConfig):
        self.file, self.config = file, config
        self.paired = not FAMILIES[config.architecture].interleaved
        self.found: dict[str, Source] = {}

    def collect(self) -> dict[str, Source]:
        config = self.config
        embedding = (config.vocab_size, config.hidden_size)
        self._add("embed.weight", "token_embd.weight", embedding)
        for layer in range(config.layers):
            self._norms(layer)
            self._attention(layer)
            if config.has_experts(layer):
                self._experts(layer)
            else:
                self._feed_forward(layer)
        self._add("norm.weight", "output_norm.weight", (config.hidden_size,))
        if not config.tied_embeddings:
            self._add("head.weight", "output.weight", embedding)
        self._check_depth()
        return self.found

    def _check(self, tensor: str, shape: tuple[int, ...]) -> None:
        entry = self.file.tensors.get(tensor)
        wanted = f"which a {self.config.architecture} model of the file's metadata needs as {list(shape)}"
        if entry is None:
            raise CheckpointError(f"'{self.file.path}' lacks the tensor '{tensor}', {wanted}; download it again")
        # ggml does not tell [1, d] from [d]
        if tuple(n for n in entry.shape if n > 1) != tuple(n for n in shape if n > 1):
            raise CheckpointError(
                f"tensor '{tensor}' in '{self.file.path}' has the shape {list(entry.shape)}, {wanted}; convert it again"
            )

    def _add(self, name: str, tensor: str, shape: tuple[int, ...], paired_heads: int = 0) -> None:
        """A stored tensor that is one canonical tensor."""
        self._check(tensor, shape)
        self.found[name] = Source(tensor, shape, 0, paired_heads if self.paired else 0)

    def _add_runs(self, tensor: str, names: dict[str, tuple[int, int]], columns: int | None) -> None:
        """A stored tensor that holds several, one below the other: name -> (rows, heads to pair)."""
        total = sum(rows for rows, _ in names.values())
        self._check(tensor, (total,) if columns is None else (total, columns))
        first = 0
        for name, (rows, heads) in names.items():
            shape = (rows,) if columns is None else (rows, columns)
            self.found[name] = Source(tensor, shape, first, heads if self.paired else 0)
            first += rows

    def _norms(self, layer: int) -> None:
        width, here, block = (self.config.hidden_size,), f"layers.{layer}", f"blk.{layer}"
        if self.config.norm_placement != "post":
            self._add(f"{here}.attention_norm.weight", f"{block}.attn_norm.weight", width)
            self._add(f"{here}.feed_forward_norm.weight", f"{block}.ffn_norm.weight", width)
        if self.config.norm_placement != "pre":
            self._add(f"{here}.post_attention_norm.weight", f"{block}.post_attention_norm.weight", width)
            self._add(f"{here}.post_feed_forward_norm.weight", f"{block}.post_ffw_norm.weight", width)

    def _attention(self, layer: int) -> None:
        config, here, block = self.config, f"layers.{layer}.attention", f"blk.{layer}"
        parts = {"q": (config.heads, True), "k": (config.kv_heads, True), "v": (config.kv_heads, False)}
        for ending in ("weight", "bias") if config.attention_bias else ("weight",):
            columns = config.hidden_size if ending == "weight" else None
            runs = {
                f"{here}.{part}.{ending}": (heads * config.head_dim, heads if rotary else 0)
                for part, (heads, rotary) in parts.items()
            }
            if f"{block}.attn_qkv.{ending}" in self.file.tensors:
                self._add_runs(f"{block}.attn_qkv.{ending}", runs, columns)
            else:
                for part, (name, run) in zip("qkv", runs.items(), strict=True):
                    self._add_runs(f"{block}.attn_{part}.{ending}", {name: run}, columns)
        self._add(
            f"{here}.o.weight",
            f"{block}.attn_output.weight",
            (config.hidden_size, config.heads * config.head_dim),
        )
        if config.output_bias:
            self._add(f"{here}.o.bias", f"{block}.attn_output.bias", (config.hidden_size,))
        for part, heads in (("q", config.heads), ("k", config.kv_heads)):
            if config.qk_norm != "none":
                normed = heads if config.qk_norm == "all" else 1
                width = (normed * config.head_dim,)
                self._add(f"{here}.{part}_norm.weight", f"{block}.attn_{part}_norm.weight", width, normed)

    def _feed_forward(self, layer: int) -> None:
        config, here, block = self.config, f"layers.{layer}.feed_forward", f"blk.{layer}"
        hidden, inner = config.hidden_size, config.intermediate_size
        for ending in ("weight", "bias") if config.mlp_bias else ("weight",):
            columns = hidden if ending == "weight" else None
            runs = {f"{here}.gate.{ending}": (inner, 0), f"{here}.up.{ending}": (inner, 0)}
            if f"{block}.ffn_gate.{ending}" in self.file.tensors:
                for part, (name, run) in zip(("gate", "up"), runs.items(), strict=True):
                    self._add_runs(f"{block}.ffn_{part}.{ending}", {name: run}, columns)
            else:
                self._add_runs(f"{block}.ffn_up.{ending}", runs, columns)
            down = (hidden, inner) if ending == "weight" else (hidden,)
            self._add(f"{here}.down.{ending}", f"{block}.ffn_down.{ending}", down)

    def _experts(self, layer: int) -> None:
        config, here, block = self.config, f"layers.{layer}", f"blk.{layer}"
        experts = config.experts
        assert experts is not None
        hidden, inner = config.hidden_size, experts.intermediate_size
        self._add(f"{here}.router.weight", f"{block}.ffn_gate_inp.weight", (experts.count, hidden))
        fused = f"{block}.ffn_gate_up_exps.weight" in self.file.tensors
        if fused:
            self._check(f"{block}.ffn_gate_up_exps.weight", (experts.count, 2 * inner, hidden))
        for part, rows, columns in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
            names = [f"{here}.experts.{expert}.{part}.weight" for expert in range(experts.count)]
            if fused and part != "down":  # of each expert, the rows of its gate and then those of its up
                for expert, name in enumerate(names):
                    first = (2 * expert + (part == "up")) * inner
                    self.found[name] = Source(f"{block}.ffn_gate_up_exps.weight", (rows, columns), first)
                continue
            if f"{block}.ffn_{part}.0.weight" in self.file.tensors:  # Mixtral files of early 2024
                for expert, name in enumerate(names):
                    self._add(name, f"{block}.ffn_{part}.{expert}.weight", (rows, columns))
                continue
            stacked = f"{block}.ffn_{part}_exps.weight"
            self._check(stacked, (experts.count, rows, columns))
            for expert, name in enumerate(names):
                self.found[name] = Source(stacked, (rows, columns), expert * rows)
        if shared := experts.shared_intermediate_size:
            for part, shape in (("gate", (shared, hidden)), ("up", (shared, hidden)), ("down", (hidden, shared))):
                self._add(f"{here}.shared_expert.{part}.weight", f"{block}.ffn_{part}_shexp.weight", shape)
            self._add(f"{here}.shared_expert_gate.weight", f"{block}.ffn_gate_inp_shexp.weight", (1, hidden))

    def _check_depth(self) -> None:
        for name in self.file.tensors:
            head, _, rest = name.partition(".")
            layer = rest.partition(".")[0]
            if head == "blk" and layer.isdecimal() and (len(layer) > 9 or int(layer) >= self.config.layers):
                raise CheckpointError(
                    f"'{self.file.path}' holds the tensor {name[:SHOWN]!r}, but its metadata gives the model only "
                    f"{self.config.layers} layers; convert it again"
                )


def rows_and_columns(shape: tuple[int, ...]) -> tuple[int, int]:
    """A stored tensor as a matrix of rows: [E, N, K] -> (E·N, K), a vector -> (1, n)."""
    return math.prod(shape[:-1]), shape[-1] if shape else 1
