"""What a server may be told: addresses, bounds, who may ask."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from ...errors import ConfigError
from ...generation.batch import BATCH_SIZE
from ...options import MAX_TOKENS, MOST, Bound
from ..prefixes import PREFIX_BYTES

IMAGE_URLS = ("public", "any", "off")
BOUNDS = {
    "port": Bound(int, 0, 65535),
    "max_batch": BATCH_SIZE,
    "queue": Bound(int, 0, 100_000),
    "request_timeout": Bound(float, 0.1, 1e6),
    "max_tokens": MAX_TOKENS,
    "context": Bound(int, 16, MOST),
    "max_body": Bound(int, 1024, 1 << 34),
    "max_images": Bound(int, 0, 1000),
    "max_pixels": Bound(int, 1, 1 << 34),
    "cache_bytes": PREFIX_BYTES,
    "timeout_graceful": Bound(float, 0, 1e5),
}


@dataclass(frozen=True)
class ServerOptions:
    """Settings of a server, checked.

    Attributes:
        host, port: where it listens.
        api_key: what clients must send; None lets everybody ask.
        no_api_key: allows `api_key` to be None on an address that others can reach.
        allowed_hosts: names under which it may be asked, besides addresses and this machine's name.
        cors_origins: pages of other origins that may ask.
        max_batch: answers that grow at once.
        queue: answers that may wait; more get 429.
        request_timeout: seconds for one request.
        max_tokens: of an answer, if a request does not say.
        context: tokens of prompt and answer together.
        max_body: bytes of a request.
        max_images: in a request.
        max_pixels: of an image.
        image_urls: "public", "any" or "off": which URLs of images are fetched.
        media_root: folder whose files requests may name; None for no file at all.
        cache_bytes: what may be remembered for reuse.
        page: whether there is a page at /.
        strict_model: refuse requests for other models than the one that is served.
        timeout_graceful: seconds that answers under way have when the server is to end.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    no_api_key: bool = False
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_batch: int = 8
    queue: int = 64
    request_timeout: float = 600.0
    max_tokens: int = 1024
    context: int = 32768
    max_body: int = 64_000_000
    max_images: int = 16
    max_pixels: int = 100_000_000
    image_urls: str = "public"
    media_root: Path | None = None
    cache_bytes: int = 1_000_000_000
    page: bool = True
    strict_model: bool = False
    timeout_graceful: float = 20.0

    def __post_init__(self) -> None:
        """Checks everything; a ConfigError names what is wrong."""
        for name, bound in BOUNDS.items():
            bound.check(f"--{name.replace('_', '-')}", getattr(self, name))
        key = self.api_key
        if key is not None and not (key and key.isascii() and key.isprintable()):
            raise ConfigError("--api-key must be one word or more of plain characters")
        if key is None and not self.no_api_key and not is_loopback(self.host):
            raise ConfigError(
                f"--host {self.host} can be reached by others; give them an --api-key, or let "
                "everybody ask with --no-api-key"
            )
        if self.image_urls not in IMAGE_URLS:
            raise ConfigError(f"--image-urls is {self.image_urls}; it must be one of {IMAGE_URLS}")
        if self.media_root is not None and not self.media_root.is_dir():
            raise ConfigError(f"--media-root {self.media_root} is no folder")
        for origin in self.cors_origins:
            if origin != "*" and not origin.startswith(("http://", "https://")):
                raise ConfigError(f"--cors-origin {origin} must look like https://example.com")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
