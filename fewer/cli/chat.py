"""`fewer chat`: a conversation in the terminal, or one message a line from a pipe."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from fewer.cli import options as o
from fewer.cli.loading import choose_recipe, load_model, prepare
from fewer.cli.output import note, print_json_line
from fewer.errors import FewerError

if TYPE_CHECKING:
    from fewer.cli.conversation import Conversation

HELP = """/help          this list
/reset         forget the conversation
/system TEXT   set the system message and start again (no TEXT: none)
/quit          leave (or Ctrl-D)
Ctrl-C stops an answer. A line that ends in \\ goes on in the next one."""


def chat(
    model: o.Model = o.MODEL_DEFAULT,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="The system message.")] = None,
    max_tokens: o.MaxTokens = 1024,
    temperature: o.Temperature = 0.0,
    top_k: o.TopK = 0,
    top_p: o.TopP = 1.0,
    min_p: o.MinP = 0.0,
    repetition_penalty: o.RepetitionPenalty = 1.0,
    seed: o.Seed = None,
    weights: o.Weights = None,
    cache: o.Cache = None,
    decoding: o.Decoding = None,
    experts: o.Experts = None,
    recipe: o.RecipeFile = None,
    dtype: o.DType = None,
    device: o.Device = None,
    context: o.Context = None,
    threads: o.Threads = None,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Talk with a model. With --json, each answer is one line of JSON."""
    prepare(threads)
    from fewer.cli.conversation import Conversation
    from fewer.decoding.sampling import SamplingConfig

    chosen = choose_recipe(weights, cache, decoding, experts, dtype, recipe)
    sampling = SamplingConfig(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    loaded = load_model(model, chosen, device, context)
    conversation = Conversation(loaded, sampling, max_tokens, system)
    person = sys.stdin.isatty()
    if person:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() history and editing
        note(f"{model} ({chosen}), loaded in {loaded.load_seconds:.2f} s. /help lists the commands.")
    while (line := _read(person)) is not None:
        if not line.strip():
            continue
        if line.startswith("/"):
            if not _command(line, conversation):
                return
            continue
        _answer(line, conversation, json)


def _read(person: bool) -> str | None:
    """The next message, or None at the end of the input."""
    lines: list[str] = []
    while True:
        try:
            line = input(("… " if lines else "› ") if person else "")
        except EOFError:
            if person:
                print()
            return "\n".join(lines) or None
        except KeyboardInterrupt:
            if not person:
                raise
            print()
            lines.clear()
            note("/quit or Ctrl-D leaves")
            continue
        if not line.endswith("\\"):
            return "\n".join([*lines, line])
        lines.append(line[:-1])


def _command(line: str, conversation: Conversation) -> bool:
    """Obey a line that starts with a slash; False ends the chat."""
    name, _, rest = line.strip().partition(" ")
    if name in ("/quit", "/exit", "/q"):
        return False
    if name == "/reset":
        conversation.reset()
        note("the conversation is forgotten")
    elif name == "/system":
        conversation.system = rest.strip() or None
        conversation.reset()
        note("a new conversation with this system message" if rest.strip() else "a new conversation, no system message")
    elif name == "/help":
        note(HELP)
    else:
        note(f"there is no command {name}; the commands are:\n{HELP}")
    return True


def _answer(text: str, conversation: Conversation, json: bool) -> None:
    start, said = time.perf_counter(), ""
    try:
        for piece in conversation.ask(text):
            said += piece
            if not json:
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        note(" (stopped)")
        return
    except FewerError as fault:
        note(f"error: {fault} (/reset starts a new conversation)")
        return
    seconds = time.perf_counter() - start
    if json:
        print_json_line(
            {
                "text": said,
                "tokens": conversation.answer_tokens,
                "prompt_tokens": conversation.fed_tokens,
                "seconds": seconds,
            }
        )
    else:
        print()
        note(f"{conversation.answer_tokens} tokens in {seconds:.1f} s")
