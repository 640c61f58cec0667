"""The command line `python -m mlx_lfm2vl.batch`, also installed as `mlx-lfm2vl-batch`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import NoReturn

from ..errors import PromptError
from ..options import DEFAULT_MAX_TOKENS, ImageOptions, Sampling
from ..serving.folder import (
    SUFFIXES,
    Lines,
    Task,
    _answer_share,
    _part,
    _together,
    find_images,
    gather_parts,
)
from .options import add_image_options, add_model, add_sampling, options_from, positive
from .terminal import Parser, make_parser, run_command

EPILOG = """\
examples:
  %(prog)s --images photos --prompt "Describe this photo." --output captions.jsonl
  %(prog)s --images "scans/**/*.png" a.jpg --prompt "Read it." --output text.jsonl --temp 0
  mlx.launch -n 2 -- %(prog)s --images photos --prompt "Describe it." --output captions.jsonl

Start the same command again to go on where it stopped. An image is known by its path and its
content: a changed file is asked about again and gets a line of its own, the old line stays. A
file that cannot be read gets a line with "error"; remove the line to have it tried again.
Several processes or machines share one OUTPUT, on a disk that all of them see.
"""


def build_parser() -> Parser:
    """The arguments. Every default that a checkpoint decides is None here."""
    parser = make_parser(
        "mlx-lfm2vl-batch",
        "Ask LFM2-VL the same about many images; one JSON line per answer.",
        EPILOG,
    )
    add_model(parser)
    parser.add_argument(
        "--images",
        "--image",
        dest="images",
        nargs="+",
        action="extend",
        required=True,
        metavar="IMAGES",
        help="files, patterns, or folders, searched with their subfolders for "
        f"{' '.join(SUFFIXES)}; hidden files are left out",
    )
    parser.add_argument("--prompt", "-p", required=True, help="the question about each image")
    parser.add_argument("--system", "--system-prompt", help="system message")
    parser.add_argument(
        "--output", "-o", required=True, help="file for the answers (JSON lines), made or gone on"
    )
    parser.add_argument(
        "--max-tokens",
        "-m",
        type=positive,
        default=DEFAULT_MAX_TOKENS,
        help="longest answer in tokens (default: %(default)s)",
    )
    add_sampling(parser)
    add_image_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and exits: 0 done, 2 bad input, 130 interrupted."""
    parser = build_parser()
    run_command(parser.prog, lambda: run(parser.parse_args(argv)))


def run(args: argparse.Namespace) -> None:
    """Does what the arguments ask for; errors are exceptions."""
    task = _task(args)
    images = find_images(args.images)
    output = Path(args.output).expanduser()
    started = time.perf_counter()

    import mlx.core as mx

    group = mx.distributed.init(strict=False)
    if group.rank() > 0:
        _together(group)  # before that the first process gathers what an earlier run has left
        with Lines(_part(output, group.rank())) as part:
            counts = _answer_share(group, task, images, output, part)
        _together(group, *counts)
        return
    with Lines(output) as lines:
        gather_parts(lines, task.settings)
        _together(group)
        counts = _answer_share(group, task, images, output, lines)
        totals = _together(group, *counts)
        gather_parts(lines, task.settings)
    _write_summary(output, totals, time.perf_counter() - started)


def _task(args: argparse.Namespace) -> Task:
    if not args.prompt.strip():
        raise PromptError("the prompt is empty; ask something")
    stated = {f.name: getattr(args, f.name) for f in fields(Sampling)}
    Sampling().override(**stated)  # a wrong value is told before the model is loaded
    return Task(
        model=str(Path(args.model).resolve()) if os.path.isdir(args.model) else args.model,
        revision=args.revision,
        dtype=args.dtype,
        prompt=args.prompt,
        system=args.system,
        max_tokens=args.max_tokens,
        seed=args.seed,
        sampling=stated,
        image_options=options_from(args, ImageOptions),
    )


def _write_summary(output: Path, counts: Sequence[int], seconds: float) -> None:
    answers, errors, known = counts
    parts = [f"{answers} images answered in {seconds:.1f} s ({answers / seconds:.2f} images/s)"]
    if known:
        parts.append(f"{known} were done before")
    if errors:
        parts.append(f"{errors} could not be read")
    sys.stderr.write(f"{', '.join(parts)}: {output}\n")
