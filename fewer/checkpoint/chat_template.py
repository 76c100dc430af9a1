"""Chat templates: the Jinja text inside a checkpoint that turns messages into the prompt a model was trained on.

A template is a program from a stranger. It runs in jinja2's immutable sandbox, inside the limits of
`template_limits`: whatever it does ends in about a second, in bounded memory, as a text or as one CheckpointError.
"""

from __future__ import annotations

import datetime
import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes, pass_environment
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from fewer.checkpoint.template_limits import BoundedEnvironment, LimitExceeded
from fewer.errors import CheckpointError, FewerError, UsageError

MAX_SOURCE = 100_000  # characters; the longest template of a published model has about 20,000


class ChatTemplate:
    """One compiled template. Raises CheckpointError where it cannot be compiled."""

    def __init__(self, source: str) -> None:
        if len(source) > MAX_SOURCE:
            raise CheckpointError(
                f"the chat template has {len(source)} characters, more than the {MAX_SOURCE} allowed: "
                "use --raw to go without it"
            )
        self._lock = threading.Lock()  # the environment counts what one rendering spends
        self._environment = _environment()
        try:
            self._template = self._environment.compile_bounded(source)
        except jinja2.TemplateSyntaxError as fault:
            raise CheckpointError(f"the chat template has a mistake in line {fault.lineno}: {fault.message}") from None
        except (Exception, RecursionError, MemoryError) as fault:
            raise CheckpointError(f"the chat template cannot be compiled: {_sentence(fault)}") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        names: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation. `names` are further variables, such as bos_token.

        Raises UsageError where the template refuses the messages, CheckpointError where the template is at fault.
        """
        plain = [dict(message) for message in messages]
        size = sum(len(value) for message in plain for value in message.values() if isinstance(value, str))
        variables = {**(names or {}), "messages": plain, "add_generation_prompt": add_generation_prompt}
        with self._lock:
            try:
                return self._environment.render_bounded(self._template, variables, size)
            except FewerError:
                raise
            except LimitExceeded as fault:
                raise CheckpointError(f"the chat template {fault}: use --raw to go without it") from None
            except jinja2.exceptions.SecurityError as fault:
                raise CheckpointError(f"the chat template reaches outside its sandbox: {_sentence(fault)}") from None
            except (Exception, RecursionError, MemoryError) as fault:
                raise CheckpointError(f"the chat template failed: {_sentence(fault)}") from None


class _Generation(Extension):
    """{% generation %} … {% endgeneration %} marks the assistant's words for training; here it only encloses them."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _environment() -> BoundedEnvironment:
    environment = BoundedEnvironment(extensions=[loopcontrols, _Generation])
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    environment.filters["tojson"] = _tojson
    return environment


def _raise_exception(message: object) -> None:
    raise UsageError(f"the model's chat template refuses these messages: {str(message)[:500]}")


def _strftime_now(pattern: str) -> str:
    if len(pattern) > 100:
        raise LimitExceeded("asks for a date of more than 100 characters")
    return datetime.datetime.now().strftime(pattern)


@pass_environment
def _tojson(
    environment: BoundedEnvironment,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it stands: jinja2's own filter would escape it for HTML."""
    if indent is not None:
        if not 0 <= indent <= 8:
            raise LimitExceeded(f"asks for JSON indented by {indent}, outside 0 to 8")
        environment.budget.ask(environment.budget.weigh(value) * (1 + indent * _depth(value)))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _depth(value: Any) -> int:
    if isinstance(value, Mapping):
        return 1 + max(map(_depth, value.values()), default=0)
    if isinstance(value, list | tuple):
        return 1 + max(map(_depth, value), default=0)
    return 0


def _sentence(fault: BaseException) -> str:
    text = " ".join(str(fault).split())[:300]
    return f"{type(fault).__name__}: {text}" if text else type(fault).__name__
