"""Flags that several commands share, and what their values may be."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, TypeVar

from ..errors import PromptError
from ..options import DEFAULT_MAX_TOKENS

if TYPE_CHECKING:
    from ..prompts.constraint import Constraint
    from ..prompts.question import Tools

T = TypeVar("T")
DEFAULT_MODEL = "LiquidAI/LFM2.5-VL-450M"


def whole(value: str) -> int:
    """The type of a flag: a whole number. Bounds are checked where settings are made."""
    try:
        return int(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{_short(value)} is no whole number") from None


def positive(value: str) -> int:
    """The type of a flag that no setting checks: a whole number, 1 or more."""
    number = whole(value)
    if not 1 <= number < 1 << 31:
        right = "1 or more" if number < 1 else f"{(1 << 31) - 1} or less"
        raise argparse.ArgumentTypeError(f"{_short(value)} must be {right}")
    return number


def number(value: str) -> float:
    """The type of a flag: a number. Bounds are checked where settings are made."""
    try:
        return float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{_short(value)} is no number") from None


def text(value: str) -> str:
    """The type of a flag: text that the model can read."""
    if not is_text(value):
        raise argparse.ArgumentTypeError(f"{_short(value)} is not UTF-8")
    return value


def is_text(value: str) -> bool:
    """Whether a string is text all through, without bytes that Python could not decode."""
    return not any("\ud800" <= character <= "\udfff" for character in value)


def path(value: str) -> str:
    """The type of a flag: a path or URL; `~` is the home folder, or part of a name."""
    expanded = os.path.expanduser(value)
    # nobody's home, so part of a name; whoever expands it again must not fail
    return os.path.abspath(expanded) if expanded.startswith("~") else expanded


def _short(value: str) -> str:
    return value if len(value) <= 40 else value[:40] + "…"


# name in `Sampling`, type, meaning
SAMPLING: tuple[tuple[str, Callable[[str], float], str], ...] = (
    ("temperature", number, "0 is greedy decoding, without any recommended penalty"),
    ("top_p", number, "keep the most likely tokens up to this total probability"),
    ("top_k", whole, "keep so many most likely tokens"),
    ("min_p", number, "drop tokens below this share of the most likely one"),
    ("repetition_penalty", number, "divide the scores of tokens that came before; 1 is none"),
    ("repetition_context_size", whole, "tokens that penalties look back at"),
    ("presence_penalty", number, "subtract from the scores of tokens that came before"),
    ("frequency_penalty", number, "the same for each time that a token came before"),
    ("xtc_probability", number, "how often to leave out the most likely tokens"),
    ("xtc_threshold", number, "probability from which on they are left out"),
)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Which checkpoint, and the type it computes in."""
    parser.add_argument(
        "--model",
        type=path,
        default=DEFAULT_MODEL,
        metavar="NAME",
        help=f"folder, Hugging Face repository, or demo (default: {DEFAULT_MODEL})",
    )
    parser.add_argument(
        "--revision", metavar="NAME", help="branch, tag or commit of the repository"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="type to compute in (default: the checkpoint's on a GPU, float32 on a CPU)",
    )


def add_adapters(parser: argparse.ArgumentParser) -> None:
    """Trained updates beside the weights; the model is then what `model_from` finds."""
    parser.set_defaults(model=None)
    parser.add_argument(
        "--adapter-path",
        type=path,
        metavar="FOLDER",
        help="trained adapters, from the train command or mlx-lm; they bring their own base model "
        "unless --model names one",
    )


def model_from(args: argparse.Namespace) -> str:
    """The model of `add_model`, or of the adapters of `add_adapters`."""
    if args.model is not None:
        return str(args.model)
    base, adapters = None, getattr(args, "adapter_path", None)
    if adapters is not None:
        from ..checkpoints.adapters import adapter_base_model

        base = adapter_base_model(adapters)
    return DEFAULT_MODEL if base is None else base


def add_images(
    parser: argparse.ArgumentParser, help: str, *, dest: str = "image", required: bool = False
) -> None:
    """--image, one or several."""
    parser.add_argument(
        "--image",
        "--images",
        dest=dest,
        nargs="+",
        action="extend",
        default=None if required else [],
        required=required,
        type=path,
        metavar="IMAGE",
        help=help,
    )


def add_videos(parser: argparse.ArgumentParser) -> None:
    """--video, one or several, and how many frames of each are seen."""
    parser.add_argument(
        "--video",
        nargs="+",
        action="extend",
        default=[],
        type=path,
        metavar="FILM",
        help="path or URL; evenly chosen frames are seen after the images (needs the extra video)",
    )
    parser.add_argument(
        "--frames", type=whole, metavar="N", help="frames of each film (default: 16)"
    )


def add_prompt(parser: argparse.ArgumentParser, help: str, *, required: bool = False) -> None:
    """The question, and the system message before it."""
    parser.add_argument("--prompt", "-p", type=text, required=required, metavar="TEXT", help=help)
    parser.add_argument(
        "--system", "--system-prompt", type=text, metavar="TEXT", help="system message"
    )


def add_answer(parser: argparse.ArgumentParser) -> None:
    """How long an answer may be, and what ends it."""
    parser.add_argument(
        "--max-tokens",
        "-m",
        type=whole,
        default=DEFAULT_MAX_TOKENS,
        metavar="N",
        help="longest answer in tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--stop",
        nargs="+",
        action="extend",
        default=[],
        type=text,
        metavar="TEXT",
        help="texts that end the answer; they are not part of it",
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Flags of `Sampling`, and the seed."""
    group = parser.add_argument_group("sampling (default: the checkpoint's recommendation)")
    for name, kind, meaning in SAMPLING:
        short = ["--temp"] if name == "temperature" else []
        flag = "--" + name.replace("_", "-")
        metavar = "N" if kind is not number else "X"
        group.add_argument(*short, flag, dest=name, type=kind, metavar=metavar, help=meaning)
    group.add_argument("--seed", type=whole, metavar="N", help="makes sampling repeatable")


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """Flags of `ImageOptions`."""
    group = parser.add_argument_group("image settings (default: the checkpoint's)")
    for flag, meaning in (
        ("--min-image-tokens", "fewest tokens of a view"),
        ("--max-image-tokens", "most tokens of a view"),
        ("--min-tiles", "fewest tiles of a large image"),
        ("--max-tiles", "most tiles of a large image"),
        ("--tile-size", "side of a tile in pixels"),
    ):
        group.add_argument(flag, type=whole, metavar="N", help=meaning)
    group.add_argument(
        "--max-pixels-tolerance",
        type=number,
        metavar="X",
        help="cut an image into tiles above this many times the largest view",
    )
    for flag, name, meaning in (
        ("--image-splitting", "do_image_splitting", "cut large images into tiles"),
        ("--thumbnail", "use_thumbnail", "add the whole image after its tiles"),
        ("--image-special-tokens", "use_image_special_tokens", "mark images and tiles"),
    ):
        group.add_argument(
            flag, dest=name, default=None, action=argparse.BooleanOptionalAction, help=meaning
        )


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    """Flags of `CacheOptions`."""
    group = parser.add_argument_group("memory (default: keep every position as it is)")
    group.add_argument(
        "--max-kv-size",
        type=whole,
        metavar="N",
        help="positions that attention layers keep: the first ones and a sliding window",
    )
    group.add_argument(
        "--keep",
        type=whole,
        metavar="N",
        help="first positions that never leave (default: up to the first answer)",
    )
    group.add_argument(
        "--kv-bits", type=whole, metavar="N", help="store keys and values with 4 or 8 bits"
    )
    group.add_argument(
        "--kv-group-size",
        type=whole,
        metavar="N",
        help="values that share a scale: 32, 64 or 128 (default: 64)",
    )
    group.add_argument(
        "--quantized-kv-start",
        type=whole,
        metavar="N",
        help="first position that --kv-bits stores so (default: 5000)",
    )


def add_constraint(parser: argparse.ArgumentParser) -> None:
    """Flags that keep answers to a form, tools among them."""
    group = parser.add_argument_group("form of the answer (needs the extra json; one of these)")
    group.add_argument(
        "--json-schema",
        metavar="FILE|-|TEXT",
        help="answer with JSON of this schema; - reads it from standard input, true is any JSON",
    )
    group.add_argument(
        "--regex",
        type=text,
        metavar="TEXT",
        help="the whole answer matches this regular expression",
    )
    group.add_argument(
        "--choice",
        nargs="+",
        action="extend",
        type=text,
        metavar="TEXT",
        help="answer with one of these",
    )
    group.add_argument(
        "--grammar", type=path, metavar="FILE", help="Lark grammar, in llguidance's variant"
    )
    group.add_argument(
        "--tools", type=path, metavar="FILE", help="functions to call: their JSON schemas in a list"
    )
    group.add_argument(
        "--tool-choice",
        metavar="NAME",
        help="none, auto, required, or the name of a tool (default: auto)",
    )


def constraint_from(args: argparse.Namespace) -> tuple[Constraint | None, Tools | None]:
    """The form that the flags ask for, and the tools to show.

    Raises:
        PromptError: it makes no sense.
    """
    schema, grammar, tools = args.json_schema, args.grammar, args.tools
    choices = (args.regex, args.choice, args.tool_choice)
    if all(value is None for value in (schema, grammar, tools, *choices)):
        return None, None  # and nothing more is loaded
    from ..prompts.constraint import Constraint
    from ..prompts.json_schema import read_text
    from ..prompts.tool_grammar import read_tools

    if schema == "-":
        others = (getattr(args, "prompt", None), *getattr(args, "image", ()))
        if "-" in others or getattr(args, "chat", False):
            raise PromptError("standard input can be the schema, the prompt or an image, only one")
        schema = sys.stdin.read()
    if grammar is not None:
        grammar = read_text("grammar", grammar)
    if tools is not None:
        tools = read_tools(tools)
    found = Constraint.of(
        schema, args.regex, args.choice, grammar, tools=tools, tool_choice=args.tool_choice
    )
    return found, None if args.tool_choice == "none" else tools


def options_from(args: argparse.Namespace, kind: type[T]) -> T:
    """An options object from the flags of its fields; None keeps its defaults."""
    given = {f.name: getattr(args, f.name, None) for f in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in given.items() if value is not None})
