"""A `Tokenizer` from a folder in Hugging Face layout: tokenizer.json and the small files beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import tokenizers

from fewer.checkpoint.tokenizer import END_NAMES, Spelling, Tokenizer, Vocabulary
from fewer.checkpoint.tokenizer_gguf import SAVED, ByteLevelEncoder, read_saved
from fewer.errors import CheckpointError

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def read_tokenizer(folder: Path) -> Tokenizer:
    """Raises CheckpointError where tokenizer.json is missing or damaged."""
    if (folder / SAVED).is_file():
        return read_saved(folder / SAVED)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no tokenizer.json: save the tokenizer again with transformers (save_pretrained writes it)"
        )
    model = _load(path)
    config = _json(folder / "tokenizer_config.json")
    added = model.get_added_tokens_decoder()
    special = frozenset(index for index, token in added.items() if token.special)
    tokens = [model.id_to_token(index) or "" for index in range(_size(model))]
    names = _json(folder / "special_tokens_map.json")
    bos, eos = (_named(model, config, names, key) for key in ("bos_token", "eos_token"))
    vocabulary = Vocabulary(
        tokens=tokens,
        spelling=_spelling(model, path),
        special=special,
        literal=frozenset(added),
        bos=bos,
        eos=eos,
        ends=_ends(folder, eos, special, tokens),
        adds_bos=_adds_bos(model, config, bos),
        strips_space=_strips_space(model),
    )
    return Tokenizer(
        vocabulary, ByteLevelEncoder(model), _template(folder, config), lambda other: _copy(folder, other, vocabulary)
    )


def _copy(folder: Path, other: Path, vocabulary: Vocabulary) -> None:
    """The files, and in place of the model's own configuration its tokens that end generation."""
    for name in FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, other / name)
    ends = json.dumps({"eos_token_id": sorted(vocabulary.ends)})
    (other / "generation_config.json").write_text(ends, encoding="utf-8")


def _load(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except BaseException as fault:  # the library raises bare Exception, and on some damage a PanicException
        if isinstance(fault, KeyboardInterrupt | SystemExit):
            raise
        raise CheckpointError(f"{path} is not a tokenizer that can be read: {fault}") from None


def _size(model: tokenizers.Tokenizer) -> int:
    return max([model.get_vocab_size(with_added_tokens=True) - 1, *model.get_added_tokens_decoder()]) + 1


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as fault:
        raise CheckpointError(f"{path} is not JSON that can be read: {fault}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def _state(part: object) -> dict[str, Any]:
    """The description of one part of the pipeline, as tokenizer.json has it; {} for a part that is not there."""
    return json.loads(cast(bytes, part.__getstate__())) if part is not None else {}


def _steps(description: Mapping[str, Any], listed_as: str) -> list[dict[str, Any]]:
    """A pipeline part's steps, nested sequences unrolled."""
    inner = description.get(listed_as)
    if description.get("type") == "Sequence" and isinstance(inner, list):
        return [step for part in inner for step in _steps(part, listed_as)]
    return [dict(description)] if description else []


def _spelling(model: tokenizers.Tokenizer, path: Path) -> Spelling:
    kinds = {step["type"] for step in _steps(_state(model.decoder), "decoders")}
    if "ByteLevel" in kinds:
        return "byte-level"
    if kinds & {"Metaspace", "ByteFallback", "Replace"}:
        return "sentencepiece"
    raise CheckpointError(
        f"{path} decodes by {', '.join(sorted(kinds)) or 'nothing'}, which is not supported: "
        "allowed are ByteLevel, Metaspace and ByteFallback"
    )


def _strips_space(model: tokenizers.Tokenizer) -> bool:
    for step in _steps(_state(model.decoder), "decoders"):
        if step["type"] == "Strip" and step.get("content") == " " and step.get("start", 0) > 0:
            return True
        if step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never":
            return True
    return False


def _named(model: tokenizers.Tokenizer, config: Mapping[str, Any], names: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key) or names.get(key)
    if isinstance(value, dict):
        value = value.get("content")
    return model.token_to_id(value) if isinstance(value, str) else None


def _adds_bos(model: tokenizers.Tokenizer, config: Mapping[str, Any], bos: int | None) -> bool:
    wish = config.get("add_bos_token")
    if isinstance(wish, bool):
        return wish
    return bos is not None and model.encode("", add_special_tokens=True).ids[:1] == [bos]


def _ends(folder: Path, eos: int | None, special: frozenset[int], tokens: list[str]) -> frozenset[int]:
    ends = [eos, *(index for index in special if tokens[index] in END_NAMES)]
    for name in ("generation_config.json", "config.json"):
        value = _json(folder / name).get("eos_token_id")
        ends.extend(value if isinstance(value, list) else [value])
    return frozenset(index for index in ends if isinstance(index, int) and 0 <= index < len(tokens))


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, or the entry of tokenizer_config.json: a text, or a list of which "default" is taken."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (ValueError, OSError) as fault:
            raise CheckpointError(f"{path} cannot be read as UTF-8 text: {fault}") from None
    value = config.get("chat_template")
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None
