"""`Constraint`: what form an answer must have, made of schemas, types, patterns and grammars."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from functools import lru_cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from ..errors import PromptError

Kind = Literal["json", "regex", "choice", "lark"]
# the style of the models' own JSON; free white space lets an answer run on for ever
JSON_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
MOST_NUMBER = 10**15
STEP = 1e-6  # between numbers, so that they end
ANY = {"$ref": "#/$defs/_any"}
ONE = ("items", "additionalProperties")  # keywords that hold a schema
LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
MAPS = ("properties", "patternProperties", "$defs", "definitions")
RIGHT_SCHEMA = "a dict, JSON text, the path of a file, a dataclass, a pydantic class, or True"


@dataclass(frozen=True)
class Constraint:
    """The form of an answer.

    Attributes:
        kind: what `value` is.
        value: a JSON schema as JSON text; a regular expression for the whole answer; a tuple of
            texts, of which one is the answer; a grammar in llguidance's variant of Lark's notation.
        close: bring the answer to a whole end before `max_tokens` cuts it.
    """

    kind: Kind
    value: str | tuple[str, ...]
    close: bool = False

    @classmethod
    def of(
        cls, schema: Any = None, regex: Any = None, choice: Any = None, grammar: Any = None,
        close: bool | None = None, constraint: Any = None,
    ) -> Constraint | None:  # fmt: skip
        """What these settings ask for, checked; None if they ask for nothing.

        Raises:
            PromptError: they contradict each other or make no sense, or llguidance is missing.
        """
        given = {"schema": schema, "regex": regex, "choice": choice, "grammar": grammar}
        given = {**given, "constraint": constraint}
        given = {name: value for name, value in given.items() if value is not None}
        _check(close is None or isinstance(close, bool), "close", close, "True, False or None")
        if len(given) > 1:
            raise PromptError(f"{' and '.join(given)} exclude each other; give one of them")
        if not given:
            _check(not close, "close", close, "left out without schema, regex, choice or grammar")
            return None
        [(name, value)] = given.items()
        if name == "constraint":
            _check(isinstance(value, Constraint), name, value, "Constraint(…)")
            made = value
        elif name == "schema":
            made = cls("json", json.dumps(read_schema(value)), close is not False)
        elif name == "choice":
            texts = isinstance(value, (list, tuple)) and all(
                isinstance(v, str) and v for v in value
            )
            _check(bool(texts and value), name, value, "a list of texts, none empty")
            made = cls("choice", tuple(value), bool(close))
        else:
            _check(isinstance(value, str) and value != "", name, value, "a text, not empty")
            made = cls("regex" if name == "regex" else "lark", value, bool(close))
        compiled(made)
        return made

    def parse(self, text: str) -> Any:
        """The value that a JSON answer is; None for another kind, or if it is no whole document."""
        try:
            return json.loads(text) if self.kind == "json" else None
        except (ValueError, RecursionError):
            return None

    def result(self, text: str, closed: bool) -> dict[str, Any]:
        """What an answer's JSON object says besides its text."""
        value = {"value": self.parse(text)} if self.kind == "json" else {}
        return {"closed": closed, **value}


@lru_cache(maxsize=64)
def compiled(constraint: Constraint) -> str:
    """The grammar for llguidance.

    Raises:
        PromptError: llguidance is missing, or refuses it.
    """
    try:
        from llguidance import LLMatcher
    except ImportError:
        raise PromptError(
            "schema, regex, choice and grammar need llguidance: pip install 'mlx-lfm2vl[json]'"
        ) from None
    kind, value = constraint.kind, constraint.value
    if kind == "choice":
        value = "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in value)
    assert isinstance(value, str)

    def checked(grammar: str) -> str:
        refused, messages = LLMatcher.validate_grammar_with_warnings(grammar)
        if refused:
            raise refusal(constraint, messages[0])
        return grammar

    if kind == "regex":
        return checked(LLMatcher.grammar_from_regex(value))
    if kind != "json":
        return checked(LLMatcher.grammar_from_lark(value))
    try:
        checked(LLMatcher.grammar_from_json_schema(value, overrides=JSON_STYLE))  # as it was given
        schema = json.dumps(bounded(json.loads(value)))
        return checked(LLMatcher.grammar_from_json_schema(schema, overrides=JSON_STYLE))
    except RecursionError:
        raise PromptError("schema cannot be used: it is nested too deeply") from None
    except ValueError as error:  # of llguidance; a PromptError is one, too
        raise error if isinstance(error, PromptError) else refusal(constraint, str(error)) from None


def refusal(constraint: Constraint, message: str) -> PromptError:
    """llguidance's complaint in one line."""
    name = {"json": "schema", "lark": "grammar"}.get(constraint.kind, constraint.kind)
    parts = message.split("\nerror: ")  # regular expressions are drawn in the lines before
    lines = (
        (parts[-1].splitlines() or [message])[:1] if len(parts) > 1 else message.splitlines()[:2]
    )
    return PromptError(f"{name} cannot be used: {' '.join(' '.join(lines).split()):.300}")


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
        return {**_of_type(schema, schema.__name__, defs), "$defs": defs}
    if isinstance(schema, Mapping):
        try:
            return json.loads(json.dumps(schema))
        except (TypeError, ValueError, RecursionError) as error:
            raise PromptError(f"schema is no JSON: {error}") from None
    _check(isinstance(schema, (str, Path)), "schema", schema, RIGHT_SCHEMA)
    text = str(schema).strip()
    _check(text != "", "schema", schema, RIGHT_SCHEMA)
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
    _check(isinstance(schema, dict), name, schema, "a JSON object, or true")
    return schema


def _check(good: bool, name: str, value: Any, right: str) -> None:
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


def _of_type(kind: Any, place: str, defs: dict[str, Any]) -> dict[str, Any]:
    """The schema of a type that a field of a dataclass may have."""
    for rule in RULES:
        if kind is rule.type:
            return rule.schema
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _of_type(args[0], place, defs)
    if origin is Literal:
        return {"enum": list(args)}
    if origin in (Union, UnionType):
        return {"anyOf": [_of_type(arg, place, defs) for arg in args]}
    if origin in (list, Sequence) or (origin is tuple and args[1:] == (...,)):
        return {"type": "array", "items": _of_type(args[0], place, defs)}
    if origin is tuple:
        items = [_of_type(arg, place, defs) for arg in args]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "items": False}
    if origin in (dict, Mapping) and args[0] is str:
        return {"type": "object", "additionalProperties": _of_type(args[1], place, defs)}
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
            f.name: _of_type(hints[f.name], f"{name}.{f.name}", defs) for f in members
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
