"""From options to a recipe and a loaded model. The first thing here that imports torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewer.errors import UsageError

if TYPE_CHECKING:
    from fewer.language_model import LanguageModel
    from fewer.recipe import Recipe


def prepare(threads: int | None = None) -> None:
    """Set up OpenMP; must come before torch is imported."""
    from fewer.engine.threads import prepare

    prepare(threads)


def choose_recipe(
    weights: str | None = None,
    cache: str | None = None,
    decoding: str | None = None,
    experts: str | None = None,
    dtype: str | None = None,
    file: Path | None = None,
) -> Recipe:
    """The recipe of the file, or the default one, with the given slots replaced. Raises UsageError."""
    from fewer.recipe import Recipe

    recipe = Recipe()
    if file is not None:
        recipes = Recipe.from_yaml(file)
        if len(recipes) != 1:
            raise UsageError(f"{file} holds {len(recipes)} recipes, but one model runs: keep one, or use fewer compare")
        recipe = recipes[0]
    given: dict[str, Any] = {
        "weights": weights,
        "cache": cache,
        "decoding": decoding,
        "experts": experts,
        "dtype": dtype,
    }
    return dataclasses.replace(recipe, **{slot: spec for slot, spec in given.items() if spec is not None})


def parse_recipes(texts: list[str]) -> list[Recipe]:
    """Each text is a recipe (`weights=int4 cache=…`) or a YAML file of some."""
    from fewer.recipe import Recipe

    recipes: list[Recipe] = []
    for text in texts:
        is_file = text.endswith((".yaml", ".yml")) and "=" not in text
        recipes += Recipe.from_yaml(Path(text)) if is_file else [Recipe.parse(text)]
    return recipes


def load_model(
    name: str, recipe: Recipe, device: str | None = None, context: int | None = None, gradients: bool = False
) -> LanguageModel:
    """Load with bars for what takes long."""
    from fewer.cli.progress import Bars
    from fewer.language_model import load

    with Bars() as bars:
        return load(
            name,
            recipe=recipe,
            device=device,
            context=context,
            progress=bars,
            on_matrix=bars.on_matrix,
            gradients=gradients,
        )
