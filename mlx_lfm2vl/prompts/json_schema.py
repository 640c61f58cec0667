"""JSON schemas: read from all that stands for one, and narrowed so that answers end."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from ..errors import PromptError

# the style of the models' own JSON; free white space lets an answer run on for ever
JSON_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
MOST_NUMBER = 10**15
STEP = 1e-6  # between numbers, so that they end
ANY = {"$ref": "#/$defs/_any"}
ONE = ("items", "additionalProperties")  # keywords that hold a schema
LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
MAPS = ("properties", "patternProperties", "$defs", "definitions")
RIGHT_SCHEMA = "a dict, JSON text, the path of a file, a dataclass, a pydantic class, or True"


def read_schema(schema: Any) -> dict[str, Any]:
    """A JSON schema from any form that `schema=` takes.

    Raises:
        PromptError: it is none.
    """
    if schema is True:
        return {}
    if isinstance(schema, type) and hasattr(schema, "model_json_schema"):
        return schema.model_json_schema()
    if isinstance(schema, type) and is_dataclass(schema):
        defs: dict[str, Any] = {}
        return {**type_schema(schema, schema.__name__, defs), "$defs": defs}
    if isinstance(schema, Mapping):
        try:
            return json.loads(json.dumps(schema))
        except (TypeError, ValueError, RecursionError) as error:
            raise PromptError(f"schema is no JSON: {error}") from None
    check(isinstance(schema, (str, Path)), "schema", schema, RIGHT_SCHEMA)
    text = str(schema).strip()
    check(text != "", "schema", schema, RIGHT_SCHEMA)
    if isinstance(schema, str) and (text[0] in "{[" or text in ("true", "false", "null")):
        return _loads("schema", text)
    return _loads(str(schema), read_text("schema", schema))


def read_text(name: str, path: str | Path) -> str:
    """A file of text; a PromptError that names it if it cannot be read."""
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise PromptError(f"{name} {path!s:.200} cannot be read: {reason}") from None


def _loads(name: str, text: str) -> dict[str, Any]:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{name} is no JSON schema: {error}") from None
    if schema is True:
        return {}
    check(isinstance(schema, dict), name, schema, "a JSON object, or true")
    return schema


def check(good: bool, name: str, value: Any, right: str) -> None:
    """A PromptError if a value is not right."""
    if not good:
        raise PromptError(f"{name} is {value!r:.200}; it must be {right}")


class _Rule(NamedTuple):
    """JSON schema of a simple Python type."""

    type: Any
    schema: dict[str, Any]


RULES = (
    _Rule(str, {"type": "string"}), _Rule(bool, {"type": "boolean"}),
    _Rule(int, {"type": "integer"}), _Rule(float, {"type": "number"}),
    _Rule(NoneType, {"type": "null"}), _Rule(None, {"type": "null"}), _Rule(Any, {}),
    _Rule(list, {"type": "array"}), _Rule(dict, {"type": "object"}),
)  # fmt: skip


def type_schema(kind: Any, place: str, defs: dict[str, Any]) -> dict[str, Any]:
    """The schema of a Python type, for a field or an argument; schemas of dataclasses go to `defs`.

    Raises:
        PromptError: there is none; it names the place.
    """
    for rule in RULES:
        if kind is rule.type:
            return rule.schema
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return type_schema(args[0], place, defs)
    if origin is Literal:
        return {"enum": list(args)}
    if origin in (Union, UnionType):
        return {"anyOf": [type_schema(arg, place, defs) for arg in args]}
    if origin in (list, Sequence) or (origin is tuple and args[1:] == (...,)):
        return {"type": "array", "items": type_schema(args[0], place, defs)}
    if origin is tuple:
        items = [type_schema(arg, place, defs) for arg in args]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "items": False}
    if origin in (dict, Mapping) and args[0] is str:
        return {"type": "object", "additionalProperties": type_schema(args[1], place, defs)}
    if isinstance(kind, type) and issubclass(kind, Enum):
        return {"enum": [member.value for member in kind]}
    if isinstance(kind, type) and is_dataclass(kind):
        return _of_dataclass(kind, defs)
    raise PromptError(f"{place} has the type {kind}, for which there is no JSON schema")


def _of_dataclass(kind: type, defs: dict[str, Any]) -> dict[str, Any]:
    name = kind.__name__
    if name not in defs:
        schema = defs[name] = {"type": "object"}
        hints, members = get_type_hints(kind, include_extras=True), fields(kind)
        schema["properties"] = {
            f.name: type_schema(hints[f.name], f"{name}.{f.name}", defs) for f in members
        }
        free = [f.name for f in members if f.default is f.default_factory is MISSING]
        schema["required"] = free
    return {"$ref": f"#/$defs/{name}"}


def bounded(schema: dict[str, Any]) -> dict[str, Any]:
    """The same schema, narrowed so that answers end.

    Numbers without bounds lie within ±10¹⁵, those that are not whole have six digits behind the
    point, and objects that name their properties have no others, unless the schema says so.
    """
    joins = ("allOf", "unevaluatedProperties", "dependentSchemas")
    beside = ("$ref", "anyOf", "oneOf")
    parts = list(_schemas(schema))
    # where several schemas describe one object, none of them knows all of its properties
    joined = any(any(key in part for key in joins) for part in parts) or any(
        "properties" in part and any(key in part for key in beside) for part in parts
    )
    narrow = _narrowed(schema, not joined)
    number = _bound_numbers({"type": "number"})
    kinds = [{"type": kind} for kind in ("string", "boolean", "null")]
    nested = {"type": "object", "additionalProperties": ANY}, {"type": "array", "items": ANY}
    definition = {"anyOf": [*nested, number, *kinds]}
    given = narrow.get("$defs")
    return {**narrow, "$defs": {**(given if isinstance(given, dict) else {}), "_any": definition}}


def _schemas(schema: Any) -> Iterator[dict[str, Any]]:
    """A schema and all that it is made of."""
    if isinstance(schema, dict):
        yield schema
        inner = [schema[key] for key in ONE if key in schema]
        inner += [
            part for key in LISTS if isinstance(schema.get(key), list) for part in schema[key]
        ]
        inner += [
            part
            for key in MAPS
            if isinstance(schema.get(key), dict)
            for part in schema[key].values()
        ]
        for part in inner:
            yield from _schemas(part)


def _narrowed(schema: Any, closes: bool) -> Any:
    if schema is True or schema == {}:
        return ANY
    if not isinstance(schema, dict):
        return schema
    plain = {"title", "description", "default", "examples", "$comment", "$schema"}
    out = dict(schema)
    if not (schema.keys() - plain - {"$defs", "definitions"}):
        out |= ANY
    for key in ONE:
        if key in out:
            out[key] = _narrowed(out[key], closes)
    for key in LISTS:
        if isinstance(out.get(key), list):
            out[key] = [_narrowed(part, closes) for part in out[key]]
    for key in MAPS:
        if isinstance(out.get(key), dict):
            out[key] = {name: _narrowed(part, closes) for name, part in out[key].items()}
    types = schema.get("type")
    types = types if isinstance(types, list) else [types]
    if "object" in types:
        out.setdefault("additionalProperties", False if closes and _is_whole(schema) else ANY)
    if "array" in types:
        out.setdefault("items", ANY)
    return _bound_numbers(out) if {"number", "integer"}.intersection(map(str, types)) else out


def _is_whole(schema: Mapping[str, Any]) -> bool:
    """Whether an object can do with the properties that its schema names."""
    names = schema.get("properties", {})
    enough = schema.get("minProperties", 0) <= len(names)
    return bool(names) and enough and set(schema.get("required", ())) <= set(names)


def _bound_numbers(schema: dict[str, Any]) -> dict[str, Any]:
    if "enum" in schema or "const" in schema:
        return schema
    lows, highs = (
        [v for name in names if isinstance(v := schema.get(name), (int, float)) and v is not True]
        for names in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum"))
    )
    out = dict(schema)
    if not lows and all(high > -MOST_NUMBER for high in highs):
        out["minimum"] = -MOST_NUMBER
    if not highs and all(low < MOST_NUMBER for low in lows):
        out["maximum"] = MOST_NUMBER
    low, high = max([*lows, -MOST_NUMBER]), min([*highs, MOST_NUMBER])
    # some multiple must lie between them, whether they count themselves or not
    if "number" in schema["type"] and math.floor(low / STEP) + 1 < high / STEP:
        out.setdefault("multipleOf", STEP)
    return out
