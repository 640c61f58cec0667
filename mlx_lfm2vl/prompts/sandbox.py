"""A sandbox for chat templates, bounded in time and memory: a template comes with a download.

jinja2's own sandbox keeps a template from reaching Python, not from running for ever or filling the
memory. Here every value is weighed when it is made, whatever makes it, so that no single operation
takes long; and between operations a clock is read. What a template writes is compiled as before,
only that each loop, literal, comparison and output goes through one of the functions below.
"""

from __future__ import annotations

import operator
import re
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import wraps
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

SECONDS = 2.0  # of computing, per rendering; published templates take milliseconds
MOST_SOURCE = 1 << 16  # characters of a template, which bounds its compiling
MOST_CHARACTERS = 1 << 23  # of a value, however deep it lies in it
MOST_TOGETHER = 1 << 27  # of all that a rendering makes, and so of what it can hold
MOST_WORK = 1 << 28  # product of what an operation takes, for those that may need it
MOST_BITS = 1 << 12  # of a number
MOST_DEPTH = 100  # of lists in lists
OBJECT = 64  # characters that an object counts as
WIDE = re.compile(r"\d{4}|\*")  # a width of 1000 or more in a format
FILTERS = (
    *("abs", "attr", "capitalize", "dictsort", "e", "escape", "float", "groupby", "indent", "int"),
    *("items", "join", "last", "list", "lower", "map", "max", "min", "reject", "rejectattr"),
    *("replace", "reverse", "round", "safe", "select", "selectattr", "sort", "string", "sum"),
    *("trim", "unique", "upper"),
)
FREE_FILTERS = ("count", "d", "default", "first", "length")  # these only look
FORBIDDEN_METHODS = ("decode", "encode")  # some codecs take the square of the time
COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    **{name: getattr(operator, name) for name in ("eq", "ne", "gt", "lt")},
    **{"gteq": operator.ge, "lteq": operator.le},
    **{"in": lambda a, b: a in b, "notin": lambda a, b: a not in b},
}


def weigh(value: Any) -> int:
    """Characters of a value, with everything in it as often as it stands there.

    Raises:
        SecurityError: too many, lists nested too deeply, or too large a number.
    """
    if type(value) is str and len(value) < MOST_CHARACTERS - OBJECT:
        return OBJECT + len(value)
    total, level = 0, [value]
    for _ in range(MOST_DEPTH):
        below: list[Any] = []
        total += OBJECT * len(level)
        for item in level:
            if isinstance(item, (str, bytes)):
                total += len(item)
            elif isinstance(item, int):
                if item.bit_length() > MOST_BITS:
                    raise SecurityError(f"it makes a number of more than {MOST_BITS} bits")
            elif isinstance(item, Collection):
                if total + OBJECT * (len(below) + len(item)) > MOST_CHARACTERS:
                    total = MOST_CHARACTERS + 1
                    break
                below.extend(item)
                below.extend(item.values() if isinstance(item, Mapping) else ())
        if total > MOST_CHARACTERS:
            raise SecurityError(f"it makes a value of more than {MOST_CHARACTERS} characters")
        if not below:
            return total
        level = below
    raise SecurityError(f"it nests lists more than {MOST_DEPTH} deep")


def _check_work(value: Any, others: Iterable[Any]) -> None:
    """Refuses what may take or make the product of its operands."""
    factor = 1
    for other in others:
        number = isinstance(other, (int, float))
        factor += abs(other) if number else len(other) + 1 if type(other) is str else weigh(other)
    size = weigh(value)
    if size * factor > MOST_WORK:
        raise SecurityError(f"it asks for work on {size} times {factor} characters")


def _check_format(text: str) -> None:
    if WIDE.search(text):
        raise SecurityError("a format asks for a width of 1000 or more")


def _is_container(value: Any) -> bool:
    return isinstance(value, Collection) and not isinstance(value, (str, bytes))


class _Names(Namespace):
    """jinja2's `namespace`, which a template may link in circles, without its contents as text."""

    def __repr__(self) -> str:
        return "<namespace>"


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Compiles templates that end. `begin` is called before each rendering, in its thread."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "**", "%"])

    def __init__(self, extensions: list[type[Extension]]) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[*extensions, loopcontrols]
        )
        self._spent = threading.local()
        self.begin()
        given = self.filters
        self.filters = {name: self.bounded(given[name]) for name in FILTERS}
        self.filters |= {name: given[name] for name in FREE_FILTERS}
        for name in ("made", "shown", "counted", "joined", "compared", "sliced"):
            self.filters[f"_{name}"] = getattr(self, f"_{name}")
        tests: dict[str, Any] = self.tests
        self.tests = {name: self._checked(test) for name, test in tests.items()}
        for name in ("lipsum", "cycler", "joiner"):
            del self.globals[name]
        self.globals["namespace"] = _Names

    def begin(self) -> None:
        """Starts the clock of this thread."""
        self._spent.characters = self._spent.looks = 0
        self._spent.end = time.thread_time() + SECONDS

    def look(self) -> None:
        """A SecurityError if the time is over."""
        spent = self._spent
        spent.looks += 1
        if spent.looks % 8 == 0 and time.thread_time() > spent.end:
            raise SecurityError(f"it computes for more than {SECONDS:g} s")

    def made(self, value: Any, size: int | None = None) -> Any:
        """A new value, weighed."""
        spent = self._spent
        spent.characters += weigh(value) if size is None else size
        if spent.characters > MOST_TOGETHER:
            raise SecurityError(f"it makes more than {MOST_TOGETHER} characters")
        self.look()
        return value

    @pass_context
    def _made(self, context: Any, value: Any) -> Any:
        return self.made(value)

    @pass_context
    def _shown(self, context: Any, value: Any) -> str:
        if _is_container(value):
            weigh(value)
        return self.made(str(value))

    @pass_context
    def _counted(self, context: Any, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.look()
            yield value

    @pass_context
    def _joined(self, context: Any, parts: list[Any]) -> str:
        return self.made("".join([self._shown(context, part) for part in parts]))

    @pass_context
    def _sliced(self, context: Any, value: Any) -> Any:
        # its parts were weighed with what it was cut from
        return self.made(value, len(value) if isinstance(value, (str, list, tuple)) else 0)

    @pass_context
    def _compared(self, context: Any, left: Any, *operations: Any) -> Any:
        result: Any = True
        for name, right in zip(operations[::2], operations[1::2], strict=True):
            self.look()
            if _is_container(left) and _is_container(right):
                weigh([left, right])
            result = COMPARISONS[name](left, right)
            if not result:
                break
            left = right
        return result

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            if operator == "**" and left.bit_length() * max(0, right) > MOST_BITS:
                raise SecurityError(f"it makes a number of more than {MOST_BITS} bits")
        elif operator == "*":
            many, number = (right, left) if isinstance(left, int) else (left, right)
            if isinstance(number, int) and weigh(many) * max(0, number) > MOST_CHARACTERS:
                raise SecurityError(f"it makes a value of more than {MOST_CHARACTERS} characters")
        elif operator == "%" and isinstance(left, str):
            _check_format(left)
            _check_work(left, [right])
        result = super().call_binop(context, operator, left, right)
        # as with slices; tuples are weighed, since they can be keys, whose hash reads all of them
        return self.made(result, len(result) * OBJECT if isinstance(result, list) else None)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        method = getattr(__obj, "__wrapped__", __obj)  # jinja2 wraps str.format
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        given = [*args, *kwargs.values()]
        if isinstance(owner, (str, bytes, int, float)):
            _check_work(owner, given)
        elif any(map(_is_container, given)):
            weigh([owner, given])
        if name in ("format", "format_map", "strftime"):
            _check_format(owner if isinstance(owner, str) else "".join(map(str, given)))
        return __self.made(super().call(__context, __obj, *args, **kwargs))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in FORBIDDEN_METHODS and super().is_safe_attribute(obj, attr, value)

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_Bounds().visit(source), *args, **kwargs)

    def bounded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter whose operands and result are weighed."""
        first = 1 if hasattr(function, "jinja_pass_arg") else 0  # the context comes first

        @wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            value, *others = (*args[first:], *kwargs.values())
            if any(isinstance(other, int) and abs(other) > 1000 for other in others):
                raise SecurityError(f"{function.__name__} is asked for more than 1000")
            _check_work(value, others)
            result = function(*args, **kwargs)
            return self.made(list(result) if isinstance(result, Iterator) else result)

        return bounded

    def _checked(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def checked(*args: Any) -> Any:
            self.look()
            if sum(map(_is_container, args)) > 1:
                weigh(args)
            return function(*args)

        return checked


class _Bounds(NodeTransformer):
    """Sends what a template computes through the environment's functions."""

    def _wrap(self, node: Any) -> Any:
        self.generic_visit(node)
        return _filtered(node, "_made") if getattr(node, "ctx", "load") == "load" else node

    visit_List = visit_Tuple = visit_Dict = _wrap

    def visit_Concat(self, node: nodes.Concat) -> Any:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes), "_joined")

    def visit_Compare(self, node: nodes.Compare) -> Any:
        self.generic_visit(node)
        pairs = [(nodes.Const(operand.op), operand.expr) for operand in node.ops]
        return _filtered(node.expr, "_compared", [part for pair in pairs for part in pair])

    def visit_Getitem(self, node: nodes.Getitem) -> Any:
        self.generic_visit(node)
        return _filtered(node, "_sliced") if isinstance(node.arg, nodes.Slice) else node

    def visit_For(self, node: nodes.For) -> Any:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "_counted")
        return node

    def visit_Output(self, node: nodes.Output) -> Any:
        self.generic_visit(node)
        node.nodes = [_filtered(child, "_shown") for child in node.nodes]
        return node

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> Any:
        self.generic_visit(node)
        node.filter = _filtered(node.filter, "_made")
        return node


def _filtered(node: Any, name: str, args: Iterable[Any] = ()) -> nodes.Filter:
    return nodes.Filter(node, name, list(args), [], None, None)
