"""A sandbox for chat templates, bounded in time and size: a template comes with a download.

jinja2's own sandbox keeps a template from reaching Python, not from running for ever or filling the
memory. Here loops and calls are counted against a clock, what operators and filters make may not
become large, and filters that a chat template does not need are not there.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

SECONDS = 2.0  # of a rendering
MOST_ROUNDS = 500_000  # of all loops, and calls
MOST_CHARACTERS = 10_000_000  # of what is rendered, and of anything on the way
MOST_DIGITS = 10_000  # of a number
FILTERS = (
    *("abs", "attr", "bool", "capitalize", "count", "d", "default", "dictsort", "e", "escape"),
    *("first", "float", "groupby", "indent", "int", "items", "join", "last", "length", "list"),
    *("lower", "map", "max", "min", "reject", "rejectattr", "replace", "reverse", "round"),
    *("safe", "select", "selectattr", "sort", "string", "sum", "title", "trim", "unique"),
    *("upper", "wordcount"),
)
NONE = type(None)
WIDE = re.compile(r"\d{4}")  # a width of 1000 or more in a format


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Compiles templates that end. `begin` is called before each rendering."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, extensions: list[type[Extension]]) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[*extensions, loopcontrols]
        )
        self.filters = {name: self._bounded(self.filters[name]) for name in FILTERS
                        if name in self.filters}  # fmt: skip
        for name in ("lipsum", "cycler", "joiner"):
            del self.globals[name]
        self.begin()

    def begin(self) -> None:
        """Starts the clock."""
        self.rounds = 0
        self.end = time.perf_counter() + SECONDS

    def count(self) -> None:
        """Counts a round of a loop or a call; a SecurityError if there are too many."""
        self.rounds += 1
        if self.rounds > MOST_ROUNDS or (self.rounds % 64 == 0 and time.perf_counter() > self.end):
            raise SecurityError(f"it runs for more than {MOST_ROUNDS} rounds or {SECONDS:g} s")

    def counted(self, values: Iterable[Any]) -> Iterator[Any]:
        """The same values, each of them counted."""
        for value in values:
            self.count()
            yield value

    def joined(self, *parts: Any) -> str:
        """What `~` makes."""
        texts = [str(part) for part in parts]
        _check_size(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _check_operands(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self.count()
        method = getattr(__obj, "__wrapped__", __obj)  # jinja2 wraps str.format
        _check_arguments(getattr(method, "__self__", None), method, args)
        return super().call(__context, __obj, *args, **kwargs)

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_Bounds().visit(source), *args, **kwargs)

    def _bounded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter whose calls count, and whose arguments are checked."""
        from functools import wraps

        @wraps(function)  # keeps the marks of filters that want the environment or the context
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self.count()
            owner, *rest = (arg for arg in (*args, None) if isinstance(arg, (str, int, list, NONE)))
            _check_arguments(owner, function, [*rest, *kwargs.values()])
            result = function(*args, **kwargs)
            if isinstance(result, str):
                _check_size(len(result))
            return result

        return bounded


class _Bounds(NodeTransformer):
    """Counts the rounds of loops, and joins texts by a function that measures them."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = _call("counted", [node.iter])
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("joined", list(node.nodes))


def _call(name: str, arguments: list[Any]) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None)


def _check_size(size: int) -> None:
    if size > MOST_CHARACTERS:
        raise SecurityError(f"it makes a text or list of {size} parts; at most {MOST_CHARACTERS}")


def _size(value: Any) -> int:
    return len(value) if isinstance(value, (str, list, tuple)) else 0


def _check_operands(operator: str, left: Any, right: Any) -> None:
    """Refuses what would be large before it is made."""
    numbers = [value for value in (left, right) if isinstance(value, int)]
    bits = [value.bit_length() for value in numbers]
    if operator == "+":
        _check_size(_size(left) + _size(right))
    elif operator == "*" and len(numbers) == 1:
        _check_size(max(_size(left), _size(right)) * max(0, numbers[0]))
    elif operator == "%" and isinstance(left, str):
        _check_format(left)
    elif len(numbers) == 2:
        digits = sum(bits) if operator == "*" else bits[0] * max(0, right)
        if operator in ("*", "**") and digits > MOST_DIGITS:
            raise SecurityError("it makes a number of too many digits")


def _check_arguments(owner: Any, function: Any, args: Iterable[Any]) -> None:
    """Refuses widths, counts and joins that would be large."""
    name, values = getattr(function, "__name__", ""), list(args)
    if isinstance(owner, (str, bytes)) or name in ("do_replace", "do_join", "do_indent"):
        if any(isinstance(value, int) and abs(value) > MOST_DIGITS for value in values):
            raise SecurityError(f"{name} is asked for a width or count above {MOST_DIGITS}")
        if "replace" in name and len(values) > 1:
            _check_size((_size(owner) + 1) * max(1, _size(values[1])))
        if "join" in name:
            given = [owner, *values]
            glue = max((_size(value) for value in given if isinstance(value, str)), default=0)
            for parts in (value for value in given if isinstance(value, (str, list, tuple))):
                _check_size(sum(map(_size, parts)) + glue * len(parts))
        if name.startswith("format") and isinstance(owner, str):
            _check_format(owner)


def _check_format(text: str) -> None:
    if WIDE.search(text) or "*" in text:
        raise SecurityError("a format asks for a width of 1000 or more")
