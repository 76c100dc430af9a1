"""The prompts that figures are measured on: ours, or those of a file."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from fewer.errors import UsageError

SEPARATOR = "---"  # a line of its own between two prompts


def built_in_prompts() -> list[str]:
    """Chat, code, summary, extraction, arithmetic, story, translation, correction: several invite copying."""
    return split_prompts(resources.files("fewer.evaluation").joinpath("prompts.txt").read_text(encoding="utf-8"))


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file. Raises UsageError where it cannot be read or holds none."""
    prompts = split_prompts(read_text(path))
    if not prompts:
        raise UsageError(
            f"{path} holds no prompt: write one a line, or longer ones with a line of '{SEPARATOR}' between"
        )
    return prompts


def read_text(path: Path) -> str:
    """A UTF-8 text file. Raises UsageError."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as fault:
        raise UsageError(f"cannot read {path}: {fault.strerror}") from None
    except UnicodeDecodeError as fault:
        raise UsageError(f"{path} is no UTF-8 text (byte {fault.start}): convert it first") from None


def split_prompts(text: str) -> list[str]:
    """Prompts between lines of `---`; a text without such a line has one prompt a line."""
    lines = text.splitlines()
    if SEPARATOR not in (line.strip() for line in lines):
        return [line.strip() for line in lines if line.strip()]
    parts: list[list[str]] = [[]]
    for line in lines:
        if line.strip() == SEPARATOR:
            parts.append([])
        else:
            parts[-1].append(line)
    return [prompt for prompt in ("\n".join(part).strip() for part in parts) if prompt]


def repeat_to(tokens: Sequence[int], length: int) -> list[int]:
    """`length` tokens: the given ones, again and again. What a prefill of a set length is measured on."""
    repeats = -(-length // len(tokens))
    return (list(tokens) * repeats)[:length]
