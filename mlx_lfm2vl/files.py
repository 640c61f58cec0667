"""Files of JSON, read with types and with errors that name file, key and value."""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from .errors import ConfigError, ModelNotFoundError

Json = Mapping[str, Any]
T = TypeVar("T")
MOST_BYTES = 64 << 20  # of a file of settings; tokenizers have some 10 MB
REQUIRED: Any = object()  # default of a value that a file must state


def regular_file(path: Path) -> Path:
    """The path of a file of a model, if it is one that can be read to its end.

    Raises:
        ModelNotFoundError: it is not there.
        ConfigError: it is a folder, a pipe or a device, too large, or out of reach.
    """
    try:
        kind = path.stat()
    except FileNotFoundError:
        raise ModelNotFoundError(
            f"{path} does not exist; a model folder needs {path.name}"
        ) from None
    except (OSError, ValueError) as error:  # a NUL in the path is a ValueError
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not stat.S_ISREG(kind.st_mode):
        raise ConfigError(f"{path} is no regular file")
    if kind.st_size > MOST_BYTES:
        raise ConfigError(f"{path} has {kind.st_size} bytes; at most {MOST_BYTES} are read")
    return path


def read_text(path: Path) -> str:
    """The text of a file of a model; errors as for `regular_file`, and if it is not UTF-8."""
    try:
        return regular_file(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        if isinstance(error, ModelNotFoundError):
            raise
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; errors as for `read_text`, and a ConfigError if it is no such."""
    text = read_text(path)
    try:
        data = parse_json(text)
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds a JSON {type(data).__name__}; it must be an object")
    return data


def parse_json(text: str) -> Any:
    """A JSON value; a ValueError for what is none, such as NaN, 1e999 or 10⁵ brackets."""
    try:
        return json.loads(text, parse_constant=_no_number, parse_float=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _finite(digits: str) -> float:
    if abs(number := float(digits)) == float("inf"):
        raise ValueError(f"{digits:.100} is too large a number")
    return number


class Reader:
    """Takes typed values out of one JSON object, with errors that name file, key and value."""

    def __init__(self, data: Json, file: str, prefix: str = "") -> None:
        self.data, self.file, self.prefix = data, file, prefix

    def section(self, key: str, model_types: tuple[str, ...]) -> Reader:
        reader = Reader(self.get(key, dict, default=REQUIRED), self.file, f"{key}.")
        reader.require("model_type", model_types, default=model_types[0])
        return reader

    def require(self, key: str, allowed: tuple[str, ...], default: str) -> None:
        value = self.get(key, str, default=default)
        self.check(value in allowed, key, value, " or ".join(allowed))

    def get(self, key: str, kind: type, *spellings: str, default: Any, bound: Any = None) -> Any:
        """A value under one of its spellings, None if it is null or absent.

        Args:
            bound: an `options.Bound` that numbers must fit.
        """
        values = {name: self.data.get(name) for name in (key, *spellings)}
        for name, value in values.items():
            fits = isinstance(value, (int, float) if kind is float else kind)
            if kind is not bool and isinstance(value, bool):
                fits = False
            if kind is float and isinstance(value, (int, float)):
                fits = fits and abs(value) < 1e308  # finite, as a float
            if value is not None and not fits:
                raise self.error(name, value, f"of type {kind.__name__}")
            if value is not None and bound is not None and not bound.fits(value):
                raise self.error(name, value, bound)
        if default is REQUIRED and all(value is None for value in values.values()):
            raise ConfigError(f"{self.file}: {self.prefix}{key} is missing")
        return self.agree(values, default)

    def agree(self, values: Mapping[str, Any], default: T) -> T:
        """The one value that several spellings state."""
        stated = {name: value for name, value in values.items() if value is not None}
        for name, value in stated.items():
            first = next(iter(stated))
            if value != stated[first]:
                raise ConfigError(
                    f"{self.file}: {self.prefix}{first} is {stated[first]} but "
                    f"{self.prefix}{name} is {value}; remove one or make them equal"
                )
        return next(iter(stated.values())) if stated else default

    def check(self, good: bool, key: str, value: Any, right: Any) -> None:
        if not good:
            raise self.error(key, value, right)

    def error(self, key: str, value: Any, right: Any) -> ConfigError:
        return ConfigError(f"{self.file}: {self.prefix}{key} is {value!r:.200}; it must be {right}")
