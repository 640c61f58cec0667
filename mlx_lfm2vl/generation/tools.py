"""Tools: grammars of their calls, calls while they are written, and schemas of Python functions.

How calls are read and written stands in `prompts.tool_calls`.
"""

from __future__ import annotations

import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from ..errors import AnswerError, PromptError
from ..prompts.question import QuestionSettings, Tools
from ..prompts.tool_calls import (
    CALL_END,
    CALL_START,
    IDENTIFIER,
    parse_block,
    python_literal,
)

CHOICES = ("none", "auto", "required")  # or the name of a tool
MAX_CALLS = 16  # in one answer
BOUNDS = {"minimum": -1e15, "maximum": 1e15}  # of numbers, which may have 300 digits otherwise
COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


# ---- grammars


def guided(**constraint: Any) -> QuestionSettings:
    """A constraint (`schema=`, `grammar=`) as settings of a question, where rows can be guided.

    Where they cannot, because llguidance is not installed, there are no settings: the model then
    answers freely, and what it answers is parsed.
    """
    able = constraint.keys() <= QuestionSettings.__annotations__.keys()
    return typing.cast(QuestionSettings, constraint if able and find_spec("llguidance") else {})


def tool_settings(
    tools: Tools, tool_choice: str | Mapping[str, Any] = "auto", parallel: bool = True
) -> QuestionSettings:
    """Settings of a question: the tools it shows, and the grammar of their calls.

    Arguments and errors as `tool_grammar`; a choice that forces a call needs llguidance.
    """
    grammar = tool_grammar(tools, tool_choice, parallel)
    if tool_choice == "none":
        return {}
    constraint = guided(grammar=grammar)
    if not constraint and tool_choice != "auto":
        raise PromptError(f"tool_choice {tool_choice!r} needs llguidance; install it, or take auto")
    return {"tools": tools, **constraint}


def tool_grammar(
    tools: Tools,
    tool_choice: str | Mapping[str, Any] = "auto",
    parallel: bool = True,
    as_json: bool = False,
) -> str:
    """A grammar in llguidance's Lark of answers that may call tools.

    Args:
        tools: JSON schemas of functions, with or without OpenAI's wrapper.
        tool_choice: "none": text alone; "auto": text, or a call with or without text around it;
            "required": a call, then maybe text; the name of a tool, or OpenAI's object with it:
            likewise, but only this one.
        parallel: several calls at once.
        as_json: calls have the JSON form, not the Pythonic one.

    Raises:
        PromptError: a tool without a name, or a choice that is none of these.
    """
    functions = {function["name"]: function for function in map(function_of, tools)}
    name = tool_choice if isinstance(tool_choice, str) else function_of(tool_choice)["name"]
    if name in functions:
        functions = {name: functions[name]}
    elif name not in CHOICES:
        known = ", ".join((*CHOICES, *functions))
        raise PromptError(f"tool_choice is {name!r}; it must be one of {known}")
    text = r"TEXT: /(.|\n)+/"
    if name == "none" or not functions:
        return f"start: TEXT?\n{text}"
    lines = ["start: TEXT? (calls TEXT?)?" if name == "auto" else "start: calls TEXT?", text]
    more = f'(", " call){{0,{MAX_CALLS - 1}}}' if parallel else ""
    lines.append(f'calls: {CALL_START} "[" call {more} "]" {CALL_END}')
    lines.append("call: " + " | ".join(f"f{number}" for number in range(len(functions))))
    write = _json_rules if as_json else _python_rules
    for number, function in enumerate(functions.values()):
        lines += write(f"f{number}", function)
    return "\n".join(lines)


def function_of(tool: Any) -> Mapping[str, Any]:
    """What a tool's schema says of its function, out of OpenAI's wrapper."""
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise PromptError(f"tool {tool!r:.200} has no name; give the JSON schema of a function")
    parameters = function.get("parameters") or {}
    if not isinstance(parameters, Mapping) or not isinstance(
        parameters.get("properties", {}), Mapping
    ):
        raise PromptError(f"tool {name} has parameters {parameters!r:.200}; give a JSON schema")
    return function


def _json_rules(rule: str, function: Mapping[str, Any]) -> list[str]:
    start = json.dumps(f'{{"name": {json.dumps(function["name"], ensure_ascii=False)}, ')
    closed = {"type": "object", "additionalProperties": False}
    arguments = {**closed, **(function.get("parameters") or {})}
    return [f'{rule}: {start} "\\"arguments\\": " {_json_value(arguments, {})} "}}"']


def _python_rules(rule: str, function: Mapping[str, Any]) -> list[str]:
    """Rules of one function: `_h`: nothing is written yet, `_r`: something is."""
    parameters = function.get("parameters") or {}
    properties, required = parameters.get("properties", {}), parameters.get("required") or ()
    for name in (function["name"], *properties):
        if not re.fullmatch(IDENTIFIER, name):
            raise PromptError(f"{name!r} is no name for Pythonic calls; rename it")
    shared = {key: parameters[key] for key in ("$defs", "definitions") if key in parameters}
    lines = [f"{rule}: {json.dumps(function['name'] + '(')} {rule}_h0 {json.dumps(')')}"]
    for n, (name, schema) in enumerate(properties.items()):
        argument = f"{json.dumps(name + '=')} {rule}_v{n}"
        lines.append(f"{rule}_v{n}: {_python_value(schema, shared)}")
        first, later = f"{argument} {rule}_r{n + 1}", f'", " {argument}'
        is_required = name in required
        lines.append(f"{rule}_h{n}: {first}" + ("" if is_required else f" | {rule}_h{n + 1}"))
        if n > 0:
            lines.append(f"{rule}_r{n}: {later if is_required else f'({later})?'} {rule}_r{n + 1}")
    last = len(properties)
    return [*lines, f'{rule}_h{last}: ""', *([f'{rule}_r{last}: ""'] if last else [])]


def _python_value(schema: Any, shared: Mapping[str, Any]) -> str:
    """What stands behind `name=`: JSON, but True, False and None are Python's."""
    if not isinstance(schema, Mapping):
        return _json_value(schema, shared)
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if values is not None:
        return " | ".join(json.dumps(python_literal(v), ensure_ascii=False) for v in values)
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return " | ".join(_python_value(item, shared) for item in schema[key])
    kind = schema.get("type")
    if isinstance(kind, list):
        return " | ".join(_python_value({**schema, "type": item}, shared) for item in kind)
    plain = {"boolean": '"True" | "False"', "null": '"None"'}
    return plain[kind] if kind in plain else _json_value(schema, shared)


def _json_value(schema: Any, shared: Mapping[str, Any]) -> str:
    bounded = _bounded(schema)
    whole = {**shared, **bounded} if isinstance(bounded, dict) else {"anyOf": [bounded]}
    return f"%json {json.dumps({**whole, 'x-guidance': COMPACT}, ensure_ascii=False)}"


def _bounded(schema: Any) -> Any:
    """The schema with bounds for all numbers that have none."""
    if isinstance(schema, (list, tuple)):
        return [_bounded(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    data = ("enum", "const", "default", "examples")
    inner = {k: v if k in data else _bounded(v) for k, v in schema.items()}
    kinds = inner.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    fine = {"multipleOf": 1e-6} if "number" in kinds else {}
    return {**(BOUNDS if fine or "integer" in kinds else {}), **fine, **inner}


# ---- calls while they are written


@dataclass(frozen=True)
class ToolCallDelta:
    """What became certain of a call.

    Attributes:
        index: which call of the answer, counted from 0.
        name: of the tool; only in the first delta of a call.
        arguments: a part of the arguments' JSON text; all of a call's make one JSON object.
    """

    index: int
    name: str | None = None
    arguments: str = ""


class ToolCallStream:
    """Takes the text between two marks piece by piece, and tells what became certain of its calls.

    A name is certain at its bracket, an argument when it has ended; of the JSON form, a whole call.
    After something that is no call, nothing more comes; `parse_calls` tells what is wrong.

    Attributes:
        text: everything so far.
    """

    def __init__(self, index: int = 0) -> None:
        self.text = ""
        self._index = index - 1  # of the call in work
        self._depth = 0
        self._list = 0  # brackets around the calls: 1, or 0 for a single one
        self._quote = ""
        self._part = ""  # what is not yet certain
        self._names: set[str] = set()
        self._in_call = self._is_escaped = self._is_dead = False

    def add(self, piece: str) -> list[ToolCallDelta]:
        """Takes more text."""
        self.text += piece
        deltas: list[ToolCallDelta] = []
        for character in piece:
            if self._is_dead:
                break
            try:
                deltas += self._take(character)
            except AnswerError:
                self._is_dead = True
        return deltas

    def _take(self, character: str) -> list[ToolCallDelta]:
        if self._quote:
            self._part += character
            if self._is_escaped or character == "\\":
                self._is_escaped = not self._is_escaped
            elif self._part.endswith(self._quote):
                self._quote = ""
            return []
        if character in "\"'":
            self._quote = character * (3 if self._part.endswith(2 * character) else 1)
        elif character in "([{":
            return self._open(character)
        elif character in ")]}":
            return self._close(character)
        elif character == "," and self._depth == self._list + self._in_call:
            if self._in_call:
                return self._argument()
            self._part = ""
            return []
        self._part += character
        return []

    def _open(self, bracket: str) -> list[ToolCallDelta]:
        self._depth += 1
        if bracket == "[" and self._depth == 1 and not self._part.strip():
            self._list = 1
            return []
        if bracket == "(" and self._depth == self._list + 1:
            name, self._part, self._in_call, self._names = self._part.strip(), "", True, set()
            self._index += 1
            return [ToolCallDelta(self._index, name)]
        self._part += bracket
        return []

    def _close(self, bracket: str) -> list[ToolCallDelta]:
        self._depth -= 1
        if self._in_call and self._depth == self._list:
            deltas, self._in_call = self._argument(), False
            end = "}" if self._names else "{}"
            return [*deltas, ToolCallDelta(self._index, arguments=end)]
        self._part += bracket
        if bracket == "}" and not self._in_call and self._depth == self._list:
            [call], self._part = parse_block(self._part), ""
            self._index += 1
            text = json.dumps(call.arguments, ensure_ascii=False)
            return [ToolCallDelta(self._index, call.name, text)]
        return []

    def _argument(self) -> list[ToolCallDelta]:
        part, self._part = self._part, ""
        if not part.strip():
            return []
        [call] = parse_block(f"[f({part})]")
        if self._names & call.arguments.keys():
            raise AnswerError(f"{part:.80} comes twice")
        text = json.dumps(call.arguments, ensure_ascii=False)[1:-1]
        start = ", " if self._names else "{"
        self._names |= call.arguments.keys()
        return [ToolCallDelta(self._index, arguments=start + text)]


# ---- schemas of functions

KINDS = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


def function_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """The JSON schema of a Python function, as `transformers`' `get_json_schema`.

    Names, types and defaults come from the signature, descriptions from the docstring, whose
    arguments stand below `Args:` or behind `:param name:`.

    Raises:
        PromptError: a parameter without a name of its own, or of a type that JSON does not know.
    """
    summary, described = _read_docstring(inspect.getdoc(function) or "")
    hints = typing.get_type_hints(function)
    properties: dict[str, Any] = {}
    required = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise PromptError(f"{function.__name__} has parameter {parameter}; tools need names")
        try:
            properties[name] = _schema_of(hints.get(name, Any))
        except PromptError as error:
            raise PromptError(f"{function.__name__}: parameter {name} {error}") from None
        if name in described:
            properties[name]["description"] = described[name]
        if parameter.default is parameter.empty:
            required.append(name)
    parameters = {"type": "object", "properties": properties, "required": required}
    inner = {"name": function.__name__, "description": summary, "parameters": parameters}
    return {"type": "function", "function": inner}


def _schema_of(kind: Any) -> dict[str, Any]:
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if kind is Any:
        return {}
    if kind in KINDS:
        return {"type": KINDS[kind]}
    if origin is typing.Literal:
        return {"enum": list(inner)}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_schema_of(item) for item in inner]}
    if origin in (list, tuple, Sequence):
        items = [_schema_of(item) for item in inner if item is not ...]
        return {"type": "array", **({"items": items[0]} if len(items) == 1 else {})}
    if origin in (dict, Mapping):
        values = {"additionalProperties": _schema_of(inner[1])} if inner else {}
        return {"type": "object", **values}
    raise PromptError(f"is of type {kind}; JSON knows str, int, float, bool, list, dict, Literal")


def _read_docstring(text: str) -> tuple[str, dict[str, str]]:
    """What a function does, and what its parameters are."""
    sections = re.split(
        r"^(Args|Arguments|Parameters|Returns|Raises|Yields):[ ]*$", text, flags=re.M
    )
    head, *fields = re.split(r"^:(?=param |returns?:|raises )", sections[0], flags=re.M)
    found = [m for f in fields if (m := re.match(r"param (?:.* )?(\w+):(.*)", f, re.S))]
    for title, body in zip(sections[1::2], sections[2::2], strict=True):
        if title in ("Args", "Arguments", "Parameters"):
            entry = r"^ {1,8}(\w+)(?: *\([^)]*\))?:(.*(?:\n(?! {1,8}\w+(?: *\([^)]*\))?:).*)*)"
            found += re.finditer(entry, body, re.M)
    return head.strip(), {m[1]: " ".join(m[2].split()) for m in found}


def read_tools(text: str, name: str) -> Tools:
    """Tools of a JSON text: a list, or one alone.

    Raises:
        PromptError: no JSON, or something else than tools; names the text.
    """
    try:
        tools = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{name} is not valid JSON: {error}") from None
    tools = tools if isinstance(tools, list) else [tools]
    try:
        for tool in tools:
            function_of(tool)
    except PromptError as error:
        raise PromptError(f"{name}: {error}") from None
    return typing.cast(Sequence[Mapping[str, Any]], tools)
