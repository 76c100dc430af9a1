"""How the command line ends: a fault becomes one sentence on stderr and an exit code; `--debug` shows the traceback."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from fewer.errors import FewerError

INTERRUPTED = 130  # 128 + SIGINT, as shells count it


class Verb(TyperCommand):
    """A command whose `debug` parameter, where it has one, decides how faults are shown."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, FewerError, MemoryError, RuntimeError) as fault:
            ending = _ending(fault)
            if ending is None:
                raise
            if ctx.params.get("debug"):
                traceback.print_exc()
            code, sentence = ending
        _say(sentence)
        raise typer.Exit(code)


class VerbOfLists(Verb):
    """A verb without arguments, so that words behind an option that may be repeated are more values of it:
    `--cache full sink-window` is `--cache full --cache sink-window`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        repeated = {name for option in self.params if getattr(option, "multiple", False) for name in option.opts}
        words: list[str] = []
        option, values = "", 0  # the last option named, and the words since
        for word in args:
            name, equals, _ = word.partition("=")
            if word.startswith("-") and word != "-":
                option, values = name, int(bool(equals))
            else:
                if values and option in repeated:
                    words.append(option)
                values += 1
            words.append(word)
        result: list[str] = super().parse_args(ctx, words)
        return result


def _ending(fault: BaseException) -> tuple[int, str] | None:
    """Exit code and sentence; None for what is a defect of ours."""
    if isinstance(fault, KeyboardInterrupt):
        return INTERRUPTED, "interrupted"
    if isinstance(fault, FewerError):
        return fault.exit_code, " ".join(str(fault).split())
    if isinstance(fault, MemoryError):
        return 1, f"not enough memory ({fault}): try a smaller model, weights=int4, or a shorter --context"
    if type(fault).__name__ == "OutOfMemoryError":  # torch's, which must not be imported for this
        return 1, "not enough GPU memory: try weights=int4, a shorter --context, or --device cpu"
    return None


class Verbs(TyperGroup):
    """The list of verbs: what is wrong with the words on the command line is one sentence too, without a box."""

    def make_context(self, info_name: Any, args: list[str], *more: Any, **extra: Any) -> Any:
        with _one_sentence(list(args)):
            return super().make_context(info_name, args, *more, **extra)

    def invoke(self, ctx: Any) -> Any:
        with _one_sentence([*getattr(ctx, "_protected_args", ()), *ctx.args]):
            return super().invoke(ctx)


@contextmanager
def _one_sentence(args: Sequence[str]) -> Iterator[None]:
    """`args` are the words given. The parser's exceptions are told by their looks: typer carries its own click, or uses
    the installed one."""
    try:
        yield
    except FewerError as fault:  # an option's own check
        _say(" ".join(str(fault).split()))
        raise typer.Exit(fault.exit_code) from None
    except Exception as fault:
        if not hasattr(fault, "format_message") or type(fault).__name__ == "NoArgsIsHelpError":
            raise
        sentence = " ".join(fault.format_message().split()).rstrip(".")
        value = _given(getattr(fault, "param", None), args)
        if value is not None and value not in sentence:
            sentence += f", not '{value}'"
        context = getattr(fault, "ctx", None)
        more = f" ('{context.command_path} --help' lists what is allowed)" if context is not None else ""
        _say(sentence[:1].lower() + sentence[1:] + more)
        raise typer.Exit(getattr(fault, "exit_code", 2)) from None


def _given(parameter: Any, args: Sequence[str]) -> str | None:
    """The value that `args` have for an option."""
    names = getattr(parameter, "opts", ())
    for place, word in enumerate(args):
        name, equals, value = word.partition("=")
        if name in names and (equals or place + 1 < len(args)):
            return value if equals else args[place + 1]
    return None


def _say(sentence: str) -> None:
    prefix = "\033[1;31merror:\033[0m" if sys.stderr.isatty() else "error:"
    print(f"{prefix} {sentence}", file=sys.stderr)
