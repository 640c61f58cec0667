"""`Constraint`: what form an answer must have, made of schemas, patterns, grammars and tools."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, Literal

from ..errors import PromptError
from .json_schema import JSON_STYLE, bounded, check, read_schema
from .tool_grammar import ToolChoice, chosen, parameters_of, tool_grammar

Kind = Literal["json", "regex", "choice", "lark", "tools"]
NAMES = {"json": "schema", "lark": "grammar"}  # of the settings that make them, if others


@dataclass(frozen=True)
class Constraint:
    """The form of an answer.

    Attributes:
        kind: what `value` is.
        value: a JSON schema as JSON text; a regular expression for the whole answer; a tuple of
            texts, of which one is the answer; a grammar in llguidance's variant of Lark's notation,
            for tools as `tool_grammar` makes it.
        close: bring the answer to a whole end before `max_tokens` cuts it.
    """

    kind: Kind
    value: str | tuple[str, ...]
    close: bool = False

    @classmethod
    def of(
        cls, schema: Any = None, regex: Any = None, choice: Any = None, grammar: Any = None,
        close: bool | None = None, constraint: Any = None,
        tools: Sequence[Any] | None = None, tool_choice: ToolChoice | None = None,
    ) -> Constraint | None:  # fmt: skip
        """What these settings ask for, checked; None if they ask for nothing.

        Raises:
            PromptError: they contradict each other or make no sense, or llguidance is missing.
        """
        given = {"schema": schema, "regex": regex, "choice": choice, "grammar": grammar}
        if tool_choice != "none" and constraint is None:
            given["tools"] = tools or None
        given = {**given, "constraint": constraint}
        given = {name: value for name, value in given.items() if value is not None}
        check(close is None or isinstance(close, bool), "close", close, "True, False or None")
        if len(given) > 1:
            raise PromptError(f"{' and '.join(given)} exclude each other; give one of them")
        if tool_choice is not None and not tools:
            raise PromptError(f"tool_choice {tool_choice!r:.200} needs tools")
        if "tools" in given:
            return _of_tools(given["tools"], tool_choice, bool(close))
        if not given:
            check(not close, "close", close, "left out without schema, regex, choice or grammar")
            return None
        [(name, value)] = given.items()
        made = value if name == "constraint" else _of_form(name, value, close)
        check(isinstance(made, Constraint), name, value, "Constraint(…)")
        compiled(made)
        return made

    @property
    def name(self) -> str:
        """What its setting is called."""
        return NAMES.get(self.kind, self.kind)

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


def _of_form(name: str, value: Any, close: bool | None) -> Constraint:
    if name == "schema":
        return Constraint("json", json.dumps(read_schema(value)), close is not False)
    if name == "choice":
        texts = isinstance(value, (list, tuple)) and all(isinstance(v, str) and v for v in value)
        check(bool(texts and value), name, value, "a list of texts, none empty")
        return Constraint("choice", tuple(value), bool(close))
    check(isinstance(value, str) and value != "", name, value, "a text, not empty")
    return Constraint("regex" if name == "regex" else "lark", value, bool(close))


def _of_tools(
    tools: Sequence[Any], tool_choice: ToolChoice | None, close: bool
) -> Constraint | None:
    """The grammar of calls; None if it is missing and nobody asked for more than it can be."""
    tool_choice = tool_choice if tool_choice is not None else "auto"
    _, functions = chosen(tools, tool_choice)
    if not can_constrain():
        if tool_choice == "auto":
            return None
        raise _missing(f"tool_choice {tool_choice!r:.100}")
    for name, function in functions.items():
        compiled(Constraint("json", json.dumps(parameters_of(function))), f"tool {name}")
    made = Constraint("tools", tool_grammar(tools, tool_choice), close)
    compiled(made)
    return made


def can_constrain() -> bool:
    """Whether llguidance is installed."""
    return find_spec("llguidance") is not None


def _missing(name: str) -> PromptError:
    return PromptError(f"{name} cannot be used without llguidance: pip install 'mlx-lfm2vl[json]'")


@lru_cache(maxsize=64)
def compiled(constraint: Constraint, name: str | None = None) -> str:
    """The grammar for llguidance.

    Args:
        name: what errors call it; what its setting is called by default.

    Raises:
        PromptError: llguidance is missing, or refuses it.
    """
    kind, value = constraint.kind, constraint.value
    name = name if name is not None else constraint.name
    try:
        from llguidance import LLMatcher
    except ImportError:
        raise _missing(name) from None
    if kind == "choice":
        value = "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in value)
    assert isinstance(value, str)

    def checked(grammar: str) -> str:
        refused, messages = LLMatcher.validate_grammar_with_warnings(grammar)
        if refused:
            raise refusal(name, messages[0])
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
        raise PromptError(f"{name} cannot be used: it is nested too deeply") from None
    except ValueError as error:  # of llguidance; a PromptError is one, too
        raise error if isinstance(error, PromptError) else refusal(name, str(error)) from None


def refusal(name: str, message: str) -> PromptError:
    """llguidance's complaint in one line."""
    parts = message.split("\nerror: ")  # regular expressions are drawn in the lines before
    lines = (
        (parts[-1].splitlines() or [message])[:1] if len(parts) > 1 else message.splitlines()[:2]
    )
    told = " ".join(" ".join(lines).replace("<non-verbose/>", "").split())
    return PromptError(f"{name} cannot be used: {told:.300}")
