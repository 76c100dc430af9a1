"""Specs and recipes: what is allowed is named, and nothing wrong gets through."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewer import registry
from fewer.cache import SinkWindowConfig
from fewer.errors import UsageError
from fewer.recipe import Recipe
from fewer.registry import SLOTS, method, methods, parse_spec


def test_a_spec_sets_fields_of_the_config() -> None:
    choice = parse_spec("cache", "sink-window:sinks=8,window=100,renumber=yes")
    assert choice.config == SinkWindowConfig(8, 100, True)
    assert str(choice) == "sink-window:sinks=8,window=100,renumber=True"
    assert parse_spec("cache", str(choice)) == choice


@pytest.mark.parametrize(
    ("slot", "spec", "message"),
    [
        ("cache", "sink-windw", r"unknown cache method 'sink-windw': allowed are .*full, .*did you mean 'sink-window'"),
        ("cache", "sink-window:sink=1", r"unknown key 'sink' .* allowed are sinks, window, renumber .*'sinks'"),
        ("cache", "sink-window:sinks=many", r"'sink-window:sinks=many' is not a whole number"),
        ("cache", "sink-window:sinks=1,sinks=2", r"sets 'sinks' twice"),
        ("cache", "sink-window:sinks", r"'sinks' in the spec .* is not key=value"),
        ("cache", "sink-window:renumber=perhaps", r"is not true or false"),
        ("cache", "full:size=3", r"takes no settings"),
        ("weights", "int4:group=48", r"group=48 is not allowed: choose one of 32, 64, 128"),
        ("weights", "int4:head=int2", r"choose one of int8, int4, dense"),
    ],
)
def test_wrong_specs_name_what_is_allowed(slot, spec, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError, match=message):
        parse_spec(slot, spec)


def test_a_recipe_reads_the_same_from_text_mapping_and_yaml(tmp_path: Path) -> None:
    text = "weights=int4:group=64 cache=sink-window dtype=bfloat16"
    (tmp_path / "r.yaml").write_text("recipes:\n- weights: int4:group=64\n  cache: sink-window\n  dtype: bfloat16\n")
    assert [Recipe.parse(text)] == Recipe.from_yaml(tmp_path / "r.yaml")
    assert Recipe.from_mapping(Recipe.parse(text).to_mapping()) == Recipe.parse(text)


@pytest.mark.parametrize("content", ["", "- 3", "weights: [1]", "colour: red", "a: b: c"])
def test_a_wrong_recipe_file_is_one_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(UsageError):
        Recipe.from_yaml(tmp_path / "r.yaml")


NEEDS = {"draft-model": "model=smollm2"}  # settings without which a method has nothing to run


def test_every_registered_method_has_a_summary_and_default_settings_that_parse() -> None:
    for slot in SLOTS:
        for entry in methods(slot):
            assert entry.summary and len(entry.summary) < 120, entry.name
            spec = f"{entry.name}:{NEEDS[entry.name]}" if entry.name in NEEDS else entry.name
            assert parse_spec(slot, spec).method is entry


@pytest.mark.parametrize("name", NEEDS)
def test_a_method_that_needs_a_setting_says_how_to_write_it(name: str) -> None:
    with pytest.raises(UsageError, match=f"write {name}:model=NAME"):
        parse_spec("decoding", name)


def test_an_incompatible_recipe_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))  # what is registered here is gone afterwards
    reason = "it cannot take back rejected guesses"
    method("one-way", slot="cache", lossless=True, conflicts={"decoding:prompt-lookup": reason})(object)
    assert Recipe(cache="one-way").cache == "one-way"
    for text in ("cache=one-way decoding=prompt-lookup", "decoding=prompt-lookup:tokens=3 cache=one-way"):
        with pytest.raises(UsageError, match=f"cache=one-way cannot be combined with decoding=prompt-lookup: {reason}"):
            Recipe.parse(text)


def test_a_recipe_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"weights: \xff\xfe")
    with pytest.raises(UsageError, match="no UTF-8 text"):
        Recipe.from_yaml(tmp_path / "r.yaml")
