"""A tiny random model on disk, with a tokenizer and a chat template: what tests of verbs and examples load by path."""

from __future__ import annotations

from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, pre_tokenizers, trainers

from fewer.checkpoint import tokenizer_folder
from fewer.checkpoint.export import write_folder
from fewer.checkpoint.tokenizer import Tokenizer
from fewer.formats import DenseFormat
from fewer.model.config import ModelConfig
from tests.random_model import config_of, random_weights

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "the cat sat on the mat and the dog sat on the log",
    "def add(left, right):\n    return left + right\n",
    "Every file is one idea, and every idea is one file.",
]


def train_bpe(vocab_size: int = 320) -> tokenizers.Tokenizer:
    """Byte-level BPE with merges of a few sentences and ChatML's special tokens."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=sorted(alphabet))
    model.train_from_iterator(CORPUS, trainer)
    return model


def write_tokenizer(folder: Path, chat_template: str | None = CHATML) -> Tokenizer:
    """tokenizer.json and the chat template in an existing folder."""
    train_bpe().save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template)
    return tokenizer_folder.read_tokenizer(folder)


def write_model(
    folder: Path,
    seed: int = 0,
    chat_template: str | None = CHATML,
    context: int = 256,
    layers: int = 2,
    spread: float = 2.0,
) -> Path:
    """A small model in `folder`, dense in bfloat16; the same weights for the same seed. With a small `spread` it says
    again and again what it has just read."""
    source = folder.with_name(f"{folder.name}-tokenizer")
    source.mkdir(parents=True)
    tokenizer = write_tokenizer(source, chat_template)
    config = config_of(
        vocab_size=tokenizer.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        layers=layers,
        head_dim=16,
        context_length=context,
        tied_embeddings=True,
    )
    weights = random_weights(config, seed, spread)
    write_folder(
        folder,
        config,
        ((name, DenseFormat(weights(name).to(torch.bfloat16))) for name in matrix_names(config)),
        ((name, weights(name)) for name in vector_names(config)),
        tokenizer,
        {"source": "random"},
    )
    return folder


def matrix_names(config: ModelConfig) -> list[str]:
    parts = [f"attention.{part}" for part in "qkvo"] + [f"feed_forward.{part}" for part in ("gate", "up", "down")]
    return ["embed.weight"] + [f"layers.{n}.{part}.weight" for n in range(config.layers) for part in parts]


def vector_names(config: ModelConfig) -> list[str]:
    norms = ("attention_norm", "feed_forward_norm")
    return [f"layers.{n}.{norm}.weight" for n in range(config.layers) for norm in norms] + ["norm.weight"]
