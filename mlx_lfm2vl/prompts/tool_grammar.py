"""What tools permit: grammars of their calls, and schemas of Python functions.

How calls are read and written stands in `tool_calls`.
"""

from __future__ import annotations

import inspect
import json
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import PromptError
from .json_schema import JSON_STYLE, bounded, read_text, type_schema
from .tool_calls import CALL_END, CALL_START, IDENTIFIER, python_literal

ToolChoice = str | Mapping[str, Any]
CHOICES = ("none", "auto", "required")  # or the name of a tool
MAX_CALLS = 16  # in one answer
OPEN = ("$ref", "anyOf", "oneOf", "allOf", "patternProperties")  # bring arguments of other names


def tool_grammar(
    tools: Sequence[Any],
    tool_choice: ToolChoice = "auto",
    parallel: bool = True,
    as_json: bool | None = None,
) -> str:
    """A grammar in llguidance's Lark of answers that may call tools.

    Args:
        tools: JSON schemas of functions, with or without OpenAI's wrapper, or Python functions.
        tool_choice: "none": text alone; "auto": text, or a call with or without text around it;
            "required": a call, then maybe text; the name of a tool, or OpenAI's object with it:
            likewise, but only this one.
        parallel: several calls at once.
        as_json: calls have the JSON form (True) or the Pythonic one (False); None lets the model
            choose, if all names are possible in Python.

    Raises:
        PromptError: a tool without a name, or a choice that is none of these.
    """
    name, functions = chosen(tools, tool_choice)
    text = r"TEXT: /(.|\n)+/"
    if name == "none" or not functions:
        return f"start: TEXT?\n{text}"
    forms = {"p": not as_json, "j": as_json is not False}
    if as_json is None:
        forms["p"] = all(map(_is_pythonic, functions.values()))
    rules = {form: _list_rules(form, functions, parallel) for form, used in forms.items() if used}
    return "\n".join([
        "start: TEXT? (calls TEXT?)?" if name == "auto" else "start: calls TEXT?",
        text,
        f'calls: {CALL_START} "[" ({" | ".join(rules)}) "]" {CALL_END}',
        *(line for lines in rules.values() for line in lines),
    ])  # fmt: skip


def chosen(
    tools: Sequence[Any], tool_choice: ToolChoice
) -> tuple[str, dict[str, Mapping[str, Any]]]:
    """The choice as a word, and the functions that it leaves, by name; errors as above."""
    functions = {function["name"]: function for function in map(function_of, tools)}
    name = function_of(tool_choice)["name"] if isinstance(tool_choice, Mapping) else tool_choice
    if name in functions:
        return name, {name: functions[name]}
    if name not in CHOICES:
        known = ", ".join((*CHOICES, *functions))
        raise PromptError(f"tool_choice is {name!r:.200}; it must be one of {known}")
    return name, functions


def _list_rules(form: str, functions: Mapping[str, Mapping[str, Any]], parallel: bool) -> list[str]:
    """Rules of calls of one form: `p`, Pythonic, or `j`, JSON."""
    more = f' (", " {form}_call){{0,{MAX_CALLS - 1}}}' if parallel else ""
    names = [f"{form}_f{number}" for number in range(len(functions))]
    lines = [f"{form}: {form}_call{more}", f"{form}_call: {' | '.join(names)}"]
    for name, function in zip(names, functions.values(), strict=True):
        lines += (_python_rules if form == "p" else _json_rules)(name, function)
    return lines


def function_of(tool: Any) -> Mapping[str, Any]:
    """What a tool's schema says of its function, out of OpenAI's wrapper."""
    tool = plain_tool(tool)
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


def plain_tool(tool: Any) -> Any:
    """A tool as JSON."""
    if callable(tool):
        return function_schema(tool)
    try:
        return json.loads(json.dumps(tool))
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptError(f"tool {tool!r:.200} is no JSON: {error}") from None


def parameters_of(function: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a function's arguments: an object without others than are named."""
    parameters = function.get("parameters") or {}
    closed = {} if any(key in parameters for key in OPEN) else {"additionalProperties": False}
    return {"type": "object", **closed, **parameters}


def _is_pythonic(function: Mapping[str, Any]) -> bool:
    """Whether all calls that are permitted can be written in Python."""
    parameters = parameters_of(function)
    properties = parameters.get("properties", {})
    names = (function["name"], *properties)
    is_free = not properties and parameters.get("additionalProperties") is not False
    return not is_free and all(re.fullmatch(IDENTIFIER, name) for name in names)


def _json_rules(rule: str, function: Mapping[str, Any]) -> list[str]:
    start = json.dumps(f'{{"name": {json.dumps(function["name"], ensure_ascii=False)}, ')
    arguments = _json_value(parameters_of(function), {})
    return [f'{rule}: {start} "\\"arguments\\": " {arguments} "}}"']


def _python_rules(rule: str, function: Mapping[str, Any]) -> list[str]:
    """Rules of one function: `_h`: nothing is written yet, `_r`: something is."""
    parameters = parameters_of(function)
    properties, required = parameters.get("properties", {}), parameters.get("required", ())
    for name in (function["name"], *properties):
        if not re.fullmatch(IDENTIFIER, name):
            raise PromptError(f"{name!r} is no name for Pythonic calls; rename it")
    shared: dict[str, Any] = {
        key: parameters[key] for key in ("$defs", "definitions") if key in parameters
    }
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
    schema = schema if isinstance(schema, Mapping) else {"anyOf": [schema]}
    whole = {**bounded({**shared, **schema}), "x-guidance": JSON_STYLE}
    return f"%json {json.dumps(whole, ensure_ascii=False)}"


def function_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """The JSON schema of a Python function, as `transformers`' `get_json_schema`.

    Names, types and defaults come from the signature, descriptions from the docstring, whose
    arguments stand below `Args:` or behind `:param name:`.

    Raises:
        PromptError: a parameter without a name of its own, or of a type that JSON does not know.
    """
    summary, described = _read_docstring(inspect.getdoc(function) or "")
    hints = typing.get_type_hints(function, include_extras=True)
    properties: dict[str, Any] = {}
    required = []
    defs: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise PromptError(f"{function.__name__} has parameter {parameter}; tools need names")
        schema = type_schema(hints.get(name, Any), f"{function.__name__}.{name}", defs)
        about = {"description": described[name]} if name in described else {}
        properties[name] = {**schema, **about}
        if parameter.default is parameter.empty:
            required.append(name)
    parameters = {"type": "object", "properties": properties, "required": required}
    if defs:
        parameters["$defs"] = defs
    inner = {"name": function.__name__, "description": summary, "parameters": parameters}
    return {"type": "function", "function": inner}


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


def read_tools(file: str) -> list[dict[str, Any]]:
    """The tools of a JSON file: a list, or one alone.

    Raises:
        PromptError: no JSON, or something else than tools; names the file.
    """
    try:
        tools = json.loads(read_text("tools", file))
    except (ValueError, RecursionError) as error:
        raise (
            error
            if isinstance(error, PromptError)
            else PromptError(f"{file} is not valid JSON: {error}")
        ) from None
    tools = tools if isinstance(tools, list) else [tools]
    try:
        for tool in tools:
            function_of(tool)
    except PromptError as error:
        raise PromptError(f"{file}: {error}") from None
    return tools
