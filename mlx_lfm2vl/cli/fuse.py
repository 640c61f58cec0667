"""The command line `python -m mlx_lfm2vl.fuse`, also installed as `mlx-lfm2vl-fuse`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from .convert import progress_bar
from .terminal import Parser, make_parser, run_command


def build_parser() -> Parser:
    """The arguments, named as in mlx-lm's `fuse`."""
    parser = make_parser("mlx-lfm2vl-fuse", "Work adapters into the weights of their model.")
    parser.add_argument(
        "--model", help="folder, Hugging Face repository, or demo (default: what the adapters name)"
    )
    parser.add_argument("--revision", help="branch, tag or commit of the repository")
    parser.add_argument("--adapter-path", default="adapters", help="default: %(default)s")
    parser.add_argument(
        "--save-path", default="fused_model", help="folder to write (default: %(default)s)"
    )
    parser.add_argument("--dtype", help="float16, bfloat16 or float32 (default: the model's)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--dequantize",
        action="store_const",
        const=True,
        help="make floating point of integers; a quantized model needs no flag for that",
    )
    form.add_argument(
        "--quantized",
        dest="dequantize",
        action="store_const",
        const=False,
        help="keep a quantized model quantized, and tell what rounding takes of the adapters",
    )
    parser.add_argument("--to-hf", action="store_true", help="write the layout of transformers")
    parser.add_argument("--force", action="store_true", help="replace a model folder that is there")
    return parser


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and exits: 0 done, 2 bad input, 130 interrupted."""
    parser = build_parser()
    run_command(parser.prog, lambda: _run(parser.parse_args(argv)))


def _run(args: argparse.Namespace) -> None:
    from ..conversion.fuse import fuse

    with progress_bar() as progress:
        target = fuse(
            args.model,
            args.adapter_path,
            args.save_path,
            dtype=args.dtype,
            dequantize=args.dequantize,
            to_hf=args.to_hf,
            revision=args.revision,
            force=args.force,
            progress=progress,
            tell=lambda text: sys.stdout.write(f"{text}\n"),
        )
    sys.stdout.write(f"wrote {target}\n")
