"""`python -m mlx_lfm2vl`: all commands under one name, also installed as `mlx-lfm2vl`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from .terminal import Parser, make_parser, run_command

COMMANDS = {
    "generate": "answer a question about images, or talk with --chat",
    "detect": "find things in images: boxes with scores, drawn or as JSON",
    "batch": "ask the same about a folder of images",
    "watch": "ask about a camera, screen or film whenever its picture changes",
    "serve": "OpenAI's protocol over HTTP, and a page to ask about images",
    "convert": "convert and quantize a checkpoint, or compare conversions",
    "train": "fine-tune on conversations about images",
    "fuse": "work trained adapters into the weights",
    "benchmark": "measure each stage on this machine",
    "doctor": "check that this machine computes what it should",
}


def build_parser() -> Parser:
    """The arguments before the name of a command is known."""
    lines = [f"  {name:<11}{meaning}" for name, meaning in COMMANDS.items()]
    parser = make_parser(
        "mlx-lfm2vl",
        "LFM2-VL on Apple silicon: ask about images, convert, fine-tune, measure.",
        "\n".join(("commands (mlx-lfm2vl COMMAND --help lists the flags of one):", *lines)),
    )
    parser.add_argument(
        "command", nargs="?", choices=COMMANDS, metavar="COMMAND", help="what to do; see below"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a command, or lists them all."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given and given[0] in COMMANDS:
        import_module(f".{given[0]}", __package__).main(given[1:])
    parser = build_parser()

    def show() -> None:
        parser.parse_args(given)
        parser.print_help()

    run_command(parser.prog, show)
