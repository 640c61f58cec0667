"""The command line `python -m mlx_lfm2vl.fuse`, also installed as `mlx-lfm2vl-fuse`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from ..conversion.fuse import fuse
from .options import add_model
from .terminal import run_command


def build_parser() -> argparse.ArgumentParser:
    """The arguments, named as in mlx-lm's `fuse`."""
    parser = argparse.ArgumentParser(
        prog="mlx-lfm2vl-fuse", description="Work adapters into the weights of their model."
    )
    add_model(parser)
    parser.add_argument("--adapter-path", default="adapters", help="default: %(default)s")
    parser.add_argument(
        "--save-path", default="fused_model", help="folder to write (default: %(default)s)"
    )
    parser.add_argument("--dequantize", action="store_true", help="make floating point of integers")
    parser.add_argument("--to-hf", action="store_true", help="write the layout of transformers")
    parser.add_argument("--force", action="store_true", help="replace a folder that is there")
    return parser


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and exits: 0 done, 2 bad input, 130 interrupted."""
    parser = build_parser()
    args = parser.parse_args(argv)
    run_command(parser.prog, lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    target = fuse(
        args.model,
        args.adapter_path,
        args.save_path,
        dtype=args.dtype,
        dequantize=args.dequantize,
        to_hf=args.to_hf,
        revision=args.revision,
        force=args.force,
    )
    sys.stdout.write(f"wrote {target}\n")
