"""Answers that the target writes: kept as they come, gone on with after a break, and the same for the same seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fewer.errors import UsageError
from fewer.language_model import LanguageModel, load
from fewer.training import TrainingText, answers
from fewer.training.answers import Answer, AnswerBatches, AnswerConfig, generated_answers, user_turn
from tests.tiny_model import write_model

PROMPTS = TrainingText("the cat sat\nthe dog\n\nEvery file is one idea", "prompts")
CONFIG = AnswerConfig(count=10, length=12, temperature=0.7)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load(write_model(tmp_path_factory.mktemp("answers") / "tiny"), weights="dense", dtype="float32")


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("FEWER_HOME", str(tmp_path))
    monkeypatch.setattr(answers, "ROWS", {"cpu": 4})
    return tmp_path


def file_of(home: Path) -> Path:
    (path,) = (home / "answers").glob("*.jsonl")
    return path


def test_answers_follow_the_prompts_of_a_text(model: LanguageModel) -> None:
    found = generated_answers(model, PROMPTS, CONFIG)
    prompts = [model.tokenizer.chat([{"role": "user", "content": each}]) for each in PROMPTS.text.split("\n") if each]
    assert len(found) == 10
    for index, answer in enumerate(found):
        assert answer.tokens[: answer.prompt] == prompts[index % 3]
        assert 1 <= len(answer.tokens) - answer.prompt <= 12
    assert found[0].tokens != found[3].tokens  # the same prompt, with other random numbers


def test_greedy_answers_are_those_of_generate(model: LanguageModel) -> None:
    found = generated_answers(model, PROMPTS, AnswerConfig(3, 12, 0.0))
    for answer, prompt in zip(found, [each for each in PROMPTS.text.split("\n") if each], strict=True):
        assert answer.tokens[answer.prompt :] == model.generate(prompt, max_tokens=12).tokens


def test_a_break_loses_at_most_a_batch_and_changes_nothing(model: LanguageModel, home: Path) -> None:
    whole = generated_answers(model, PROMPTS, CONFIG)
    path = file_of(home)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:7], lines[7][: len(lines[7]) // 2]]))  # six answers and a half
    made: list[tuple[str, int, int]] = []
    assert generated_answers(model, PROMPTS, CONFIG, lambda *each: made.append(each)) == whole
    assert made == [("answering", 8, 10), ("answering", 10, 10)]
    made.clear()
    assert generated_answers(model, PROMPTS, CONFIG, lambda *each: made.append(each)) == whole and not made


@pytest.mark.parametrize(
    "line",
    ['{"tokens": [1, 2], "prompt": 5}', '{"tokens": [99999], "prompt": 0}', '{"tokens": "x", "prompt": 0}', "[]", "{"],
)
def test_strange_lines_are_made_anew(model: LanguageModel, home: Path, line: str) -> None:
    whole = generated_answers(model, PROMPTS, CONFIG)
    lines = file_of(home).read_text().splitlines()
    lines[2] = line
    file_of(home).write_text("\n".join(lines) + "\n")
    assert generated_answers(model, PROMPTS, CONFIG) == whole


def test_other_settings_have_another_file(model: LanguageModel, home: Path) -> None:
    generated_answers(model, PROMPTS, AnswerConfig(4, 12))
    generated_answers(model, PROMPTS, AnswerConfig(4, 11))
    files = list((home / "answers").glob("*.jsonl"))
    assert len(files) == 2
    origins = [json.loads(path.read_text().splitlines()[0]) for path in files]
    assert {origin["length"] for origin in origins} == {11, 12}


def test_a_chat_model_makes_up_its_prompts(model: LanguageModel) -> None:
    before, after = user_turn(model.tokenizer)
    shown = model.tokenizer.decode(before, skip_special=False), model.tokenizer.decode(after, skip_special=False)
    assert shown == ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")
    found = generated_answers(model, None, CONFIG)
    for answer in found:
        prompt = answer.tokens[: answer.prompt]
        assert prompt[: len(before)] == before and prompt[-len(after) :] == after
    assert len({tuple(answer.tokens) for answer in found}) == 10


def test_texts_without_prompts_are_refused(model: LanguageModel) -> None:
    with pytest.raises(UsageError, match="no prompt of at most"):
        generated_answers(model, TrainingText("word " * 2000, "a book"), CONFIG)
    with pytest.raises(UsageError, match="count=0"):
        AnswerConfig(0)


def batches_of(seed: int = 0, size: int = 3) -> AnswerBatches:
    rows = [Answer(list(range(9 + index % 7)), index % 4) for index in range(20)]
    return AnswerBatches(rows, size, 64, seed)


def test_a_batch_is_a_function_of_seed_and_number() -> None:
    one, other = batches_of(), batches_of()
    for index in (0, 5, 17, 2):
        assert torch.equal(one.batch(index).tokens, other.batch(index).tokens)
    assert one.fingerprint == other.fingerprint != batches_of(seed=1).fingerprint
    assert any(not torch.equal(one.batch(index).lengths, batches_of(seed=1).batch(index).lengths) for index in range(6))


def test_batches_hold_answers_of_similar_lengths_padded_behind() -> None:
    made: Any = batches_of(size=5)
    assert len(made) == 4
    for index in range(4):
        batch = made.batch(index)
        assert int(batch.lengths.max()) == batch.tokens.shape[1]
        for row, length in zip(batch.tokens.tolist(), batch.lengths.tolist(), strict=True):
            assert row[:length] == list(range(length)) and not any(row[length:])


def test_too_few_answers_for_a_batch_are_refused() -> None:
    with pytest.raises(UsageError, match="do not fill a batch of 30"):
        batches_of(size=30)
