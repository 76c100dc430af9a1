"""`fewer inspect`: what a checkpoint holds, without loading it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewer.cli import options as o
from fewer.cli.loading import prepare
from fewer.cli.output import print_json, print_table, size, table

if TYPE_CHECKING:
    from fewer.checkpoint.checkpoint import Checkpoint
    from fewer.model.config import ModelConfig

KV_ELEMENT_BYTES = 2  # bfloat16, the default dtype


def inspect(
    model: o.ModelArgument = o.MODEL_DEFAULT,
    tensors: Annotated[bool, typer.Option("--tensors", "-t", help="Also list every tensor.")] = False,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Show a model's shape, tensors, bits a weight and bytes of keys and values a token."""
    prepare()
    from fewer.checkpoint.open import open_checkpoint
    from fewer.cli.progress import Bars

    with Bars() as bars:
        checkpoint = open_checkpoint(model, bars)
    facts = describe(checkpoint)
    if json:
        print_json(facts)
        return
    print_table(table(("fact", "value"), [(key, value) for key, value in _headline(facts)]))
    kinds = [
        (kind, str(entry["tensors"]), f"{entry['weights']:,}", size(entry["bytes"]))
        for kind, entry in facts["kinds"].items()
    ]
    print_table(table(("stored as", "tensors", "weights", "size"), kinds, right=("tensors", "weights", "size")))
    if tensors:
        rows = [
            (t["name"], " × ".join(map(str, t["shape"])), t["kind"], f"{t['bits_per_weight']:.2f}", size(t["bytes"]))
            for t in facts["tensors"]
        ]
        print_table(
            table(("tensor", "shape", "stored as", "bits a weight", "size"), rows, right=("bits a weight", "size"))
        )


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """What `--json` prints."""
    config = checkpoint.config
    tensors, kinds = [], dict[str, dict[str, int]]()
    for name in checkpoint.names():
        stored = checkpoint[name]
        tensors.append(
            {
                "name": name,
                "shape": list(stored.shape),
                "kind": stored.kind,
                "bytes": stored.nbytes,
                "bits_per_weight": stored.bits_per_weight,
            }
        )
        entry = kinds.setdefault(stored.kind, {"tensors": 0, "weights": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["weights"] += stored.elements
        entry["bytes"] += stored.nbytes
    weights = sum(entry["weights"] for entry in kinds.values())
    nbytes = sum(entry["bytes"] for entry in kinds.values())
    return {
        "path": str(checkpoint.path),
        "kind": checkpoint.kind,
        "fingerprint": checkpoint.fingerprint(),
        "config": dataclasses.asdict(config),
        "weights": weights,
        "weight_bytes": nbytes,
        "bits_per_weight": 8 * nbytes / max(weights, 1),
        "kv_bytes_per_token": kv_bytes_per_token(config),
        "kinds": kinds,
        "tensors": tensors,
    }


def kv_bytes_per_token(config: ModelConfig) -> int:
    """Keys and values of one token in every layer, in bfloat16 and with the full cache."""
    return 2 * config.layers * config.kv_heads * config.head_dim * KV_ELEMENT_BYTES


def _headline(facts: dict[str, Any]) -> list[tuple[str, str]]:
    config = facts["config"]
    experts = config["experts"]
    return [
        ("file", f"{facts['path']} ({facts['kind']})"),
        ("architecture", config["architecture"]),
        ("weights", f"{facts['weights'] / 1e6:,.1f} million, {facts['bits_per_weight']:.2f} bits each"),
        ("size", size(facts["weight_bytes"])),
        ("layers", str(config["layers"])),
        ("hidden size", f"{config['hidden_size']}, feed-forward {config['intermediate_size']}"),
        ("heads", f"{config['heads']} of {config['head_dim']}, {config['kv_heads']} for keys and values"),
        *([("experts", f"{experts['count']}, {experts['per_token']} a token")] if experts else []),
        ("vocabulary", f"{config['vocab_size']:,}"),
        ("context", f"{config['context_length']:,} tokens"),
        ("keys and values", f"{size(facts['kv_bytes_per_token'])} a token in bfloat16"),
        ("fingerprint", facts["fingerprint"][:16]),
    ]
