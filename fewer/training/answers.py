"""Text that the target itself wrote: its answers to prompts, generated in batches and kept in a file as they come.

What a drafter guesses is the target's text, so that is what it should learn from; a text that somebody else wrote
teaches it less for each token. The prompts are those of a text (one a line, or between lines of `---`), or the target's
own: a chat model asked to go on behind the opening of a user's turn writes what users ask it (Magpie, arXiv
2406.08464), and a model without a chat template goes on from its first token.

The file (`FEWER_HOME/answers/<fingerprint>.jsonl`) is a line that says where it came from and then a line an answer. A
generation that broke off goes on behind the last whole batch, and methods that ask for the same answers share them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fewer.errors import FewerError, UsageError
from fewer.evaluation.prompts import split_prompts
from fewer.home import home

if TYPE_CHECKING:
    from fewer.checkpoint.tokenizer import Tokenizer
    from fewer.training.fitting import FittedModel, TrainingText

ROWS = {"cpu": 16, "cuda": 256}  # answers that are generated side by side
LONGEST_PROMPT = 512  # tokens; longer prompts are left out
LONGEST_QUESTION = 96  # tokens of a prompt that the target makes up
VERSION = 1

Progress = Callable[[str, int, int], None]  # what is under way, answers done, answers wanted


@dataclass(frozen=True)
class Answer:
    """A conversation as tokens; the first `prompt` of them were not written by the target."""

    tokens: list[int]
    prompt: int


@dataclass(frozen=True)
class AnswerConfig:
    """How many answers, of which kind."""

    count: int  # answers; prompts are taken again, with other random numbers, where there are fewer
    length: int = 256  # tokens of an answer, at most
    temperature: float = 0.6  # that answers are sampled with; 0: the most likely tokens
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("count", 1), ("length", 1), ("temperature", 0)):
            if getattr(self, name) < low:
                raise UsageError(f"answers: {name}={getattr(self, name)} is not allowed: use {low} or more")


def generated_answers(
    model: FittedModel, data: TrainingText | None, config: AnswerConfig, progress: Progress | None = None
) -> list[Answer]:
    """The target's answers to the prompts of `data` (None: to prompts of its own), from the file or made now."""
    origin = {
        "version": VERSION,
        "model": model.checkpoint.fingerprint(),
        "data": None if data is None else data.fingerprint,
        **asdict(config),
    }
    rows = ROWS.get(model.transformer.device.type, 16)
    file = AnswerFile(home() / "answers", origin, model.config.vocab_size)
    answers = file.read()
    del answers[len(answers) // rows * rows if len(answers) < config.count else config.count :]
    if len(answers) == config.count:
        return answers
    file.cut(answers)
    prompts = None if data is None else _encoded(model.tokenizer, data)
    while len(answers) < config.count:
        count = min(rows, config.count - len(answers))
        generator = torch.Generator(model.transformer.device).manual_seed((config.seed << 24) + len(answers))
        if prompts is None:
            chosen = own_prompts(model, count, generator)
        else:
            chosen = [prompts[index % len(prompts)] for index in range(len(answers), len(answers) + count)]
        made = _answered(model, chosen, config, generator)
        file.append(made)
        answers += made
        if progress is not None:
            progress("answering", len(answers), config.count)
    return answers


def _answered(
    model: FittedModel, prompts: Sequence[list[int]], config: AnswerConfig, generator: torch.Generator
) -> list[Answer]:
    texts = continued(model, prompts, config.length, config.temperature, generator, model.tokenizer.eos_tokens)
    return [Answer([*prompt, *text], len(prompt)) for prompt, text in zip(prompts, texts, strict=True)]


@torch.inference_mode()
def continued(
    model: FittedModel,
    prompts: Sequence[list[int]],
    length: int,
    temperature: float,
    generator: torch.Generator,
    stops: frozenset[int],
) -> list[list[int]]:
    """What follows each prompt, up to `length` tokens; a stop token is the last. Rows that have stopped go on with the
    others, so that passes stay of one shape, and are cut in the end."""
    length = min(length, model.context_length - max(map(len, prompts)))
    session = model.session(len(prompts), max(map(len, prompts)) + length + 1)
    logits = session.prefill(prompts)
    texts: list[list[int]] = [[] for _ in prompts]
    going = set(range(len(prompts)))
    for _ in range(length):
        if temperature:
            chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0].tolist()
        else:
            chosen = logits.argmax(-1).tolist()
        for row in tuple(going):
            texts[row].append(chosen[row])
            if chosen[row] in stops or len(texts[row]) == length:
                going.remove(row)
        if not going:
            break
        logits = session.decode(chosen)
    return texts


def own_prompts(model: FittedModel, count: int, generator: torch.Generator) -> list[list[int]]:
    """Prompts that the target makes up, ready to be answered."""
    tokenizer = model.tokenizer
    if not tokenizer.has_chat_template:
        first = tokenizer.bos_token if tokenizer.bos_token is not None else min(tokenizer.eos_tokens, default=0)
        return [[first] for _ in range(count)]
    before, after = user_turn(tokenizer)
    questions = continued(model, [before] * count, LONGEST_QUESTION, 1.0, generator, frozenset(after[:1]))
    return [[*before, *(token for token in question if token != after[0]), *after] for question in questions]


def user_turn(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """What the chat template writes before a user's words, and between them and the answer."""
    one, other = (tokenizer.chat([{"role": "user", "content": word}]) for word in ("Yes", "7"))
    start = next(place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
    end = next(back for back in range(1, len(one)) if one[-back] != other[-back]) - 1
    if not end:
        raise UsageError("the chat template has nothing behind a user's words: name a text with prompts")
    return one[:start], one[-end:]


def _encoded(tokenizer: Tokenizer, data: TrainingText) -> list[list[int]]:
    """Prompts as the chat template writes them, if there is one."""
    words = split_prompts(data.text)
    if tokenizer.has_chat_template:
        found = [tokenizer.chat([{"role": "user", "content": prompt}]) for prompt in words]
    else:
        found = [tokenizer.encode(prompt) for prompt in words]
    prompts = [tokens for tokens in found if 0 < len(tokens) <= LONGEST_PROMPT]
    if not prompts:
        raise UsageError(f"{data.name} holds no prompt of at most {LONGEST_PROMPT} tokens: write one a line")
    return prompts


class AnswerFile:
    """Answers on disk, in whole lines."""

    def __init__(self, folder: Path, origin: dict[str, Any], vocab_size: int):
        digest = hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()
        self.path, self.origin, self.vocab_size = folder / f"{digest[:16]}.jsonl", origin, vocab_size

    def read(self) -> list[Answer]:
        """The answers before the first line that is torn or strange."""
        if not self.path.exists():
            return []
        with self.path.open(encoding="utf-8", errors="replace") as file:
            if next(iter(_parsed(file.readline())), None) != self.origin:
                return []
            answers = []
            for line in file:
                entry = next(iter(_parsed(line)), None)
                if not self._is_answer(entry):
                    break
                answers.append(Answer(entry["tokens"], entry["prompt"]))  # type: ignore[index]
            return answers

    def _is_answer(self, entry: object) -> bool:
        if not isinstance(entry, dict) or set(entry) != {"tokens", "prompt"}:
            return False
        tokens, prompt = entry["tokens"], entry["prompt"]
        return (
            isinstance(tokens, list)
            and all(isinstance(token, int) and 0 <= token < self.vocab_size for token in tokens)
            and isinstance(prompt, int)
            and 0 <= prompt <= len(tokens)
        )

    def cut(self, answers: Sequence[Answer]) -> None:
        """Begin the file anew with these answers; it is whole, or as it was."""
        temporary = self.path.with_suffix(".part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text("".join([json.dumps(self.origin) + "\n", *map(_line, answers)]), encoding="utf-8")
            temporary.replace(self.path)
        except OSError as fault:
            raise FewerError(f"cannot write {self.path}: {fault.strerror}") from None

    def append(self, answers: Sequence[Answer]) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(map(_line, answers)))
        except OSError as fault:
            raise FewerError(f"cannot write {self.path}: {fault.strerror}") from None


def _line(answer: Answer) -> str:
    return json.dumps({"tokens": answer.tokens, "prompt": answer.prompt}) + "\n"


def _parsed(line: str) -> Iterator[Any]:
    """What a whole line says; nothing where it is none."""
    if line.endswith("\n"):
        try:
            yield json.loads(line)
        except ValueError:
            return


class AnswerBatches:
    """Answers in batches of similar lengths: tokens [B, T] and how many of them are real; each epoch has its own order.

    Batch number n is a function of the seed and n alone.
    """

    POOL = 16  # batches whose answers are sorted by length

    def __init__(self, answers: Sequence[Answer], batch_size: int, longest: int, seed: int = 0):
        self.rows = [(answer.tokens[:longest], answer.prompt) for answer in answers if answer.prompt + 8 < longest]
        if len(self.rows) < batch_size:
            raise UsageError(f"{len(self.rows)} answers do not fill a batch of {batch_size}: generate more")
        self.batch_size, self.seed = batch_size, seed
        digest = hashlib.sha256(f"{batch_size} {longest} {seed} ".encode())
        digest.update(json.dumps(self.rows).encode())
        self.fingerprint = digest.hexdigest()
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.rows) // self.batch_size

    @property
    def tokens(self) -> int:
        """Of all answers, the prompts' not counted."""
        return sum(len(tokens) - prompt for tokens, prompt in self.rows)

    def batch(self, index: int) -> AnswerBatch:
        epoch, place = divmod(index, len(self))
        if self._epoch[0] != epoch:
            self._epoch = epoch, self._shuffled(epoch)
        rows = [self.rows[row] for row in self._epoch[1][place]]
        width = max(len(tokens) for tokens, _ in rows)
        tokens = torch.tensor([[*tokens, *[0] * (width - len(tokens))] for tokens, _ in rows])
        return AnswerBatch(
            tokens, torch.tensor([len(tokens) for tokens, _ in rows]), torch.tensor([prompt for _, prompt in rows])
        )

    def _shuffled(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
        order = torch.randperm(len(self.rows), generator=generator).tolist()
        batches = []
        for start in range(0, len(order), self.POOL * self.batch_size):
            pool = sorted(order[start : start + self.POOL * self.batch_size], key=lambda row: len(self.rows[row][0]))
            whole = range(0, len(pool) - self.batch_size + 1, self.batch_size)
            batches += [pool[first : first + self.batch_size] for first in whole]
        return [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]


@dataclass(frozen=True)
class AnswerBatch:
    tokens: Tensor  # [B, T] int64, padded behind each answer
    lengths: Tensor  # [B]: real tokens
    prompts: Tensor  # [B]: of them, the prompt's
