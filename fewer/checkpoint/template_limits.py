"""A jinja2 sandbox whose programs end: limits on time, on the size of every value, and on all text made together.

jinja2's sandbox keeps a template away from Python, but not from `{% for a in x %}{% for b in x %}…`, from `s ~ s` in
a loop, or from a list that holds another twice, forty levels deep. So the parsed template is rewritten before it is
compiled:

    for x in e              ->  for x in e | counted       each turn looks at the clock
    a value being made      ->  value | measured           lists, sums, calls, filters and output are weighed
    a ~ b                   ->  [a, b] | joined            joined only when the whole is small enough

A value is weighed with everything that it contains, as often as it contains it, so nothing can be built whose text
would be too long. What makes one large value out of small ones in a single call (padding, formatting, multiplying) is
left out, or has to ask for the size first.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from jinja2 import Template, nodes, pass_context, pass_environment
from jinja2.exceptions import SecurityError
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.runtime import Context, LoopContext, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_SECONDS = 1.0  # of this thread's processor time
MAX_RANGE = 100_000
MAX_INTEGER_BITS = 4096

# What templates of published models use, and some more. Left out: what pads, formats or repeats.
_FILTERS = frozenset([
    "abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "int",
    "items", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "safe",
    "select", "selectattr", "sort", "string", "title", "trim", "unique", "upper",
])  # fmt: skip
_STR_METHODS = frozenset([
    "capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha", "isascii", "isdecimal",
    "isdigit", "isidentifier", "islower", "isnumeric", "isspace", "istitle", "isupper", "join", "lower", "lstrip",
    "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip",
    "split", "splitlines", "startswith", "strip", "swapcase", "title", "upper",
])  # fmt: skip


class LimitExceeded(Exception):
    """A limit was passed; the message completes "the chat template …"."""


class Budget:
    """What one rendering may still spend. `size` is the length of all the texts handed in."""

    def __init__(self, size: int) -> None:
        self.largest = 300_000 + 4 * size  # characters and entries of one value
        self.together = 32 * self.largest  # of all values made
        self.deadline = time.thread_time() + MAX_SECONDS

    def look_at_clock(self) -> None:
        if time.thread_time() > self.deadline:
            raise LimitExceeded(f"is not done after {MAX_SECONDS:g} s")

    def ask(self, size: int) -> None:
        """Permission to make a value of this size."""
        if size > self.largest:
            raise LimitExceeded(f"makes a value of more than {self.largest} characters or entries")
        self.together -= size
        if self.together < 0:
            raise LimitExceeded("makes far more text than its messages hold")
        self.look_at_clock()

    def weigh(self, value: Any) -> int:
        """Characters and entries in `value`, with repetition; refuses as soon as they are too many."""
        total, waiting = 0, [value]
        while waiting:
            item = waiting.pop()
            if isinstance(item, str | bytes):
                total += len(item)
            elif isinstance(item, Mapping):
                waiting.extend(item.keys())
                waiting.extend(item.values())
            elif isinstance(item, list | tuple | set | frozenset):
                waiting.extend(item)
            elif isinstance(item, int) and item.bit_length() > MAX_INTEGER_BITS:
                raise LimitExceeded(f"makes a number of more than {MAX_INTEGER_BITS} bits")
            total += 1
            if total + len(waiting) > self.largest:
                raise LimitExceeded(f"makes a value of more than {self.largest} characters or entries")
        return total


class OpaqueNamespace(Namespace):
    """`namespace()` of templates. It may come to hold itself, so its text says nothing of what it holds."""

    def __repr__(self) -> str:
        return "<namespace>"


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox with the limits. One rendering at a time: `budget` belongs to it."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])
    budget: Budget

    def __init__(self, extensions: list[Any]) -> None:
        # The optimizer would evaluate constant expressions while compiling, where nothing is counted.
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, optimized=False)
        self.filters = {name: FILTERS[name] for name in _FILTERS}
        self.filters.update(counted=_counted, measured=_measured, joined=_joined)
        self.filters.update(join=_join, replace=_replace, indent=_indent, sum=_sum)
        self.globals = {"range": _range, "namespace": OpaqueNamespace, "dict": dict}
        self.budget = Budget(0)

    def compile_bounded(self, source: str) -> Template:
        tree = _Rewrite().visit(self.parse(source))
        tree.set_environment(self)
        return Template.from_code(self, self.compile(tree), self.make_globals(None))

    def render_bounded(self, template: Template, variables: Mapping[str, Any], size: int) -> str:
        """`size`: the length of the texts among `variables`."""
        self.budget = Budget(size)
        text = "".join(template.generate(variables))  # each piece has been weighed as it came out
        self.budget.ask(len(text))
        return text

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr not in _STR_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        raise SecurityError(f"'{attribute}' of a {type(obj).__name__} is not for templates")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """The operators that can make something large of something small ask first."""
        numbers = isinstance(left, int) and isinstance(right, int)
        if numbers and operator == "**" and left.bit_length() * max(right, 1) > MAX_INTEGER_BITS:
            raise LimitExceeded(f"makes a number of more than {MAX_INTEGER_BITS} bits")
        if operator == "*" and not numbers:
            for sequence, times in ((left, right), (right, left)):
                if isinstance(times, int) and isinstance(sequence, Sequence):
                    self.budget.ask(self.budget.weigh(sequence) * max(times, 0))
        if operator == "%" and isinstance(left, str):
            if re.search(r"[0-9]{4}|\*", left):
                raise LimitExceeded("formats with a width of more than three digits")
            self.budget.ask(len(left) + left.count("%") * (999 + self.budget.weigh(right)))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 (named as in jinja2)
        budget, owner, name = __self.budget, getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        budget.look_at_clock()
        budget.weigh((args, kwargs))
        if isinstance(owner, str) and name == "join" and args:
            return _join(__self, args[0], owner)
        if isinstance(owner, str) and name == "replace" and len(args) >= 2:
            return _replace(__self, owner, *args)
        return super().call(__context, __obj, *args, **kwargs)


class _Rewrite(NodeTransformer):
    """The rewriting that the module's docstring describes."""

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        call = node.call if isinstance(node, nodes.CallBlock) else None
        super().generic_visit(node, *args, **kwargs)
        if isinstance(node, nodes.For):
            node.iter = _through("counted", cast(nodes.Expr, node.iter))
        elif isinstance(node, nodes.CallBlock) and call is not None:
            node.call = call  # {% call %} needs the bare call, whose arguments were visited in place
        elif isinstance(node, nodes.Output):
            node.nodes = [_through("measured", _as_expression(part)) for part in node.nodes]
        elif isinstance(node, nodes.Concat):
            return _through("joined", nodes.List(node.nodes, lineno=node.lineno))
        elif isinstance(node, _MADE) and not (isinstance(node, nodes.Tuple) and node.ctx == "store"):
            return _through("measured", node)
        return node


_MADE = nodes.List | nodes.Dict | nodes.Tuple | nodes.Call | nodes.Filter | nodes.BinExpr


def _as_expression(part: nodes.Expr) -> nodes.Expr:
    return nodes.Const(part.data, lineno=part.lineno) if isinstance(part, nodes.TemplateData) else part


def _through(name: str, node: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


# ── filters that `_Rewrite` puts in: they take the context, because the compiler would run others on constants once ──


@pass_context
def _counted(context: Context, values: Iterable[Any]) -> Iterator[Any]:
    for turn, value in enumerate(values):
        if turn % 64 == 0:
            _budget(context).look_at_clock()
        yield value


@pass_context
def _measured(context: Context, value: Any) -> Any:
    budget = _budget(context)
    if isinstance(value, Iterator) and not isinstance(value, LoopContext):  # what `map` and `select` return
        values: list[Any] = []
        weight = 0
        for item in value:
            weight += budget.weigh(item)
            budget.ask(0 if weight <= budget.largest else weight)
            values.append(item)
        value = values
    budget.ask(budget.weigh(value))
    return value


@pass_context
def _joined(context: Context, values: list[Any]) -> str:
    budget = _budget(context)
    budget.ask(budget.weigh(values))
    return "".join(map(str, values))


def _budget(context: Context) -> Budget:
    return cast(BoundedEnvironment, context.environment).budget


# ── filters of templates: `environment` is the BoundedEnvironment they run in ───────────────────────────────────────


@pass_environment
def _join(
    environment: BoundedEnvironment, value: Iterable[Any], d: str = "", attribute: str | int | None = None
) -> str:
    values = list(value)
    if attribute is not None:
        values = list(map(make_attrgetter(environment, attribute), values))
    environment.budget.ask(environment.budget.weigh(values) + len(values) * len(str(d)))
    return str(d).join(map(str, values))


@pass_environment
def _replace(environment: BoundedEnvironment, s: str, old: str, new: str, count: int = -1) -> str:
    text, old, new = str(s), str(old), str(new)
    found = text.count(old) if count < 0 else min(count, text.count(old))
    environment.budget.ask(len(text) + found * len(new))
    return text.replace(old, new, count)


@pass_environment
def _indent(environment: BoundedEnvironment, s: str, width: int = 4, first: bool = False, blank: bool = False) -> str:
    if not 0 <= width <= 100:
        raise LimitExceeded(f"indents by {width}, outside 0 to 100")
    lines = str(s).splitlines() or [""]
    environment.budget.ask(len(str(s)) + len(lines) * width)
    margin = " " * width
    indented = [margin + line if line or blank else line for line in lines]
    return "\n".join([indented[0] if first else lines[0], *indented[1:]])


def _sum(value: Iterable[Any], attribute: str | None = None, start: float = 0) -> Any:
    if attribute is not None:
        value = [item[attribute] for item in value]
    return sum(value, start) if isinstance(start, int | float) else start


def _range(*bounds: int) -> range:
    numbers = range(*bounds)
    if len(numbers) > MAX_RANGE:
        raise LimitExceeded(f"asks for a range of {len(numbers)} numbers, more than {MAX_RANGE}")
    return numbers
