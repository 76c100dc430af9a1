"""`--show-drafts` and the counters of `--json`: what was guessed and accepted, and that the answer stays the same."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import fewer as package
from fewer.cli.drafts import DraftPainter
from fewer.decoding.counts import Counts
from fewer.language_model import Generation
from tests.cli.conftest import Fewer

PROMPT = "the cat sat the cat sat"


def test_marks_surround_what_was_guessed(fewer: Fewer, tiny: str) -> None:
    """A draft model that is the target guesses three of four tokens; without the marks the answer is the plain one."""
    words = (PROMPT, "-m", tiny, "-n", "13", "--decoding", f"draft-model:model={tiny},tokens=3", "--show-drafts")
    shown = fewer("generate", *words)
    model = package.load(tiny)
    plain = model.generate(PROMPT, max_tokens=13)
    assert re.sub("[⟦⟧]", "", shown.stdout) == plain.text + "\n"
    piece = [model.tokenizer.decode([token]) for token in plain.tokens]
    if "\ufffd" not in plain.text:
        guessed = [("".join(piece[place : place + 3])) for place in (1, 5, 9)]
        assert re.findall("⟦(.*?)⟧", shown.stdout, re.DOTALL) == guessed
    assert "⟦⟧ draft-model · 9 of 9 guesses, 4.00 tokens a pass" in shown.stderr


def test_a_method_that_guesses_nothing_says_so(fewer: Fewer, tiny: str) -> None:
    shown = fewer("generate", PROMPT, "-m", tiny, "-n", "8", "--show-drafts")
    assert shown.stdout == package.load(tiny).generate(PROMPT, max_tokens=8).text + "\n"
    assert "plain drafted nothing" in shown.stderr


def test_json_carries_the_counters(fewer: Fewer, tiny: str) -> None:
    words = ("generate", PROMPT, "-m", tiny, "-n", "13", "--json", "--decoding")
    figures = json.loads(fewer(*words, f"draft-model:model={tiny},tokens=3").stdout)
    drafts = figures["drafts"]
    assert drafts.pop("draft_seconds") > 0 and drafts.pop("verify_seconds") > 0
    assert drafts == {
        "tau": 4.0,
        "target_passes": 3,
        "drafted": 9,
        "accepted": 9,
        "accepted_at": [3, 3, 3],
        "reached": [3, 3, 3],
    }
    assert json.loads(fewer(*words, "plain").stdout)["drafts"] is None


class Grows:
    """An answer that comes token by token, some of it guessed, with characters of several tokens."""

    def __init__(self, tiny: str, text: str):
        self.model = package.load(tiny)
        self.tokens = self.model.tokenizer.encode(text, special=False)
        self.result = Generation(counts=Counts(drafted=9, accepted=9))
        self.painter = DraftPainter(self.model, self.result)

    def add(self, count: int, drafter: str | None, shown: str) -> None:
        start = len(self.result.tokens)
        if drafter is not None:
            self.result.drafts.append((start, start + count, drafter))
        self.result.tokens += self.tokens[start : start + count]
        self.result.text += shown
        self.painter.show()


def test_a_character_has_the_mark_of_the_token_that_completes_it(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    answer = Grows(tiny, "é€!")  # bytes: 2, 3 and 1
    assert len(answer.tokens) == 6
    answer.add(1, None, "")
    answer.add(2, "copy", "é")
    answer.add(2, "table", "€")
    answer.add(1, None, "!")
    assert capsys.readouterr().out == "⟦é⟧⟨€⟩!"
    assert answer.painter.legend().startswith("accepted drafts: ⟦⟧ copy, ⟨⟩ table ·")


def test_text_that_is_held_back_keeps_its_mark(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The beginning of a stop string waits for what comes behind it; and an end that no token completes is shown."""
    answer = Grows(tiny, "€€€€")
    answer.add(6, "", "€")
    answer.add(3, None, "€€")
    answer.add(2, None, "\ufffd")
    assert capsys.readouterr().out == "⟦€⟧⟦€⟧€\ufffd"


def test_colours_are_used_on_a_terminal(tiny: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from rich.console import Console

    answer = Grows(tiny, "€€")
    answer.painter.coloured = True
    answer.painter.console = Console(force_terminal=True, color_system="standard", soft_wrap=True)
    answer.add(3, "", "€")
    answer.add(3, None, "€")
    out = capsys.readouterr().out
    assert out == "\x1b[32m€\x1b[0m€" and "green draft-model" not in out
    assert "green plain" in answer.painter.legend()
