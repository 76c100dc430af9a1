"""How a verb ends: a fault becomes one sentence on stderr and an exit code; `--debug` shows the traceback."""

from __future__ import annotations

import sys
import traceback
from typing import Any

import typer
from typer.core import TyperCommand

from fewer.errors import FewerError

INTERRUPTED = 130  # 128 + SIGINT, as shells count it


class Verb(TyperCommand):
    """A command whose `debug` parameter, where it has one, decides how faults are shown."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            code, sentence = INTERRUPTED, "interrupted"
        except FewerError as fault:
            code, sentence = fault.exit_code, " ".join(str(fault).split())
        except MemoryError as fault:
            code, sentence = (
                1,
                f"not enough memory ({fault}): try a smaller model, weights=int4, or a shorter --context",
            )
        except RuntimeError as fault:
            if type(fault).__name__ != "OutOfMemoryError":  # torch's, which must not be imported for this
                raise
            code, sentence = 1, "not enough GPU memory: try weights=int4, a shorter --context, or --device cpu"
        if ctx.params.get("debug"):
            traceback.print_exc()
        _say(sentence)
        raise typer.Exit(code)


def _say(sentence: str) -> None:
    prefix = "\033[1;31merror:\033[0m" if sys.stderr.isatty() else "error:"
    print(f"{prefix} {sentence}", file=sys.stderr)
