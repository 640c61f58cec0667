"""Errors as OpenAI's clients know them: a status, and a body that names what was wrong."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from ...errors import ConfigError, ImageError, Lfm2VlError, PromptError
from ..pending import AnswerCancelled

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class HttpError(Lfm2VlError):
    """A request that gets no answer.

    Attributes:
        status: of HTTP.
        param: what in the request was wrong.
        code: a word for programs.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})

    def to_dict(self) -> dict[str, Any]:
        """The body."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = TYPES.get(self.status, kind)
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def short(value: Any) -> str:
    """A value for a message: neither long nor deep."""
    return reprlib.repr(value)[:120]


def refused(param: str, right: str, value: Any = None) -> HttpError:
    """A parameter that is not what it must be."""
    given = "" if value is None else f" is {short(value)};"
    return HttpError(400, f"{param}{given} {right}", param, "invalid_value")


def as_http(error: BaseException, param: str | None = None) -> HttpError:
    """What a client is told of an error."""
    if isinstance(error, HttpError):
        return error
    if isinstance(error, AnswerCancelled):
        return HttpError(503, str(error), code="cancelled", headers={"Retry-After": "5"})
    if isinstance(error, TimeoutError):
        # not to be tried again: the same question would take as long
        return HttpError(504, str(error), code="timeout", headers={"x-should-retry": "false"})
    if isinstance(error, (PromptError, ImageError, ConfigError)):
        return HttpError(400, str(error), param, "invalid_value")
    return HttpError(500, "the server failed; its log tells why", code="internal_error")
