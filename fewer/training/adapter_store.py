"""Where adapters lie, and which one a model gets: the file that a spec names, one that was fitted here, a shipped one.

Shipped adapters are `fewer/adapters/<method>/<alias>.safetensors`, those of this machine
`FEWER_HOME/adapters/<method>/<alias or fingerprint>.safetensors`. What decides is never the name but the model's
fingerprint inside.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import fewer
from fewer.checkpoint.aliases import ALIASES
from fewer.checkpoint.checkpoint import Checkpoint
from fewer.errors import CheckpointError
from fewer.home import home
from fewer.registry import Choice, Slot
from fewer.training.adapters import Adapter, load_adapter

SHIPPED = Path(fewer.__file__).parent / "adapters"


def own_path(method: str, model: str, fingerprint: str) -> Path:
    """Where `fewer train` puts the adapter of a model, given the name it was loaded by."""
    return home() / "adapters" / method / f"{model if model in ALIASES else fingerprint[:16]}.safetensors"


def with_adapters(choices: Mapping[Slot, Choice], checkpoint: Checkpoint) -> dict[Slot, Choice]:
    """The choices, each method that is fitted (or takes what another learns) together with its adapter for this model.
    A config whose `wants_adapter` is false says all there is to know by itself. Raises CheckpointError."""
    return {
        slot: choice.with_adapter(find_adapter(choice, checkpoint))
        if choice.method.learnt_by is not None and getattr(choice.config, "wants_adapter", True)
        else choice
        for slot, choice in choices.items()
    }


def find_adapter(choice: Choice, checkpoint: Checkpoint) -> Adapter:
    """The adapter that the choice's config names, else the first that was fitted to this model."""
    method, fingerprint = choice.method.learnt_by or choice.method.name, checkpoint.fingerprint()
    named: str | None = getattr(choice.config, "adapter", None)
    if named is not None:
        return load_adapter(Path(named).expanduser(), method, fingerprint)
    fitted_to: list[str] = []
    for path in _files(method):
        adapter = load_adapter(path, method)
        if adapter.provenance.model == fingerprint:
            return adapter
        fitted_to.append(path.stem)
    others = f", only to {', '.join(fitted_to)}" if fitted_to else ""
    needs = f"{choice.method.slot}={choice.method.name}"
    needs += "" if method == choice.method.name else f" takes what {method} learns, which"
    raise CheckpointError(
        f"{needs} has not been fitted to this model (fingerprint {fingerprint[:12]}…){others}: "
        f"run `fewer train {method}` with it first"
    )


def _files(method: str) -> Iterator[Path]:
    for folder in (home() / "adapters", SHIPPED):
        yield from sorted((folder / method).glob("*.safetensors"))
