"""Small vocabularies in both layouts: the same tokens as a tokenizer.json and as GGUF metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers, trainers

TEXTS = [
    "the cat sat on the mat",
    " leading space, and two  spaces;   three. ",
    "Don't, WE'LL, I'd, they've, it's, 'tis",
    "In 2024, 1234567 people paid $3.50 (+5%).",
    "def add(a, b):\n    return a + b\n\n\tif x != y: pass  # TODO\r\n",
    "snake_case camelCase HTTPServer ABCdef",
    "Grüße, naïve café, cafe\u0301, Ελλάδα, Привет мир",
    "日本語のテキストと漢字、カタカナ。한국어 中文",
    "emoji 😀👩\u200d👩\u200d👧 and flags 🇩🇪",
    "\n\n\n   \n\t \u00a0\u3000end",
    "https://example.org/a?b=c&d=e#f",
    "...!!! ??? --- === ///\n//",
    "x",
    " ",
    "\n",
]
CORPUS = [text for text in TEXTS for _ in range(3)] + ["the them then there cat catch mat match add addition return"]
SPECIAL = ["<unk>", "<s>", "</s>"]


def byte_level(rule: pre_tokenizers.PreTokenizer, nfc: bool = False, vocab_size: int = 400) -> tokenizers.Tokenizer:
    """Byte-level BPE with special tokens, cut by `rule` (which ends in bytes as characters)."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer, model.decoder = rule, decoders.ByteLevel()
    if nfc:
        model.normalizer = normalizers.NFC()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(CORPUS, trainer)
    return model


def sentencepiece(adds_space: bool, vocab_size: int = 500) -> tuple[tokenizers.Tokenizer, list[float]]:
    """BPE over ▁ with bytes for unknown characters, as Llama 2 (`adds_space`) and Gemma have it; and the scores."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 259, limit_alphabet=60, show_progress=False)
    # Which of the rare characters enter the alphabet is chance; the one that tests need spelled in bytes never does.
    trained.train_from_iterator([text.replace("😀", "") for text in CORPUS], trainer)
    pieces = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    ids = {token: index for index, token in enumerate(tokens)}
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(pieces))]
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    model = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    spaces = normalizers.Replace(" ", "▁")
    model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if adds_space else spaces
    strip = [decoders.Strip(" ", 1, 0)] if adds_space else []
    model.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    model.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return model, scores


def write_folder(folder: Path, model: tokenizers.Tokenizer, **config: Any) -> Path:
    """tokenizer.json and tokenizer_config.json as transformers writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def metadata_of(model: tokenizers.Tokenizer, scores: list[float] | None = None, **more: Any) -> dict[str, Any]:
    """What a converter to GGUF writes of the same tokenizer."""
    described = json.loads(model.to_str())["model"]
    tokens = sorted(described["vocab"], key=described["vocab"].__getitem__)
    kinds = [3 if token in SPECIAL else 6 if token.startswith("<0x") else 1 for token in tokens]
    kinds[0] = 2
    values: dict[str, Any] = {"tokens": tokens, "token_type": kinds, "bos_token_id": 1, "eos_token_id": 2}
    if scores is None:
        values |= {"model": "gpt2", "merges": [" ".join(merge) for merge in described["merges"]]}
    else:
        values |= {"model": "llama", "scores": scores, "unknown_token_id": 0}
    return {f"tokenizer.ggml.{key}": value for key, value in (values | more).items()}
