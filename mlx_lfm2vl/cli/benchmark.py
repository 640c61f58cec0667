"""The command line `python -m mlx_lfm2vl.benchmark`, also installed as `mlx-lfm2vl-benchmark`."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ..errors import OutputError
from ..measuring import DEFAULT_ROUNDS, DEFAULT_ROWS, DEFAULT_TOKENS
from ..options import ImageOptions
from .estimates import learn
from .options import (
    add_adapters,
    add_image_options,
    add_images,
    add_model,
    model_from,
    options_from,
    path,
    positive,
)
from .terminal import Parser, make_parser, run_command, tell, write

if TYPE_CHECKING:
    from ..measuring.stages import BenchmarkResult, ImageCosts, KnobCosts, Size

EPILOG = """\
examples:
  %(prog)s --model LiquidAI/LFM2.5-VL-450M
  %(prog)s --model lfm2-4bit --image photo.jpg --rounds 5 --output speed.json
  %(prog)s --model lfm2-4bit --size 640x480 1600x1200 4000x3000
  %(prog)s --size 2000x1500 --patches-per-group 1024 4096 --prefill-step 1024 2048
"""


def as_json(result: BenchmarkResult) -> str:
    """All numbers, in seconds and bytes."""
    return json.dumps(asdict(result), indent=2, ensure_ascii=False)


def as_table(result: BenchmarkResult) -> str:
    """Machine, model, and Markdown with one column per image."""
    machine = result.machine
    head = [
        f"mlx_lfm2vl {machine.mlx_lfm2vl}, mlx {machine.mlx}, Python {machine.python}",
        f"{machine.system}: {machine.device_name}, {machine.cores} cores, "
        f"{machine.memory_bytes / 2**30:.0f} GiB; computing on {machine.device}",
        f"{result.model}: {result.dtype}, {_gigabytes(result.weight_bytes)} of weights",
        f"median of {result.rounds} rounds after one that does not count",
        "",
    ]
    whole = [
        ["load", _duration(result.load_s)],
        [f"batch of {result.batch_rows}", f"{result.batch_tps:.1f} tok/s"],
        ["memory bandwidth", f"{result.bandwidth / 1e9:.1f} GB/s"],
    ]
    rows = [["", *(costs.name for costs in result.images)]]
    for title, show in IMAGE_ROWS:
        rows.append([title, *(show(costs) for costs in result.images)])
    blank = [""] * (len(rows[0]) - 2)
    table = _markdown(rows + [[*row, *blank] for row in whole])
    return "\n".join([*head, *table, *map(_knob, result.knobs)])


def _knob(costs: KnobCosts) -> str:
    """A line such as `prefill step, 640x480: 512 in 9.1 ms, 1024 in 8.0 ms; best here is 1024`."""
    times = ", ".join(f"{value} in {_duration(time)}" for value, time in costs.seconds.items())
    return f"{costs.name}, {costs.image}: {times}; best here is {costs.best}"


def _duration(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.1f} ms"


def _gigabytes(value: float) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e8 else f"{value / 1e6:.2f} MB"


IMAGE_ROWS: tuple[tuple[str, Callable[[ImageCosts], str]], ...] = (
    ("views, image tokens", lambda costs: f"{costs.views}, {costs.image_tokens}"),
    ("preprocess", lambda costs: _duration(costs.preprocess_s)),
    ("vision", lambda costs: _duration(costs.vision_s)),
    ("prefill", lambda costs: _duration(costs.prefill_s)),
    ("prefill speed", lambda costs: f"{costs.prompt_tokens / costs.prefill_s:.0f} tok/s"),
    ("first question, first token", lambda costs: _duration(costs.first_question_s)),
    ("second question, first token", lambda costs: _duration(costs.second_question_s)),
    ("decode", lambda costs: f"{costs.decode_tps:.1f} tok/s"),
    ("read per token", lambda costs: _gigabytes(costs.bytes_per_token)),
    ("of the memory bandwidth", lambda costs: f"{100 * costs.bandwidth_share:.0f} %"),
    ("peak memory", lambda costs: _gigabytes(costs.peak_memory_bytes)),
)


def _markdown(rows: list[list[str]]) -> list[str]:
    """Lines of a table whose columns are as wide as they must be."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return [
        "| " + " | ".join(f"{cell:{'<' if n == 0 else '>'}{widths[n]}}"
                          for n, cell in enumerate(row)) + " |"
        for row in (rows[0], rule, *rows[1:])
    ]  # fmt: skip


def build_parser() -> Parser:
    """The arguments."""
    parser = make_parser(
        "mlx-lfm2vl-benchmark",
        "Measure LFM2-VL on this machine, stage by stage.",
        EPILOG,
        "%(prog)s [--image IMAGE …] [flags]",
    )
    add_model(parser)
    add_adapters(parser)
    add_images(parser, "paths or URLs of images to ask about")
    parser.add_argument(
        "--size",
        nargs="+",
        action="extend",
        default=[],
        type=size,
        metavar="WIDTHxHEIGHT",
        help="images to make for this (default: 640x480 without --image)",
    )
    for flags, default, meaning in (
        (["--rounds"], DEFAULT_ROUNDS, "measurements that count, after one that does not"),
        (["--max-tokens", "-m"], DEFAULT_TOKENS, "length of each answer in tokens"),
        (["--batch-size"], DEFAULT_ROWS, "answers that decode together"),
    ):
        parser.add_argument(
            *flags,
            type=positive,
            default=default,
            metavar="N",
            help=f"{meaning} (default: {default})",
        )
    for flag, meaning in (
        ("--patches-per-group", "patches that go through the vision tower at once"),
        ("--prefill-step", "positions of a prompt that are read at once"),
    ):
        parser.add_argument(
            flag,
            nargs="+",
            action="extend",
            default=[],
            type=positive,
            metavar="N",
            help=f"{meaning}: values to try, and to tell which is best here",
        )
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        type=path,
        metavar="FILE",
        help="print JSON instead of the table; with a FILE the same as --output FILE",
    )
    parser.add_argument(
        "--output", "-o", type=path, metavar="FILE", help="write JSON to FILE besides the table"
    )
    add_image_options(parser)
    return parser


def size(text: str) -> Size:
    """`640x480` to (640, 480)."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text} must be WIDTHxHEIGHT in pixels, as 640x480")
    return int(match[1]), int(match[2])


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and exits: 0 done, 2 bad input, 130 interrupted."""
    parser = build_parser()
    run_command(parser.prog, lambda: run(parser.parse_args(argv)))


def run(args: argparse.Namespace) -> None:
    """Does what the arguments ask for; errors are exceptions."""
    from ..measuring.stages import benchmark

    alone = args.json == "-"
    output = args.output if args.json is None or alone else args.json
    file = None if output is None else _writable(Path(output))
    result = benchmark(
        model_from(args),
        args.image,
        args.size,
        dtype=args.dtype,
        revision=args.revision,
        adapter_path=args.adapter_path,
        image_options=options_from(args, ImageOptions),
        rounds=args.rounds,
        max_tokens=args.max_tokens,
        rows=args.batch_size,
        patches_per_group=args.patches_per_group,
        prefill_steps=args.prefill_step,
        progress=_tell if sys.stderr.isatty() else None,
        learn=learn,
    )
    write((as_json(result) if alone else as_table(result)) + "\n")
    if file is not None:
        _write_file(file, as_json(result) + "\n")


def _writable(file: Path) -> Path:
    """A file that can be made or replaced, as far as that shows before the work."""
    if file.is_dir() or not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
        raise OutputError(f"{file} cannot be written; it must be a file in a folder that exists")
    return file.resolve()


def _write_file(file: Path, content: str) -> None:
    """Writes beside the place and renames, so that the file is whole or as it was."""
    is_device = file.exists() and not file.is_file()
    new = file if is_device else file.with_name(f".{file.name}.new")
    try:
        new.write_text(content, encoding="utf-8")
        os.replace(new, file)
    except OSError as error:
        raise OutputError(f"{file} cannot be written: {error.strerror}") from None
    finally:
        if new != file:
            new.unlink(missing_ok=True)


def _tell(stage: str) -> None:
    tell(f"measuring {stage}")
