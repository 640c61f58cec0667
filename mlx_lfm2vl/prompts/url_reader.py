"""Reads http(s) URLs within bounds: bytes, seconds, redirects, and addresses they may reach."""

from __future__ import annotations

import http.client
import io
import ipaddress
import queue
import socket
import threading
import time
from typing import Any, Literal, cast
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from ..errors import ImageError, one_line, reason

MAX_BYTES = 20_000_000
SECONDS = 30.0
MAX_REDIRECTS = 3
REDIRECTS = (301, 302, 303, 307, 308)
OVERHEAD = 2**20  # bytes of headers and of marks between chunks
SAFE = "/%:@!$&'()*+,;=~"  # what `quote` leaves as it is, apart from letters and digits


def read_url(
    url: str,
    *,
    max_bytes: int = MAX_BYTES,
    seconds: float = SECONDS,
    addresses: Literal["public", "any"] = "any",
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
    transfer = _Transfer(max_bytes + OVERHEAD, seconds, addresses != "any")
    target = url
    try:
        for _ in range(MAX_REDIRECTS + 1):
            with transfer.request(target) as response:
                if response.status not in REDIRECTS:
                    return _body(response, max_bytes)
                location = response.getheader("location") or ""
                target = urljoin(target, location.encode("latin-1").decode("utf-8", "replace"))
        raise ValueError(f"it is redirected more than {MAX_REDIRECTS} times")
    except TimeoutError:
        raise ImageError(
            f"{one_line(url)} cannot be fetched: no answer within {seconds:g} seconds"
        ) from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ImageError(f"{one_line(url)} cannot be fetched: {reason(error)}") from None


def _body(response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    if response.status != 200:
        raise ValueError(f"the server answers {response.status} {response.reason}")
    body = bytearray()
    while len(body) <= max_bytes and (response.length or 0) <= max_bytes:
        piece = response.read(2**16)
        if not piece:
            if response.length:
                raise ValueError(f"the answer ends {response.length} bytes too early")
            return bytes(body)
        body += piece
    raise ValueError(f"it has more than {max_bytes} bytes")


class _Transfer:
    """One reading with its redirects: what is left of its bytes and its seconds."""

    def __init__(self, bytes_left: int, seconds: float, public: bool) -> None:
        self.bytes_left, self.public = bytes_left, public
        self.deadline = time.monotonic() + seconds

    def seconds_left(self) -> float:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def request(self, url: str) -> http.client.HTTPResponse:
        """Sends a GET and reads the headers of the answer."""
        parts = urlsplit(url)
        host = _host(parts)
        port = parts.port if parts.port is not None else {"http": 80, "https": 443}[parts.scheme]
        sock = self._connect(host, port)
        try:
            if parts.scheme == "https":
                import ssl

                sock.settimeout(self.seconds_left())
                sock = ssl.create_default_context().wrap_socket(sock, server_hostname=host)
            path = quote(parts.path or "/", SAFE)
            query = "?" + quote(parts.query, SAFE + "?") if parts.query else ""
            name = f"[{host.partition('%')[0]}]" if ":" in host else host
            shown = name if parts.port is None else f"{name}:{port}"
            sock.settimeout(self.seconds_left())
            sock.sendall(
                f"GET {path}{query} HTTP/1.1\r\nHost: {shown}\r\nUser-Agent: mlx-lfm2vl\r\n"
                "Accept: */*\r\nAccept-Encoding: identity\r\nConnection: close\r\n\r\n".encode()
            )
            # of a socket, a response uses only this
            response = http.client.HTTPResponse(cast(Any, _Stream(sock, self)), method="GET")
            response.begin()
            return response
        except BaseException:
            sock.close()
            raise

    def _connect(self, host: str, port: int) -> socket.socket:
        found = self._look_up(host, port)
        if self.public:
            found = [entry for entry in found if _is_public(entry[4][0])]
            if not found:
                raise ValueError(f"{host} is not a public address")
        for number, (family, kind, protocol, _, address) in enumerate(found):
            sock = socket.socket(family, kind, protocol)
            sock.settimeout(self.seconds_left() / (len(found) - number))
            try:
                sock.connect(address)
            except OSError:
                sock.close()
                if number == len(found) - 1:
                    raise
            else:
                self.public = self.public or _is_public(address[0])
                return sock
        raise ValueError(f"{host} has no address")

    def _look_up(self, host: str, port: int) -> list[Any]:
        # in a thread, since a name server that is silent can take longer than there is time
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def look_up() -> None:
            try:
                answers.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
            except (OSError, ValueError) as error:
                answers.put(error)

        threading.Thread(target=look_up, daemon=True).start()
        try:
            answer = answers.get(timeout=self.seconds_left())
        except queue.Empty:
            raise TimeoutError from None
        if isinstance(answer, Exception):
            raise answer
        return cast("list[Any]", answer)


class _Stream(io.RawIOBase):
    """A socket's bytes as a file that ends with an error where bytes or seconds are used up."""

    def __init__(self, sock: socket.socket, transfer: _Transfer) -> None:
        self.sock, self.transfer = sock, transfer

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self, 2**16)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.sock.settimeout(self.transfer.seconds_left())
        count = self.sock.recv_into(buffer)
        self.transfer.bytes_left -= count
        if self.transfer.bytes_left < 0:
            raise ValueError("the server sends far more than a picture")
        return count

    def close(self) -> None:
        self.sock.close()
        super().close()


def _host(parts: SplitResult) -> str:
    """The ASCII form of the host, if the URL is one that may be read."""
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"{parts.scheme or 'no scheme'}: it must be http or https")
    if parts.username is not None:
        raise ValueError("it holds a user name; URLs with passwords are not supported")
    host = (parts.hostname or "").encode("idna").decode()
    if not host or not host.isprintable() or " " in host:
        raise ValueError("it has no valid host name")
    return host


def _is_public(address: str) -> bool:
    """Whether an address is one of the open internet, also if it is wrapped in an IPv6 one."""
    ip: Any = ipaddress.ip_address(address.partition("%")[0])
    wrapped = (getattr(ip, "ipv4_mapped", None), getattr(ip, "sixtofour", None))
    ip = next((inner for inner in wrapped if inner is not None), ip)
    special = ip.is_multicast or ip.is_reserved or getattr(ip, "is_site_local", False)
    return ip.is_global and not special
