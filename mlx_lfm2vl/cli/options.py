"""Flags that several commands share."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..errors import PromptError

if TYPE_CHECKING:
    from ..prompts.question import AnswerSettings, Tools

T = TypeVar("T")
DEFAULT_MODEL = "LiquidAI/LFM2.5-VL-450M"


def add_model(parser: argparse.ArgumentParser) -> None:
    """Which checkpoint, and the type it computes in."""
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help="folder, Hugging Face repository, or demo (default: %(default)s)",
    )
    parser.add_argument("--revision", help="branch, tag or commit of the repository")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="type to compute in (default: the checkpoint's on a GPU, float32 on a CPU)",
    )


def add_adapters(parser: argparse.ArgumentParser) -> None:
    """Trained updates beside the weights."""
    parser.add_argument(
        "--adapter-path", help="folder of adapters, from mlx_lfm2vl.train or mlx-lm"
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Flags of `Sampling`, and the seed."""
    group = parser.add_argument_group("sampling (default: the checkpoint's recommendation)")
    group.add_argument(
        "--temp",
        "--temperature",
        dest="temperature",
        type=float,
        help="0 is greedy decoding, without any recommended penalty",
    )
    group.add_argument("--top-p", type=float, help="keep tokens up to this total probability")
    group.add_argument("--top-k", type=int, help="keep so many most likely tokens")
    group.add_argument("--min-p", type=float, help="drop tokens below this share of the best one")
    group.add_argument("--repetition-penalty", type=float, help="1 is none")
    group.add_argument("--repetition-context-size", type=int, help="tokens the penalty looks at")
    group.add_argument("--seed", type=int, help="makes sampling repeatable")


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """Flags of `ImageOptions`."""
    group = parser.add_argument_group("images (default: the checkpoint's settings)")
    group.add_argument("--min-image-tokens", type=int, help="least tokens of a view")
    group.add_argument("--max-image-tokens", type=int, help="most tokens of a view")
    group.add_argument("--min-tiles", type=int, help="least tiles of a large image")
    group.add_argument("--max-tiles", type=int, help="most tiles of a large image")
    group.add_argument("--tile-size", type=int, help="side of a tile in pixels")
    group.add_argument(
        "--max-pixels-tolerance",
        type=float,
        help="an image is tiled above this many times the largest view",
    )
    for flag, name, text in (
        ("--image-splitting", "do_image_splitting", "cut large images into tiles"),
        ("--thumbnail", "use_thumbnail", "add the whole image after its tiles"),
        ("--image-special-tokens", "use_image_special_tokens", "mark images and tiles"),
    ):
        group.add_argument(
            flag, dest=name, default=None, action=argparse.BooleanOptionalAction, help=text
        )


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    """Flags of `CacheOptions`."""
    group = parser.add_argument_group("memory (default: keep every position as it is)")
    group.add_argument(
        "--max-kv-size",
        type=int,
        help="positions that attention layers keep: the first ones and a sliding window",
    )
    group.add_argument(
        "--keep", type=int, help="first positions that never leave (default: the whole prompt)"
    )
    group.add_argument("--kv-bits", type=int, help="store keys and values with 4 or 8 bits")
    group.add_argument("--kv-group-size", type=int, help="values that share a scale (default: 64)")
    group.add_argument(
        "--quantized-kv-start",
        type=int,
        help="position from which on --kv-bits holds (default: 5000)",
    )


def add_tools(parser: argparse.ArgumentParser) -> None:
    """Which functions the model may call."""
    group = parser.add_argument_group("tools")
    group.add_argument("--tools", metavar="FILE", help="JSON schemas of functions, in a list")
    group.add_argument(
        "--tool-choice",
        default="auto",
        metavar="CHOICE",
        help="none, auto, required, or the name of a tool (default: auto)",
    )


def tools_from(args: argparse.Namespace) -> tuple[Tools | None, AnswerSettings]:
    """The tools that the model is shown, and the grammar of its calls as settings of an answer."""
    if args.tools is None:
        if args.tool_choice not in ("auto", "none"):
            raise PromptError(f"--tool-choice {args.tool_choice} needs --tools")
        return None, {}
    from ..generation.tools import read_tools, tool_settings

    try:
        text = Path(args.tools).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{args.tools} cannot be read: {error}") from None
    settings = tool_settings(read_tools(text, args.tools), args.tool_choice)
    return settings.pop("tools", None), settings


def options_from(args: argparse.Namespace, kind: type[T]) -> T:
    """An options object from the flags of its fields; None keeps its defaults."""
    stated = {f.name: getattr(args, f.name) for f in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in stated.items() if value is not None})


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be 1 or more")
    return value
