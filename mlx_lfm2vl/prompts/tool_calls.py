"""Tool calls as the models write them, `[f(a="b", n=1)]` or JSON between two marks.

A call is data: it is read by `ast` and never run, and what is not a plain call with named, literal
arguments is refused.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ..errors import AnswerError, PromptError
from .messages import Message

CALL_START, CALL_END = "<|tool_call_start|>", "<|tool_call_end|>"
CONSTANTS = {"true": True, "false": False, "null": None}  # JSON's, between Python's brackets

IDENTIFIER = r"[^\W\d]\w*(?:[.-]\w+)*"
_NAME = re.compile(rf"(?<![\w.])({IDENTIFIER})(\s*(?:\(|=(?!=)))")
_STRING = re.compile(r"(?<!\w)(\w*)(\"{3}|'{3}|\"|')((?:\\.|(?!\2).)*)\2", re.DOTALL)
_ESCAPE = re.compile(
    r"\\(?:[\\'\"abfnrtv0-7]|x[\da-fA-F]{2}|u[\da-fA-F]{4}|U[\da-fA-F]{8}|(?P<unknown>.))",
    re.DOTALL,
)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True)
class ToolCall:
    """One call that a model asks for.

    Attributes:
        name: of the tool.
        arguments: by name; values are those of JSON.
        id: for whoever answers it; `call_0` is the first of an answer. Does not count in
            comparisons.
    """

    name: str
    arguments: dict[str, Any]
    id: str = field(default="", compare=False)

    def to_dict(self) -> dict[str, Any]:
        """As in OpenAI's messages, the arguments as JSON text."""
        arguments = json.dumps(self.arguments, ensure_ascii=False)
        function = {"name": self.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}


# ---- reading


def parse_calls(text: str, known: Collection[str] | None = None) -> list[ToolCall]:
    """The calls in what a model has written.

    Args:
        text: a whole answer, of which the parts between marks are calls; without marks, it must be
            calls and nothing else.
        known: names of the tools; others are refused. A text without marks that does not consist
            of calls of these is then ordinary text, with no call in it.

    Raises:
        AnswerError: something else than calls with named, literal arguments.
    """
    marked = re.findall(rf"{re.escape(CALL_START)}(.*?)(?:{re.escape(CALL_END)}|\Z)", text, re.S)
    try:
        calls = [call for block in marked or [text] for call in parse_block(block)]
        for call in calls:
            if known is not None and call.name not in known:
                raise AnswerError(f"{call.name} is no tool; there are: {', '.join(known)}")
    except AnswerError:
        if marked or known is None:
            raise
        return []
    return [replace(call, id=f"call_{number}") for number, call in enumerate(calls)]


def parse_block(text: str) -> list[ToolCall]:
    """The calls of what stands between two marks; see `parse_calls`."""
    text = text.strip()
    try:
        value = json.loads(text, strict=False, object_pairs_hook=_unique)
    except AnswerError:
        raise
    except (ValueError, RecursionError):
        return _parse_python(text)
    items = value if isinstance(value, list) else [value]
    return [_call_of(item) for item in items]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise AnswerError(f"a tool call names a key twice: {[key for key, _ in pairs]}")
    return dict(pairs)


def _call_of(item: Any) -> ToolCall:
    """A call of its JSON form, with or without OpenAI's wrapper."""
    inner = item.get("function", item) if isinstance(item, dict) else None
    arguments = inner.get("arguments") if isinstance(inner, dict) else None
    name = inner.get("name") if isinstance(inner, dict) else None
    if isinstance(name, str) and isinstance(arguments, dict):
        return ToolCall(name, _plain(arguments))
    raise AnswerError(f"{item!r:.200} is no tool call; it needs a name and arguments")


def _plain(value: Any) -> Any:
    """A value of JSON; an endless number is none, nor is half a character."""
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise AnswerError(f"a tool call holds {value}, which is no value of JSON")
    if isinstance(value, str) and not value.isascii():
        try:  # \ud83d\ude00 is one character in JSON, and two halves in Python
            return value.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            raise AnswerError(f"a tool call holds half a character: {value!r:.100}") from None
    return value


def _parse_python(text: str) -> list[ToolCall]:
    source, names = _mend(text)
    try:
        tree = ast.parse(source, mode="eval").body
        nodes = tree.elts if isinstance(tree, ast.List) else [tree]
        return [_call_node(node, names) for node in nodes]
    except AnswerError as error:
        raise AnswerError(f"{text!r:.200} is no list of tool calls: {error}") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise AnswerError(f"{text!r:.200} is no list of tool calls") from None


def _mend(text: str) -> tuple[str, list[str]]:
    """Makes Python of what models write beside it, where only one meaning is possible.

    Names before `(` and `=`, which may be keywords or hold dots and dashes, become numbered ones;
    the true ones are returned, too. Numbers lose leading zeros, strings get unknown escapes and
    control characters written out.
    """
    names: list[str] = []
    parts: list[str] = []

    def number(match: re.Match[str]) -> str:
        names.append(match[1])
        return f"_{len(names) - 1}{match[2]}"

    def code(part: str) -> str:
        if "#" in part:  # a comment would hide what stands behind it
            raise AnswerError(f"{text!r:.200} is no list of tool calls")
        return _NAME.sub(number, re.sub(r"(?<![\w.])0+(?=\d)", "", part))

    end = 0
    for match in _STRING.finditer(text):
        parts += [code(text[end : match.start()]), _mend_string(match)]
        end = match.end()
    return "".join([*parts, code(text[end:])]), names


def _mend_string(match: re.Match[str]) -> str:
    prefix, quote, body = match.groups()
    if prefix:  # bytes and f-strings are refused later
        return match[0]
    body = _ESCAPE.sub(lambda m: m[0] if m["unknown"] is None else "\\" + m[0], body)
    return quote + _CONTROL.sub(lambda m: f"\\x{ord(m[0]):02x}", body) + quote


def _call_node(node: ast.expr, names: Sequence[str]) -> ToolCall:
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)) or node.args:
        raise AnswerError("each item must be a call with named arguments")
    arguments: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise AnswerError("** is no named argument")
        name = names[int(keyword.arg[1:])]
        if name in arguments:
            raise AnswerError(f"a tool call names its argument {name} twice")
        arguments[name] = _literal_node(keyword.value)
    return ToolCall(names[int(node.func.id[1:])], arguments)


def _literal_node(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=None | str() | bool() | int() | float() as value):
            return _plain(value)
        case ast.UnaryOp(
            op=ast.USub() | ast.UAdd() as sign,
            operand=ast.Constant(value=int() | float() as value),
        ) if not isinstance(value, bool):
            return _plain(-value if isinstance(sign, ast.USub) else value)
        case ast.List(elts=items) | ast.Tuple(elts=items) | ast.Set(elts=items):
            return [_literal_node(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            names = [key.value for key in keys if isinstance(key, ast.Constant)]
            if len(names) == len(keys) and all(isinstance(name, str) for name in names):
                pairs = zip(map(str, names), map(_literal_node, values), strict=True)
                return _plain(_unique(list(pairs)))
        case ast.Name(id=name) if name in CONSTANTS:
            return CONSTANTS[name]
    raise AnswerError("arguments must be values, not code")


# ---- writing


def render_calls(calls: Sequence[ToolCall]) -> str:
    """Calls between their marks, so that `parse_calls` gives them back.

    Pythonic, as LFM2.5-VL-450M's template writes them, but with quotes and line breaks escaped;
    as JSON if a name is not possible there. Names of special tokens inside are escaped, too.
    """
    if all(map(_is_pythonic, calls)):
        text = f"[{', '.join(map(_render, calls))}]"
    else:
        items = [{"name": call.name, "arguments": call.arguments} for call in calls]
        text = json.dumps(items, ensure_ascii=False)
    return CALL_START + text.replace("<|", "\\u003c|") + CALL_END


def _render(call: ToolCall) -> str:
    arguments = (f"{name}={python_literal(value)}" for name, value in call.arguments.items())
    return f"{call.name}({', '.join(arguments)})"


def _is_pythonic(call: ToolCall) -> bool:
    return all(re.fullmatch(IDENTIFIER, name) for name in (call.name, *call.arguments))


def python_literal(value: Any) -> str:
    """A value as it stands in a call: strings and objects as JSON, the rest as Python."""
    is_json = isinstance(value, (str, dict))
    return json.dumps(value, ensure_ascii=False) if is_json else repr(value)


# ---- calls in a conversation


class CallStyle(NamedTuple):
    """What a chat template does with the calls of a message.

    Attributes:
        carried: it writes them so that they can be read again.
        text_first: it writes them after the text.
    """

    carried: bool
    text_first: bool


PROBE = ToolCall("f", {"a": 'it\'s "so"\\\n', "b": ["'x\"", {"k": None}], "c": True})


def call_style(render: Callable[..., str]) -> CallStyle:
    """Finds out by asking `render(messages, add_generation_prompt=False)`."""
    function = {"name": PROBE.name, "arguments": PROBE.arguments}
    calls = [{"type": "function", "function": function}]
    message = {"role": "assistant", "content": "TEXT", "tool_calls": calls}
    try:
        text = render([{"role": "user", "content": "?"}, message], add_generation_prompt=False)
        carried = CALL_START in text and parse_calls(text) == [PROBE]
    except (PromptError, AnswerError):
        return CallStyle(carried=False, text_first=False)
    return CallStyle(carried, 0 <= text.find("TEXT") < text.find(CALL_START))


def carry_calls(messages: Sequence[Message], style: Callable[[], CallStyle]) -> list[Message]:
    """A conversation in OpenAI's form so that a chat template loses nothing of its tool calls.

    Arguments as JSON text become what they stand for. Calls that the template would drop or spoil
    are written into the assistant's text. What a tool has returned becomes text.

    Raises:
        PromptError: a call without a name, or arguments that are no JSON object.
    """
    return [_carry(message, style) for message in messages]


def _carry(message: Message, style: Callable[[], CallStyle]) -> Message:
    content = message.get("content")
    if message.get("role") == "tool" and not isinstance(content, (str, list, tuple, type(None))):
        return {**message, "content": json.dumps(content, ensure_ascii=False)}
    if "tool_calls" not in message:
        return message
    calls = [_read_call(call) for call in message["tool_calls"] or ()]
    plain = {key: value for key, value in message.items() if key != "tool_calls"}
    if not calls:
        return plain
    content = "" if content is None else content
    is_safe = all(_is_pythonic(call) and "<|" not in repr(call.arguments) for call in calls)
    if style().carried and is_safe:
        functions = [{"name": call.name, "arguments": call.arguments} for call in calls]
        shaped = [{"type": "function", "function": function} for function in functions]
        return {**plain, "content": content, "tool_calls": shaped}
    text: Any = render_calls(calls)
    if not isinstance(content, str):
        text, content = [{"type": "text", "text": text}], list(content)
    return {**plain, "content": content + text if style().text_first else text + content}


def _read_call(call: Any) -> ToolCall:
    """A call of a message: OpenAI's form, the bare one, or a `ToolCall`."""
    if isinstance(call, ToolCall):
        return call
    function = call.get("function", call) if isinstance(call, Mapping) else {}
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name:
        raise PromptError(f"tool call {call!r:.200} has no name")
    arguments = function.get("arguments")
    try:
        if isinstance(arguments, str):
            arguments = json.loads(arguments.strip() or "null")
        arguments = json.loads(json.dumps({} if arguments is None else arguments, allow_nan=False))
    except (ValueError, TypeError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        given = function.get("arguments")
        raise PromptError(f"tool call {name} has arguments {given!r:.200}; give a JSON object")
    return ToolCall(name, arguments)
