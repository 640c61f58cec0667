"""The page: one file, whose script and style are the only ones that a browser may run."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

FILE = Path(__file__).parents[1] / "page" / "index.html"


async def show_page(request: Request) -> Response:
    """The page, or that it has not changed."""
    html, headers = read_page()
    if request.headers.get("if-none-match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    return HTMLResponse(html, headers=headers)


@cache
def read_page() -> tuple[str, dict[str, str]]:
    """The file, and the headers that keep everything else out."""
    html = FILE.read_text(encoding="utf-8")
    policy = {
        "default-src": "'none'",
        "script-src": _hashes(html, "script"),
        "style-src": _hashes(html, "style"),
        "img-src": "'self' blob: data:",
        "connect-src": "'self'",
        "form-action": "'none'",
        "base-uri": "'none'",
        "frame-ancestors": "'none'",
    }
    headers = {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
        "ETag": f'"{hashlib.sha256(html.encode()).hexdigest()[:32]}"',
    }
    return html, headers


def _hashes(html: str, tag: str) -> str:
    parts = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(part.encode()).digest()) for part in parts]
    return " ".join(f"'sha256-{digest.decode()}'" for digest in digests)
