"""The command line `python -m mlx_lfm2vl.batch`, also installed as `mlx-lfm2vl-batch`."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from ..errors import PromptError
from ..options import ImageOptions, Sampling
from ..prompts.video import FRAMES
from ..serving.folder import (
    FILMS,
    SUFFIXES,
    Counts,
    FolderEstimate,
    Lines,
    Task,
    answer_all,
    estimate_all,
    find_images,
)
from .estimates import add_dry_run, count, teach, time_of
from .options import (
    add_adapters,
    add_answer,
    add_constraint,
    add_image_options,
    add_images,
    add_model,
    add_prompt,
    add_sampling,
    constraint_from,
    model_from,
    options_from,
    path,
    whole,
)
from .terminal import Parser, make_parser, run_command, write

EPILOG = """\
examples:
  %(prog)s --images photos --prompt "Describe this photo." --output captions.jsonl
  %(prog)s --images "scans/**/*.png" a.jpg --prompt "Read it." --output text.jsonl --temp 0
  %(prog)s --images photos --prompt "Describe it." --output part1.jsonl --shard 1/2
  %(prog)s --images photos --prompt "Describe it." --output part1.jsonl --dry-run

Start the same command again to continue where it stopped. An image is known by its path and its
content: a changed file is asked about again and gets a line of its own, the old line stays. A
file that cannot be read gets a line with "error"; remove the line to have it tried again.
Several processes or machines share the work by --shard, each with an OUTPUT of its own; join the
files afterwards.
"""


def build_parser() -> Parser:
    """The arguments. Every default that a checkpoint decides is None here."""
    parser = make_parser(
        "mlx-lfm2vl-batch",
        "Ask LFM2-VL the same about many images; one JSON line per answer.",
        EPILOG,
    )
    add_model(parser)
    add_adapters(parser)
    add_images(
        parser,
        "files, patterns, or folders, searched with their subfolders for "
        f"{' '.join(SUFFIXES)}; hidden files are left out",
        dest="images",
        required=True,
    )
    add_prompt(parser, "the question about each image", required=True)
    parser.add_argument(
        "--output",
        "-o",
        type=path,
        required=True,
        metavar="FILE",
        help="file for the answers (JSON lines), made or continued",
    )
    add_answer(parser)
    parser.add_argument(
        "--batch-size",
        type=whole,
        metavar="N",
        help="answers that grow at once (default: by memory)",
    )
    parser.add_argument(
        "--shard",
        type=shard,
        default=(0, 1),
        metavar="I/N",
        help="take only every N-th image, the I-th of them first",
    )
    parser.add_argument(
        "--frames",
        type=whole,
        metavar="N",
        help=f"ask about films, too, by N frames of each: {' '.join(FILMS)}",
    )
    add_dry_run(parser)
    add_sampling(parser)
    add_image_options(parser)
    add_constraint(parser)
    return parser


def shard(text: str) -> tuple[int, int]:
    """`2/3`, the second of three, to (1, 3)."""
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text} must be I/N with I from 1 to N, as 1/2")
    return int(match[1]) - 1, int(match[2])


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and exits: 0 done, 2 bad input, 130 interrupted."""
    parser = build_parser()
    run_command(parser.prog, lambda: run(parser.parse_args(argv)))


def run(args: argparse.Namespace) -> None:
    """Does what the arguments ask for; errors are exceptions."""
    task = _task(args)
    suffixes = SUFFIXES if args.frames is None else (*SUFFIXES, *FILMS)
    images = find_images(args.images, suffixes)[args.shard[0] :: args.shard[1]]
    output = Path(args.output)
    if args.dry_run:
        with _progress(len(images)) as progress:
            found = estimate_all(
                task, images, output, batch_size=args.batch_size, progress=progress
            )
        _write_estimate(found, task.max_tokens)
        return
    started = time.perf_counter()
    with Lines(output) as lines, _progress(len(images)) as progress, _ctrl_c() as check:
        counts = answer_all(
            task,
            images,
            lines,
            batch_size=args.batch_size,
            progress=progress,
            check=check,
            loaded=teach,
        )
    _write_summary(output, counts, time.perf_counter() - started)


def _task(args: argparse.Namespace) -> Task:
    if not args.prompt.strip():
        raise PromptError("the prompt is empty; ask something")
    FRAMES.check("frames", args.frames, PromptError)
    model = model_from(args)
    constraint, tools = constraint_from(args)
    return Task(
        model=str(Path(model).resolve()) if os.path.isdir(model) else model,
        revision=args.revision,
        dtype=args.dtype,
        prompt=args.prompt,
        system=args.system,
        max_tokens=args.max_tokens,
        adapter_path=args.adapter_path,
        stop=tuple(args.stop),
        seed=args.seed,
        sampling=options_from(args, Sampling),
        image_options=options_from(args, ImageOptions),
        constraint=constraint,
        frames=args.frames,
        tools=tools,
    )


@contextmanager
def _progress(total: int) -> Iterator[Callable[[bool], None]]:
    """A bar on stderr if that is a terminal; what was done before does not count as speed."""
    from tqdm import tqdm

    quiet = not sys.stderr.isatty()
    with tqdm(total=total, unit="image", dynamic_ncols=True, file=sys.stderr, disable=quiet) as bar:

        def step(known: bool) -> None:
            if known and not quiet:
                bar.initial += 1
            bar.update()

        yield step


@contextmanager
def _ctrl_c() -> Iterator[Callable[[], None]]:
    """Makes sure that Ctrl-C ends the work.

    Its exception is lost if it comes while Python runs a finalizer, so it is kept and raised
    again when the function that this yields is called.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    came = threading.Event()
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: object) -> None:
        came.set()
        raise KeyboardInterrupt

    def check() -> None:
        if came.is_set():
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)


def _write_estimate(found: FolderEstimate, max_tokens: int) -> None:
    parts = [f"{found.images:,} to be answered"]
    if found.known:
        parts.append(f"{found.known:,} done before")
    if found.unreadable:
        parts.append(f"{found.unreadable:,} that cannot be read")
    write(
        f"images: {', '.join(parts)}\n"
        f"prompts: {count(found.prompt_tokens, 'token')}, {found.image_tokens:,} of them of images "
        f"({found.patches:,} patches)\n"
        f"answers: at most {count(found.images * max_tokens, 'token')}\n"
        f"time: {time_of(found.stages)}\n"
    )


def _write_summary(output: Path, counts: Counts, seconds: float) -> None:
    answers, speed = counts.answered, counts.answered / seconds
    parts = [f"{answers} images answered in {seconds:.1f} s ({speed:.2f} images/s)"]
    if counts.known:
        parts.append(f"{counts.known} were done before")
    if counts.unreadable:
        parts.append(f"{counts.unreadable} could not be read")
    sys.stderr.write(f"{', '.join(parts)}: {output}\n")
