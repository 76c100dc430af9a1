"""fewer: run, compare and compress open language models with fewer bits, tokens, experts and steps."""

__version__ = "0.1.0"

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fewer.decoding.sampling import SamplingConfig
    from fewer.language_model import Generation, LanguageModel, compress, load
    from fewer.recipe import Recipe

_WHERE = {
    "Generation": "fewer.language_model",
    "LanguageModel": "fewer.language_model",
    "Recipe": "fewer.recipe",
    "SamplingConfig": "fewer.decoding.sampling",
    "compress": "fewer.language_model",
    "load": "fewer.language_model",
}
__all__ = ["Generation", "LanguageModel", "Recipe", "SamplingConfig", "compress", "load"]


def __getattr__(name: str) -> Any:
    """Import on first use: `import fewer` alone stays fast, and OpenMP is set up before torch loads."""
    if name not in _WHERE:
        raise AttributeError(f"module 'fewer' has no attribute '{name}'")
    import importlib

    from fewer.engine import threads

    threads.prepare()
    return getattr(importlib.import_module(_WHERE[name]), name)
