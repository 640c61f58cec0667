"""The command line `python -m mlx_lfm2vl.serve`, also installed as `mlx-lfm2vl-serve`."""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import time
from collections.abc import MutableMapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import ConfigError, Lfm2VlError
from .estimates import teach
from .options import add_adapters, add_model, model_from, number, path, whole
from .terminal import Parser, make_parser, run_command, tell

if TYPE_CHECKING:
    import uvicorn

    from ..serving.http.gate import Log
    from ..serving.http.options import ServerOptions
    from ..serving.http.service import Service

NEEDED = ("starlette", "uvicorn")
KEY_VARIABLE = "MLX_LFM2VL_API_KEY"
LAST_SECONDS = 5  # in which cancelled answers may still tell their clients
EPILOG = """\
examples:
  %(prog)s --open
  %(prog)s --model demo --port 8000
  MLX_LFM2VL_API_KEY=secret %(prog)s --host 0.0.0.0 --allowed-host mac.example.com

Clients of OpenAI's API use it with base_url http://127.0.0.1:8080/v1; the page is at /.
"""


def build_parser() -> Parser:
    """The arguments; defaults that `ServerOptions` knows are told in the help texts."""
    parser = make_parser(
        "mlx-lfm2vl-serve", "Answer OpenAI's protocol and show a page to ask about images.", EPILOG
    )
    add_model(parser)
    add_adapters(parser)
    group = parser.add_argument_group("who may ask")
    for flag, help in (
        ("--host", "address to listen at (default: 127.0.0.1, this machine alone)"),
        ("--api-key", f"what clients must send (default: the variable {KEY_VARIABLE})"),
    ):
        group.add_argument(flag, metavar="TEXT", help=help)
    group.add_argument("--port", type=whole, metavar="N", help="port (default: 8080; 0: any)")
    group.add_argument(
        "--no-api-key", action="store_true", help="let everybody ask who reaches the address"
    )
    for flag, name, help in (
        ("--allowed-host", "NAME", "names by which the server may be asked, besides addresses"),
        ("--cors-origin", "URL", "web pages that may ask (default: none)"),
    ):
        group.add_argument(flag, nargs="+", action="extend", default=[], metavar=name, help=help)
    group = parser.add_argument_group("bounds")
    for flag, kind, help in (
        ("--max-batch", whole, "answers that grow at once (default: 8)"),
        ("--queue", whole, "answers that may wait; more are refused with 429 (default: 64)"),
        ("--request-timeout", number, "seconds for a request (default: 600)"),
        ("--max-tokens", whole, "of an answer, if a request does not say (default: 1024)"),
        ("--context", whole, "tokens of prompt and answer together (default: 32768)"),
        ("--max-body", size, "bytes of a request, as 64MB (default)"),
        ("--max-images", whole, "images in a request (default: 16)"),
        ("--max-pixels", size, "pixels of an image, as 100M (default)"),
        ("--cache-bytes", size, "remembered for reuse, as 1GB (default)"),
        ("--timeout-graceful", number, "seconds for answers under way at the end (default: 20)"),
    ):
        group.add_argument(flag, type=kind, metavar="X" if kind is number else "N", help=help)
    group.add_argument(
        "--image-urls", choices=("public", "any", "off"),
        help="which URLs of images are fetched (default: public addresses alone)",
    )  # fmt: skip
    group.add_argument(
        "--media-root", type=path, metavar="FOLDER", help="requests may name files in it as file://"
    )
    group = parser.add_argument_group("more")
    group.add_argument("--strict-model", action="store_true", help="refuse other models' names")
    group.add_argument("--no-page", dest="page", action="store_false", help="no page at /")
    group.add_argument("--open", action="store_true", help="open the page in a browser")
    group.add_argument("--log-json", action="store_true", help="log lines are JSON objects")
    return parser


def size(text: str) -> int:
    """The type of a flag: a number with or without K, M or G."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]?)B?", text.upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text[:40]} must look like 64MB")
    return int(float(match[1]) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}[match[2]])


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and exits: 0 stopped, 2 bad input."""
    parser = build_parser()
    run_command(parser.prog, lambda: run(parser.parse_args(argv)))


def run(args: argparse.Namespace) -> None:
    """Serves until it is told to end; errors are exceptions."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise Lfm2VlError(
            f"{' and '.join(missing)} must be installed: pip install 'mlx-lfm2vl[server]'"
        )
    from ..serving.http.service import Service

    options = _options(args)
    listening = _listen(options)
    port = listening.getsockname()[1]
    service = Service(
        model_from(args), options, dtype=args.dtype, revision=args.revision,
        adapter_path=args.adapter_path, loaded=teach,
    )  # fmt: skip
    host = f"[{options.host}]" if ":" in options.host else options.host
    url = f"http://{host}:{port}"
    tell(f"{service.name}: {url} (Ctrl-C ends)")
    if args.open and options.page:
        import webbrowser

        webbrowser.open(url)
    try:
        make_server(service, _log_json if args.log_json else _log).run(sockets=[listening])
    finally:
        service.close()
    if service.error is not None:
        raise service.error


def _options(args: argparse.Namespace) -> ServerOptions:
    from dataclasses import fields

    from ..serving.http.options import ServerOptions

    names = [f.name for f in fields(ServerOptions)]
    given = {name: getattr(args, name, None) for name in names}
    given |= {
        "api_key": args.api_key or os.environ.get(KEY_VARIABLE) or None,
        "allowed_hosts": tuple(args.allowed_host),
        "cors_origins": tuple(args.cors_origin),
        "media_root": None if args.media_root is None else Path(args.media_root),
    }
    return ServerOptions(**{name: value for name, value in given.items() if value is not None})


def _listen(options: ServerOptions) -> socket.socket:
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        return socket.create_server((options.host, options.port), family=family, backlog=2048)
    except OSError as error:
        why = error.strerror or error
        raise ConfigError(f"{options.host}:{options.port} cannot be listened at: {why}") from None


def make_server(service: Service, log: Log) -> uvicorn.Server:
    """A server that a first signal has answers end, and a second one end at once."""
    import uvicorn

    from ..serving.http.app import make_app

    class Server(uvicorn.Server):
        deadline: float | None = None

        def handle_exit(self, sig: int, frame: object) -> None:
            if self.deadline is not None:
                self.should_exit = self.force_exit = True
            else:
                service.draining = True
                self.deadline = time.monotonic() + service.options.timeout_graceful

        async def on_tick(self, counter: int) -> bool:
            if await super().on_tick(counter) or service.error is not None:
                return True
            if self.deadline is None:
                return False
            if time.monotonic() > self.deadline:
                for run in list(service.runs):
                    run.cancel("the server ends")
                return True
            return not (service.runs or service.preparing)

    config = uvicorn.Config(
        make_app(service, log), log_config=None, access_log=False, lifespan="off",
        timeout_graceful_shutdown=LAST_SECONDS, server_header=False,
    )  # fmt: skip
    return Server(config)


def _log(entry: MutableMapping[str, Any]) -> None:
    tokens = ""
    if "prompt_tokens" in entry:
        tokens = "  {prompt_tokens}+{completion_tokens} tokens".format_map(entry)
    tell("{method} {path} {status} {seconds:.3f} s".format_map(entry) + tokens)
    if "error" in entry:
        tell(entry["error"])


def _log_json(entry: MutableMapping[str, Any]) -> None:
    tell(json.dumps({"time": round(time.time(), 3), **entry}))
