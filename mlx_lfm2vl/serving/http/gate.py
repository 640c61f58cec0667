"""`Gate`: who may ask at all. It looks at each request before anything else does, and logs it."""

from __future__ import annotations

import hmac
import ipaddress
import socket
import time
import traceback
from collections.abc import Callable, MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import HttpError, as_http
from .service import Service

OPEN = ("/", "/health")  # without a key
Log = Callable[[MutableMapping[str, Any]], None]


class Gate:
    """ASGI middleware: names of the host, the key, errors as JSON, one line of the log."""

    def __init__(self, app: ASGIApp, service: Service, log: Log) -> None:
        self.app, self.service, self.log = app, service, log
        names = {"localhost", socket.gethostname().lower(), *service.options.allowed_hosts}
        self.names = {*names, *(f"{name}.local" for name in names), service.options.host}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers, or has the app answer."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        entry: dict[str, Any] = {"method": scope["method"], "path": scope["path"]}
        scope["log"], started, status = entry, time.perf_counter(), 0

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Content-Type-Options"] = "nosniff"
            await send(message)

        try:
            self._check(scope)
            await self.app(scope, receive, note)
        except Exception as error:  # noqa: BLE001 - the client is told, and the log
            told = as_http(error)
            if told.status == 500:
                entry["error"] = "".join(traceback.format_exception(error))
            if status == 0:
                await error_response(told)(scope, receive, note)
        finally:
            entry |= {"status": status, "seconds": round(time.perf_counter() - started, 4)}
            labels = f'{{path="{_known(scope)}",status="{status}"}}'
            self.service.metrics.add("requests_total", labels=labels)
            self.log(entry)

    def _check(self, scope: Scope) -> None:
        """The name by which it was asked, so that no web page can be led here; and the key."""
        headers = Headers(scope=scope)
        name = host_name(headers.get("host", ""))
        if name not in self.names and not _is_address(name):
            raise HttpError(421, f"this server is not {name[:100] or 'nameless'}; "
                            "--allowed-host adds names", code="wrong_host")  # fmt: skip
        key = self.service.options.api_key
        if key is None or scope["path"] in OPEN:
            return
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.encode(), key.encode()):
            raise HttpError(401, "the API key is missing or wrong", code="invalid_api_key",
                            headers={"WWW-Authenticate": "Bearer"})  # fmt: skip


def error_response(error: HttpError) -> JSONResponse:
    """An error as a client sees it."""
    return JSONResponse(error.to_dict(), error.status, headers=error.headers)


def host_name(host: str) -> str:
    """The name in a Host header, without port and brackets."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _known(scope: Scope) -> str:
    """The path, if it is one of the server's; strangers' paths would grow the metrics."""
    return scope["path"] if "endpoint" in scope else "other"
