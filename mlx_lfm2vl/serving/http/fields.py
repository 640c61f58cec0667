"""Reads JSON objects so that nothing in them is ignored: what nobody asked for is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, cast

from .errors import HttpError, refused

T = TypeVar("T")
NAMES: Mapping[type, str] = {
    str: "a text", bool: "true or false", int: "a whole number", float: "a number",
    list: "a list", dict: "an object",
}  # fmt: skip


class Fields:
    """The members of a JSON object; null is as good as absent.

    Args:
        values: the object.
        path: its place in the request, for messages.
    """

    def __init__(self, values: Any, path: str = "") -> None:
        if not isinstance(values, dict):
            raise refused(path or "the body", "must be an object", values)
        self.values = cast("dict[str, Any]", values)
        self.path = path
        self.left = {name for name, value in values.items() if value is not None}

    def name(self, name: str) -> str:
        """A member's place in the request."""
        return f"{self.path}.{name}" if self.path else name

    def get(self, name: str, *kinds: type, default: Any = None) -> Any:
        """A member of one of these kinds."""
        self.left.discard(name)
        value = self.values.get(name)
        if value is None:
            return default
        is_bool = isinstance(value, bool)
        allowed = (*kinds, int) if float in kinds else kinds
        if not (isinstance(value, allowed) and (not is_bool or bool in kinds)):
            right = " or ".join(NAMES[kind] for kind in kinds)
            raise refused(self.name(name), f"must be {right}", value)
        return value

    def need(self, name: str, *kinds: type) -> Any:
        """A member that must be there."""
        value = self.get(name, *kinds)
        if value is None:
            raise HttpError(
                400, f"{self.name(name)} is missing", self.name(name), "missing_required_parameter"
            )
        return value

    def only(self, **allowed: tuple[Any, ...]) -> None:
        """Members that may be there with these values alone."""
        for name, values in allowed.items():
            self.left.discard(name)
            value = self.values.get(name)
            if value is not None and not any(value is v or value == v for v in values):
                right = " or ".join(map(repr, values)) or "left out"
                raise HttpError(
                    400, f"{self.name(name)} is not supported: it must be {right}",
                    self.name(name), "unsupported_parameter",
                )  # fmt: skip

    def end(self) -> None:
        """Refuses what has not been read."""
        for name in sorted(self.left):
            raise HttpError(
                400, f"{self.name(name)!r:.200} is not supported",
                self.name(name)[:200], "unsupported_parameter",
            )  # fmt: skip
