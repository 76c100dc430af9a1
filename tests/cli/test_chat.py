"""`fewer chat`: driven through stdin, one message a line."""

from __future__ import annotations

import json

from fewer import SamplingConfig, load
from fewer.cli.conversation import Conversation
from tests.cli.conftest import Fewer


def test_each_line_gets_an_answer_and_the_conversation_is_remembered(fewer: Fewer, tiny: str) -> None:
    exact = ("--dtype", "float32")  # in bfloat16 a random model's answer hangs on how its text was cut into steps
    result = fewer("chat", "-m", tiny, "-n", "6", "--json", *exact, stdin="the cat\n\nthe dog\n")
    assert result.exit_code == 0, result.stderr
    first, second = map(json.loads, result.stdout.splitlines())
    model = load(tiny, dtype="float32")
    messages = [{"role": "user", "content": "the cat"}]
    assert first["text"] == model.generate(messages, max_tokens=6).text
    messages += [{"role": "assistant", "content": first["text"]}, {"role": "user", "content": "the dog"}]
    assert second["text"] == model.generate(messages, max_tokens=6).text
    assert second["prompt_tokens"] < len(model.tokenizer.chat(messages))  # only what the session did not hold


def test_reset_forgets_and_a_system_message_comes_first(fewer: Fewer, tiny: str) -> None:
    lines = "the cat\n/reset\nthe cat\n/system be brief\nthe cat\n/quit\nnever read\n"
    result = fewer("chat", "-m", tiny, "-n", "4", "--json", stdin=lines)
    first, again, briefed = map(json.loads, result.stdout.splitlines())
    assert first["text"] == again["text"]
    asked = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the cat"}]
    assert briefed["text"] == load(tiny).generate(asked, max_tokens=4).text
    given = fewer("chat", "-m", tiny, "-n", "4", "--json", "--system", "be brief", stdin="the cat\n")
    assert json.loads(given.stdout)["text"] == briefed["text"]


def test_a_backslash_continues_the_message(fewer: Fewer, tiny: str) -> None:
    result = fewer("chat", "-m", tiny, "-n", "4", "--json", stdin="one\\\ntwo\n")
    asked = [{"role": "user", "content": "one\ntwo"}]
    assert json.loads(result.stdout)["text"] == load(tiny).generate(asked, max_tokens=4).text


def test_answers_go_to_stdout_and_remarks_to_stderr(fewer: Fewer, tiny: str) -> None:
    result = fewer("chat", "-m", tiny, "-n", "4", stdin="/help\nthe cat\n/nonsense\n")
    assert result.stdout == load(tiny).generate("the cat", max_tokens=4).text + "\n"
    assert "forget the conversation" in result.stderr and "there is no command /nonsense" in result.stderr


def test_a_message_too_long_for_the_context_is_refused_and_the_chat_goes_on(fewer: Fewer, tiny: str) -> None:
    result = fewer("chat", "-m", tiny, "-n", "4", "--json", stdin="z" * 400 + "\nthe cat\n")
    assert "context of 256" in result.stderr
    assert json.loads(result.stdout)["text"] == load(tiny).generate("the cat", max_tokens=4).text


def test_an_answer_that_is_left_early_does_not_spoil_the_next(tiny: str) -> None:
    conversation = Conversation(load(tiny), SamplingConfig(), 20)
    answer = conversation.ask("the cat")
    said = next(answer)
    del answer  # as a loop that is left by Ctrl-C does
    assert conversation.turns[-1] == {"role": "assistant", "content": said}
    expected = load(tiny).generate([*conversation.turns, {"role": "user", "content": "go on"}], max_tokens=20).text
    assert "".join(conversation.ask("go on")) == expected
