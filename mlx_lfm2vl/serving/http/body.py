"""Bodies of requests: bounded in bytes and seconds, JSON and nothing else."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from ...errors import reason
from ...files import parse_json
from .errors import HttpError

BODY_SECONDS = 60.0
T = TypeVar("T")


async def read_body(
    request: Request, read: Callable[[Any], T], max_bytes: int, seconds: float = BODY_SECONDS
) -> T:
    """What a request asks for, made of its body's JSON value in another thread.

    Raises:
        HttpError: 400, 408, 413, 415, or what `read` raises.
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
    return await asyncio.to_thread(lambda: read(parse(body)))


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
