"""Bodies of requests: bounded in bytes and seconds, JSON and nothing else."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.requests import ClientDisconnect, Request

from ...errors import reason
from ...files import parse_json
from .errors import HttpError

BODY_SECONDS = 60.0
LARGE = 1_000_000  # bytes from which on a body is parsed in another thread


async def read_json(request: Request, max_bytes: int, seconds: float = BODY_SECONDS) -> Any:
    """The JSON value of a request's body.

    Raises:
        HttpError: 400, 408, 413 or 415.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # other kinds could come from any web page without asking
        raise HttpError(415, f"content-type is {kind or 'missing'}; it must be application/json")
    too_large = HttpError(413, f"the body has more than {max_bytes} bytes")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > max_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                body += part
                if len(body) > max_bytes:
                    raise too_large
    except TimeoutError:
        raise HttpError(408, f"the body did not come within {seconds:g} seconds") from None
    except ClientDisconnect:
        raise HttpError(400, "the body is not whole") from None
    return await asyncio.to_thread(parse, body) if len(body) > LARGE else parse(body)


def parse(body: bytes | bytearray) -> Any:
    """A JSON value; no number without end, no half characters."""
    try:
        value = parse_json(body.decode("utf-8"))
        if b"\\ud" in body.lower() and not _is_text(value):
            raise ValueError("a text holds half a character")
        return value
    except ValueError as error:
        why = f"the body is not valid JSON: {reason(error)}"
        raise HttpError(400, why, code="invalid_json") from None


def _is_text(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
