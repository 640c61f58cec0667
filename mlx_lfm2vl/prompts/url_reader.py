"""Reads http(s) URLs within bounds: bytes, seconds, redirects, and addresses they may reach."""

from __future__ import annotations

import http.client
import io
import ipaddress
import socket
import ssl
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

from ..errors import ImageError, one_line, reason

MAX_BYTES = 20_000_000
SECONDS = 30.0
MAX_REDIRECTS = 3
REDIRECTS = (301, 302, 303, 307, 308)
PORTS = {"http": 80, "https": 443}
OVERHEAD = 2**20  # bytes of headers and of marks between chunks
SAFE = "/%:@!$&'()*+,;=~?"  # what `quote` leaves as it is, apart from letters and digits


def read_url(
    url: str, *, max_bytes: int = MAX_BYTES, seconds: float = SECONDS, addresses: str = "any"
) -> bytes:
    """The body of an http(s) URL, read directly: no proxy, no cookies, no password.

    Args:
        max_bytes: of the body.
        seconds: for everything together, name lookup and redirects included.
        addresses: "public" reaches no private, local or reserved address, for servers that read
            strangers' URLs. "any" reaches all, but no redirect leads from a public address to
            another kind. Each name is looked up once, and the address that was checked is the
            one that is connected to.

    Raises:
        ImageError: in one line that names the URL, whatever the server does.
    """
    target, public, deadline = url, addresses != "any", time.monotonic() + seconds
    try:
        for _ in range(MAX_REDIRECTS + 1):
            with _connect(target, public, deadline) as sock, ExitStack() as opened:
                public = public or _is_public(sock.getpeername()[0])
                response = _get(target, _Stream(sock, deadline, max_bytes + OVERHEAD))
                opened.callback(response.close)
                response.begin()
                if response.status not in REDIRECTS:
                    return _body(response, max_bytes)
            location = (response.getheader("location") or "").encode("latin-1")
            target = urljoin(target, location.decode("utf-8", "replace"))
        raise ValueError(f"it is redirected more than {MAX_REDIRECTS} times")
    except (OSError, ValueError, http.client.HTTPException) as error:
        late = isinstance(error, TimeoutError)
        why = f"no answer within {seconds:g} seconds" if late else reason(error)
        raise ImageError(f"{one_line(url)} cannot be fetched: {why}") from None


def _body(response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    if response.status != 200:
        raise ValueError(f"the server answers {response.status} {response.reason}")
    body = response.read(max_bytes + 1)
    if len(body) > max_bytes:
        raise ValueError(f"it has more than {max_bytes} bytes")
    if response.length:
        raise ValueError(f"the answer ends {response.length} bytes too early")
    return body


class _Stream(io.RawIOBase):
    """A socket's bytes as a file, with an error if bytes or seconds are used up."""

    def __init__(self, sock: socket.socket, deadline: float, bytes_left: int) -> None:
        self.sock, self.deadline, self.bytes_left = sock, deadline, bytes_left

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self, 2**16)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.sock.settimeout(_seconds_until(self.deadline))
        count = self.sock.recv_into(buffer)
        self.bytes_left -= count
        if self.bytes_left < 0:
            raise ValueError("the server sends far more than a picture")
        return count


def _seconds_until(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _get(url: str, stream: _Stream) -> http.client.HTTPResponse:
    """Asks; the answer is still to be read."""
    parts = urlsplit(url)
    path = quote(parts.path or "/", SAFE) + (f"?{quote(parts.query, SAFE)}" if parts.query else "")
    stream.sock.settimeout(_seconds_until(stream.deadline))
    stream.sock.sendall(
        f"GET {path} HTTP/1.1\r\nHost: {parts.netloc.encode('idna').decode()}\r\n"
        "User-Agent: mlx-lfm2vl\r\nAccept: */*\r\nAccept-Encoding: identity\r\n"
        "Connection: close\r\n\r\n".encode()
    )
    source: Any = stream  # of a socket, a response uses only `makefile`
    return http.client.HTTPResponse(source, method="GET")


def _connect(url: str, public: bool, deadline: float) -> socket.socket:
    parts = urlsplit(url)
    host = (parts.hostname or "").encode("idna").decode()
    if parts.scheme not in PORTS or parts.username is not None:
        raise ValueError("it must begin with http:// or https://, without a user name")
    if not host or not host.isprintable() or " " in host:
        raise ValueError("it has no valid host name")
    found = _look_up(host, parts.port if parts.port is not None else PORTS[parts.scheme], deadline)
    allowed = [address for address in found if not public or _is_public(address[0])]
    error: Exception = ValueError(f"{host} is not a public address")
    for number, address in enumerate(allowed):
        try:
            seconds = _seconds_until(deadline) / (len(allowed) - number)
            sock = socket.create_connection(address, seconds)
            if parts.scheme == "http":
                return sock
            sock.settimeout(max(1e-3, deadline - time.monotonic()))
            return ssl.create_default_context().wrap_socket(sock, server_hostname=host)
        except OSError as failure:
            error = failure
    raise error


def _look_up(host: str, port: int, deadline: float) -> list[Any]:
    # in a thread, since a silent name server can take longer than there is time
    pool = ThreadPoolExecutor(1, thread_name_prefix="look-up")
    pending = pool.submit(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    pool.shutdown(wait=False)
    return [address[:2] for *_, address in pending.result(_seconds_until(deadline))]


def _is_public(address: str) -> bool:
    """Whether an address is one of the open internet, also if it is wrapped in an IPv6 one."""
    ip: Any = ipaddress.ip_address(address.partition("%")[0])
    wrapped = (getattr(ip, "ipv4_mapped", None), getattr(ip, "sixtofour", None))
    ip = next((inner for inner in wrapped if inner is not None), ip)
    special = ip.is_multicast or ip.is_reserved or getattr(ip, "is_site_local", False)
    return ip.is_global and not special
