"""The command line `python -m mlx_lfm2vl.watch`, also installed as `mlx-lfm2vl-watch`."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import OutputError, PromptError
from ..options import DEFAULT_MAX_TOKENS, ImageOptions, Sampling
from .estimates import add_dry_run, write_estimate
from .options import (
    add_adapters,
    add_answer,
    add_constraint,
    add_image_options,
    add_model,
    add_sampling,
    constraint_from,
    model_from,
    options_from,
    path,
    text,
    whole,
)
from .terminal import (
    INTERRUPTED,
    Parser,
    interruptible,
    make_parser,
    message_of,
    one_line,
    run_command,
    tell,
    write,
)

if TYPE_CHECKING:
    from ..serving.frames import Source
    from ..serving.watch import Recorded, Sighting, Watch

COMMAND_SECONDS = 10  # that --exec may take
QUALITY = 92  # of JPEG files
# what decides neither the answers nor what is asked
OUTPUTS = ("jsonl", "save", "exec", "on_change", "until", "realtime", "show", "dry_run")
EPILOG = """\
examples:
  %(prog)s --source camera --ask "What is on the table?"
  %(prog)s --source screen --ask "Which program is open?" --every 10s --jsonl day.jsonl
  %(prog)s --source street.mp4 --detect person car --save seen --jsonl street.jsonl
  %(prog)s --source camera --ask "Is it raining?" --choice yes no --on-change --exec "say rain"

A question is asked when enough of the picture has changed and it has come to rest. --exec runs a
program without a shell; it finds the answer in the variables MLX_LFM2VL_ANSWER, _FRAME, _SECONDS
and _IMAGE, and as one JSON object on its standard input. The same command with the same --jsonl
continues a film or folder where it stopped. Needs the extra video.
"""


def build_parser() -> Parser:
    """The arguments. Every default that a checkpoint decides is None here."""
    parser = make_parser(
        "mlx-lfm2vl-watch",
        "Watch a camera, screen, film or folder with LFM2-VL: ask whenever the picture changes.",
        EPILOG,
    )
    parser.add_argument(
        "--source",
        required=True,
        metavar="SOURCE",
        help="camera[:N], screen[:N][@x,y,w,h], a film, a folder, rtsp://…, http(s)://… or "
        "lavfi:GRAPH; N counts from 0",
    )
    for flags, name, help in (
        (("--ask", "--prompt", "-p"), "prompt", "the question about each picture"),
        (("--system", "--system-prompt"), "system", "system message"),
    ):
        parser.add_argument(*flags, dest=name, type=text, metavar="TEXT", help=help)
    parser.add_argument(
        "--detect",
        nargs="+",
        action="extend",
        type=text,
        metavar="TEXT",
        help="instead of a question: what to find; boxes in pixels",
    )
    add_model(parser)
    add_adapters(parser)
    _add_when(parser)
    _add_outputs(parser)
    add_answer(parser)
    add_constraint(parser)
    add_image_options(parser)
    add_sampling(parser)
    add_dry_run(parser)
    return parser


def _add_when(parser: Parser) -> None:
    group = parser.add_argument_group("when to ask")
    group.add_argument(
        "--changed", type=share, metavar="X",
        help="share of the picture that must differ from the one asked about before, as 0.2%% "
        "(default); 0 asks about every frame, as is the default in a folder",
    )  # fmt: skip
    group.add_argument(
        "--settle", type=seconds, metavar="TIME", help="how long it must then rest (default: 300ms)"
    )
    group.add_argument(
        "--every", type=seconds, default=0.0, metavar="TIME",
        help="least time from question to question, as 1s or 2m (default: 0)",
    )  # fmt: skip
    group.add_argument(
        "--max-side", type=whole, metavar="N", help="reduce larger pictures to N pixels"
    )
    group.add_argument("--realtime", action="store_true", help="play a film at its own speed")
    group.add_argument(
        "--until", type=text, metavar="TEXT", help="end when an answer contains this"
    )


def _add_outputs(parser: Parser) -> None:
    group = parser.add_argument_group("what to do with answers")
    group.add_argument(
        "--on-change", action="store_true", help="only with those that differ from the one before"
    )
    group.add_argument(
        "--jsonl", type=path, metavar="FILE", help="add one JSON line for each, made or continued"
    )
    group.add_argument(
        "--save", type=path, metavar="FOLDER", help="save the pictures that were asked about"
    )
    group.add_argument(
        "--exec", type=command, metavar="COMMAND",
        help=f"run a program for each, {COMMAND_SECONDS} seconds at most",
    )  # fmt: skip
    group.add_argument("--show", action="store_true", help="open a window with picture and answer")


def seconds(value: str) -> float:
    """The type of a flag: 1.5, 1s, 300ms, 2m or 1h to seconds."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(ms|s|m|h|)", value)
    if match is None:
        raise argparse.ArgumentTypeError(f"{value:.40} must look like 300ms, 1s or 2m")
    return float(match[1]) * {"ms": 0.001, "": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def share(value: str) -> float:
    """The type of a flag: 0.2% or 0.002."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(%?)", value)
    found = 2.0 if match is None else float(match[1]) / (100 if match[2] else 1)
    if found > 1:
        raise argparse.ArgumentTypeError(f"{value:.40} must look like 0.2% or 0.002")
    return found


def command(value: str) -> list[str]:
    """The type of a flag: the words of a command."""
    try:
        words = shlex.split(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{value:.40}: {error}".lower()) from None
    if not words:
        raise argparse.ArgumentTypeError("there is no command")
    if shutil.which(words[0]) is None:
        raise argparse.ArgumentTypeError(f"{words[0]:.200} is no program that can be run")
    return words


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and exits: 0 ended, 2 bad input, 130 interrupted."""
    parser = build_parser()
    run_command(parser.prog, lambda: run(parser.parse_args(argv)))


def run(args: argparse.Namespace) -> None:
    """Does what the arguments ask for; errors are exceptions."""
    if args.prompt is None and args.detect is None:
        raise PromptError("--ask is missing; ask something, or say what to --detect")
    constraint, tools = constraint_from(args)
    settings = _settings(args, constraint, tools)

    from ..serving.folder import Lines
    from ..serving.frames import Source
    from ..serving.watch import Recorded

    source = Source.of(args.source)
    if source.kind == "folder" and args.save is not None and _is_same(args.save, source.target):
        raise PromptError("--save is the folder that is watched; its pictures would be asked about")
    if args.dry_run:
        _dry_run(args, source, settings)
        return
    if args.save is not None:
        _make_folder(Path(args.save))
    digest = _digest(args, source, constraint, tools)
    with ExitStack() as stack:
        came = stack.enter_context(interruptible())
        lines, recorded = None, Recorded()
        if args.jsonl is not None:
            lines = stack.enter_context(Lines(Path(args.jsonl)))
            recorded = Recorded.read(Path(args.jsonl), digest)
            lines.cut(recorded.end)
        outputs = Outputs(args, source.name, digest, lines, recorded.gist)
        _watch(args, source, recorded, settings, outputs, came)
    if came():
        sys.exit(INTERRUPTED)


def _make_folder(folder: Path) -> None:
    """Tells before the work that pictures cannot be saved there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be made a folder: {error.strerror}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{folder} cannot be written: Permission denied")


def _is_same(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _settings(args: argparse.Namespace, constraint: Any, tools: Any) -> dict[str, Any]:
    """What a question is asked with; only what was given, since --detect takes little."""
    given: dict[str, tuple[Any, Any]] = {  # and what says nothing
        "max_tokens": (args.max_tokens, DEFAULT_MAX_TOKENS),
        "seed": (args.seed, None),
        "stop": (args.stop, []),
        "sampling": (options_from(args, Sampling), Sampling()),
        "image_options": (options_from(args, ImageOptions), ImageOptions()),
        "constraint": (constraint, None),
        "tools": (tools, None),
    }
    return {name: value for name, (value, silent) in given.items() if value != silent}


def _digest(args: argparse.Namespace, source: Source, constraint: Any, tools: Any) -> str:
    """A short hash of what decides the answers: only entries with the same one are continued."""
    settings = {name: value for name, value in vars(args).items() if name not in OUTPUTS}
    model = model_from(args)
    settings |= {
        "source": source.name,
        "model": str(Path(model).resolve()) if os.path.isdir(model) else model,
        "json_schema": None if constraint is None else asdict(constraint),
        "tools": tools,
    }
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def _dry_run(args: argparse.Namespace, source: Source, settings: dict[str, Any]) -> None:
    from .generate import load_model

    watching = _watching(args, source, settings)
    model, processor, _ = load_model(args)
    found = watching.estimate(model, processor)
    write_estimate(found, as_json=False)
    if found.seconds:
        write(f"rate: at least {1 / found.seconds:.2g} frames a second\n")


def _watching(
    args: argparse.Namespace, source: Source, settings: dict[str, Any], **more: Any
) -> Watch:
    from ..serving.watch import Watch
    from .generate import load_model

    return Watch(
        lambda: load_model(args)[:2], source, args.prompt,
        detect=args.detect, system=args.system, changed=args.changed, settle=args.settle,
        every=args.every, max_side=args.max_side, until=args.until,
        tell=lambda line: tell(one_line(line)), **settings, **more,
    )  # fmt: skip


def _watch(
    args: argparse.Namespace,
    source: Source,
    recorded: Recorded,
    settings: dict[str, Any],
    outputs: Outputs,
    came: Callable[[], bool],
) -> None:
    window: Any = None
    if args.show:
        from .window import Window

        window = Window(source.name)
    watching = _watching(
        args, source, settings, after=recorded, realtime=args.realtime,
        look=None if window is None else window.look,
        stopped=came if window is None else lambda: came() or window.is_closed,
    )  # fmt: skip

    def work() -> None:
        for sighting in watching:
            outputs.take(sighting)
            if window is not None:
                window.say(sighting.answer)

    try:
        work() if window is None else window.run(work)
    finally:
        if watching.frames:
            tell(_summary(watching))


def _summary(watching: Watch) -> str:
    counts = {"frame": watching.frames, "question": watching.asked}
    parts = [f"{n} {name}{'s' * (n != 1)}" for name, n in counts.items()]
    return f"{', '.join(parts)}, {watching.dropped} dropped"


class Outputs:
    """Where answers go: a line, a file of lines, a picture, a program."""

    def __init__(
        self, args: argparse.Namespace, source: str, digest: str, lines: Any, gist: str | None
    ) -> None:
        self.args, self.lines = args, lines
        self.about = {"source": source, "settings": digest}
        self.gist = gist

    def take(self, sighting: Sighting) -> None:
        """Does with an answer what the flags ask for."""
        from ..serving.watch import gist

        entry = sighting.to_dict()
        before, self.gist = self.gist, gist(entry)
        if self.args.on_change and self.gist == before:
            return
        if self.args.save is not None:
            entry["image"] = str(_save(sighting, Path(self.args.save)))
        if self.lines is not None:  # first, for whoever reads the output may have gone
            self.lines.add({**entry, **self.about})
        write(_line(sighting) + "\n")
        if self.args.exec is not None:
            problem = execute(self.args.exec, {**entry, **self.about})
            if problem is not None:
                tell(one_line(f"--exec {problem}"))


def _line(sighting: Sighting) -> str:
    place = f"frame {sighting.frame}" if sighting.path is None else Path(sighting.path).name
    dropped = f", {sighting.dropped} dropped" if sighting.dropped else ""
    return (
        f"{sighting.time:%H:%M:%S} {place} at {sighting.seconds:.1f} s, "
        f"{sighting.changed:.1%} changed, {sighting.latency:.2f} s{dropped}: "
        f"{one_line(sighting.answer)}"
    )


def _save(sighting: Sighting, folder: Path) -> Path:
    """Writes a picture, whole or not at all."""
    target = folder / f"{sighting.time:%Y%m%d-%H%M%S}-{sighting.frame:08}.jpg"
    new = target.with_name(f".{target.name}.new")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sighting.image.save(new, "JPEG", quality=QUALITY)
        os.replace(new, target)
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror or error}") from None
    return target


def execute(words: Sequence[str], entry: dict[str, Any]) -> str | None:
    """Runs a program with an answer; what went wrong, or None.

    What it prints goes to standard error, and it ends with all its children when its time is over.
    """
    values = {"ANSWER": "answer", "FRAME": "frame", "SECONDS": "seconds", "IMAGE": "image"}
    variables = {
        f"MLX_LFM2VL_{name}": str(entry.get(key, "")).replace("\0", "")
        for name, key in values.items()
    }
    try:
        process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=2, env=os.environ | variables,
            start_new_session=True,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        return f"cannot run {words[0]}: {message_of(error)}"
    with process:
        try:
            process.communicate(json.dumps(entry).encode() + b"\n", COMMAND_SECONDS)
        except subprocess.TimeoutExpired:
            return f"{words[0]} was ended, for it took more than {COMMAND_SECONDS} s"
        finally:
            if process.poll() is None:
                with suppress(ProcessLookupError, PermissionError):  # it has just ended
                    os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        return f"{words[0]} failed with code {process.returncode}"
    return None
