"""A `Tokenizer` from the `tokenizer.*` metadata of a GGUF file.

`tokenizer.ggml.model` is "gpt2" for byte-level BPE (with its cutting rule in `tokenizer.ggml.pre`) and "llama" for
SentencePiece-style BPE (Llama 1 and 2, Mistral, Gemma, Phi-3).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from fewer.checkpoint.pre_tokenizers import PreTokenizerRule, build_normalizer, build_pre_tokenizer, find_rule
from fewer.checkpoint.sentencepiece import SentencePieceModel, SpecialTokens
from fewer.checkpoint.tokenizer import END_NAMES, Encoder, Tokenizer, Vocabulary
from fewer.errors import CheckpointError

SAVED = "tokenizer.fewer.json"  # the metadata in a folder of ours

# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def read_tokenizer(metadata: Mapping[str, object]) -> Tokenizer:
    """Raises CheckpointError where a key is missing, contradicts another one, or names an unknown kind."""
    kind = _text(metadata, "model")
    if kind is None:
        raise CheckpointError("the file holds no tokenizer (the key tokenizer.ggml.model is missing): use a full model")
    if kind not in ("gpt2", "llama", "gemma"):
        raise CheckpointError(f"the tokenizer's kind '{kind}' is not supported: allowed are gpt2, llama")
    tokens = _array(metadata, "tokens")
    if not tokens or not all(isinstance(token, str) for token in tokens):
        raise CheckpointError("tokenizer.ggml.tokens is empty or not a list of texts: the file is damaged")
    types = _types(metadata, tokens)
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise CheckpointError(
            f"tokenizer.chat_template is a {type(template).__name__}, not a text: the file is damaged"
        )
    read = _read_byte_level if kind == "gpt2" else _read_sentencepiece
    vocabulary, encoder = read(metadata, tokens, types)
    return Tokenizer(vocabulary, encoder, template, lambda folder: _save(metadata, folder))


def _save(metadata: Mapping[str, object], folder: Path) -> None:
    """What was read, as JSON; 32-bit scores survive the way through decimal text."""
    kept = {key: value for key, value in metadata.items() if key.startswith("tokenizer.") or key == "general.name"}
    kept = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in kept.items()}
    (folder / SAVED).write_text(json.dumps(kept, ensure_ascii=False), encoding="utf-8")


def read_saved(path: Path) -> Tokenizer:
    """The tokenizer that `_save` wrote. Raises CheckpointError."""
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as fault:
        raise CheckpointError(f"{path} is not JSON that can be read: {fault}") from None
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path} holds a {type(metadata).__name__}, not an object")
    return read_tokenizer(metadata)


# ── byte-level BPE ──────────────────────────────────────────────────────────────────────────────────────────────────


class ByteLevelEncoder:
    """Byte-level BPE by the tokenizers library."""

    def __init__(self, model: tokenizers.Tokenizer) -> None:
        self._model = model
        self._lock = threading.Lock()  # how special tokens are read is a switch on the shared model

    def encode(self, text: str, special: bool) -> list[int]:
        with self._lock:
            if self._model.encode_special_tokens == special:
                self._model.encode_special_tokens = not special
            return self._model.encode(text, add_special_tokens=False).ids


def _read_byte_level(
    metadata: Mapping[str, object], tokens: Sequence[str], types: Sequence[int]
) -> tuple[Vocabulary, Encoder]:
    rule = find_rule(_text(metadata, "pre") or "default")
    special = frozenset(index for index, kind in enumerate(types) if kind in (CONTROL, UNKNOWN))
    added = frozenset(index for index, kind in enumerate(types) if kind == USER_DEFINED)
    model = _bpe(rule, tokens, _array(metadata, "merges"))
    model.add_special_tokens(
        [tokenizers.AddedToken(tokens[i], special=True, normalized=False) for i in sorted(special)]
    )
    model.add_tokens([tokenizers.AddedToken(tokens[i], special=False, normalized=False) for i in sorted(added)])
    vocabulary = Vocabulary(
        tokens=tokens,
        spelling="byte-level",
        special=special,
        literal=special | added,
        bos=_token_id(metadata, "bos_token_id", tokens),
        eos=_token_id(metadata, "eos_token_id", tokens),
        ends=_ends(metadata, tokens, special),
        adds_bos=_flag(metadata, "add_bos_token", rule.adds_bos),
    )
    return vocabulary, ByteLevelEncoder(model)


def _bpe(rule: PreTokenizerRule, tokens: Sequence[str], merges: Sequence[Any]) -> tokenizers.Tokenizer:
    ids = {token: index for index, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        raise CheckpointError(f"tokenizer.ggml.tokens repeats {len(tokens) - len(ids)} of its {len(tokens)} tokens")
    # A merge is "left right"; the space of a pair is never its first character.
    pairs = [(text[: (at := text.find(" ", 1))], text[at + 1 :]) for text in merges]
    try:
        bpe = tokenizers.models.BPE(vocab=ids, merges=pairs, ignore_merges=rule.whole_words)
    except Exception as fault:  # the library raises bare Exception
        raise CheckpointError(f"tokenizer.ggml.merges does not fit tokenizer.ggml.tokens: {fault}") from None
    model = tokenizers.Tokenizer(bpe)
    model.pre_tokenizer = build_pre_tokenizer(rule)
    normalizer = build_normalizer(rule)
    if normalizer is not None:
        model.normalizer = normalizer
    return model


# ── SentencePiece-style BPE ─────────────────────────────────────────────────────────────────────────────────────────


class SentencePieceEncoder:
    """Special tokens are cut out first; each stretch of text between them is encoded on its own."""

    def __init__(
        self,
        model: SentencePieceModel,
        special: Mapping[str, int],
        added: Mapping[str, int],
        adds_space: bool,
        swallows_space: frozenset[int],
    ) -> None:
        self._model = model
        self._added = SpecialTokens(added)
        self._all = SpecialTokens({**special, **added})
        self._adds_space = adds_space
        self._swallows_space = swallows_space

    def encode(self, text: str, special: bool) -> list[int]:
        result: list[int] = []
        for part in (self._all if special else self._added).split(text):
            if isinstance(part, int):
                result.append(part)
                continue
            if result and result[-1] in self._swallows_space:
                part = part.lstrip()
            if part:
                result.extend(self._model.encode(" " + part if self._adds_space else part))
        return result


def _read_sentencepiece(
    metadata: Mapping[str, object], tokens: Sequence[str], types: Sequence[int]
) -> tuple[Vocabulary, Encoder]:
    scores = _array(metadata, "scores")
    if len(scores) != len(tokens):
        raise CheckpointError(f"tokenizer.ggml.scores has {len(scores)} entries for {len(tokens)} tokens")
    special = frozenset(index for index, kind in enumerate(types) if kind in (CONTROL, UNKNOWN))
    added = frozenset(index for index, kind in enumerate(types) if kind == USER_DEFINED)
    hidden = special | frozenset(index for index, kind in enumerate(types) if kind == BYTE)
    unknown = _token_id(metadata, "unknown_token_id", tokens)
    adds_space = _flag(metadata, "add_space_prefix", True)
    bos = _token_id(metadata, "bos_token_id", tokens)
    encoder = SentencePieceEncoder(
        SentencePieceModel(tokens, scores, hidden, 0 if unknown is None else unknown),
        {tokens[index]: index for index in special},
        {tokens[index]: index for index in added},
        adds_space,
        _swallowing(metadata, tokens, special | added),
    )
    vocabulary = Vocabulary(
        tokens=tokens,
        spelling="sentencepiece",
        special=special,
        literal=special | added,
        bos=bos,
        eos=_token_id(metadata, "eos_token_id", tokens),
        ends=_ends(metadata, tokens, special | added),
        adds_bos=_flag(metadata, "add_bos_token", True),
        strips_space=adds_space,
    )
    return vocabulary, encoder


def _swallowing(metadata: Mapping[str, object], tokens: Sequence[str], special: frozenset[int]) -> frozenset[int]:
    """Special tokens that take the white space after them. Phi-3 has them, and GGUF has no key that says so."""
    name = str(metadata.get("general.name", "")).lower()
    if "phi-3" not in name and "phi3" not in name:
        return frozenset()
    return frozenset(index for index in special if tokens[index] not in ("<unk>", "<s>", "<|endoftext|>"))


# ── keys ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _text(metadata: Mapping[str, object], key: str) -> str | None:
    value = metadata.get(f"tokenizer.ggml.{key}")
    if value is not None and not isinstance(value, str):
        raise CheckpointError(f"tokenizer.ggml.{key} is a {type(value).__name__}, not a text: the file is damaged")
    return value


def _flag(metadata: Mapping[str, object], key: str, default: bool) -> bool:
    value = metadata.get(f"tokenizer.ggml.{key}")
    return default if value is None else bool(value)


def _array(metadata: Mapping[str, object], key: str) -> Sequence[Any]:
    value: Any = metadata.get(f"tokenizer.ggml.{key}")
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return value
    raise CheckpointError(
        f"tokenizer.ggml.{key} is {'missing' if value is None else 'not a list'}: the file is damaged"
    )


def _token_id(metadata: Mapping[str, object], key: str, tokens: Sequence[str]) -> int | None:
    value: Any = metadata.get(f"tokenizer.ggml.{key}")
    if value is None:
        return None
    if not 0 <= int(value) < len(tokens):
        raise CheckpointError(f"tokenizer.ggml.{key} is {value}, outside the vocabulary of {len(tokens)} tokens")
    return int(value)


def _types(metadata: Mapping[str, object], tokens: Sequence[str]) -> list[int]:
    """token_type, in which tokens that the file itself uses as marks are control tokens whatever it calls them."""
    given = "tokenizer.ggml.token_type" in metadata
    types = list(_array(metadata, "token_type")) if given else [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise CheckpointError(f"tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens")
    for key in ("bos_token_id", "eos_token_id", "eot_token_id", "eom_token_id"):
        index = _token_id(metadata, key, tokens)
        if index is not None:
            types[index] = CONTROL
    for index, kind in enumerate(types):
        if kind == USER_DEFINED and tokens[index] in END_NAMES:
            types[index] = CONTROL
    return types


def _ends(metadata: Mapping[str, object], tokens: Sequence[str], special: frozenset[int]) -> frozenset[int]:
    named = {_token_id(metadata, key, tokens) for key in ("eos_token_id", "eot_token_id", "eom_token_id")}
    return frozenset({index for index in named if index is not None} | {i for i in special if tokens[i] in END_NAMES})
