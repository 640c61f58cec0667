"""Files of JSON, read with types and with errors that name file, key and value."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from .errors import ConfigError, ModelNotFoundError

Json = Mapping[str, Any]
T = TypeVar("T")
REQUIRED: Any = object()  # default of a value that a file must state


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object, with an error that names the file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelNotFoundError(
            f"{path} does not exist; a model folder needs {path.name}"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # numbers of 5000 digits, 10⁵ brackets
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds a JSON {type(data).__name__}; it must be an object")
    return data


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

    def get(self, key: str, kind: type, *spellings: str, default: Any) -> Any:
        values = {name: self.data.get(name) for name in (key, *spellings)}
        for name, value in values.items():
            fits = isinstance(value, (int, float) if kind is float else kind)
            if kind is not bool and isinstance(value, bool):
                fits = False
            if value is not None and not fits:
                raise self.error(name, value, f"of type {kind.__name__}")
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
        return ConfigError(f"{self.file}: {self.prefix}{key} is {value!r}; it must be {right}")
