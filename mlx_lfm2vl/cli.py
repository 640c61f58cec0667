"""The command line `python -m mlx_lfm2vl.generate`, also installed as `mlx-lfm2vl-generate`."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from ._version import __version__
from .config import DEFAULT_MAX_TOKENS, CacheOptions, GenerationConfig, ImageOptions, Sampling
from .errors import Lfm2VlError, PromptError

if TYPE_CHECKING:
    from .generate import GenerationResponse
    from .processor import Lfm2VlProcessor, Prompt

T = TypeVar("T")

DEFAULT_MODEL = "LiquidAI/LFM2.5-VL-450M"
BAD_INPUT = 2  # exit code
INTERRUPTED = 130

EPILOG = """\
examples:
  %(prog)s --image photo.jpg --prompt "What is in this image?"
  %(prog)s --image a.jpg b.jpg --prompt "What changed?" --temp 0 --max-tokens 100
  %(prog)s --chat --image photo.jpg
  cat notes.txt | %(prog)s --prompt -
"""


def build_parser() -> argparse.ArgumentParser:
    """The arguments. Every default that a checkpoint decides is None here."""
    parser = argparse.ArgumentParser(
        prog="mlx-lfm2vl-generate",
        description="Answer a question about images (or a question alone) with LFM2-VL.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    add_model(parser)
    parser.add_argument(
        "--image",
        nargs="+",
        action="extend",
        default=[],
        metavar="IMAGE",
        help="path, URL, or - for standard input; several are seen in this order",
    )
    parser.add_argument("--prompt", "-p", help="the question, or - to read it from standard input")
    parser.add_argument("--system", help="system message")
    parser.add_argument(
        "--chat",
        action="store_true",
        help="talk instead of asking once; --image and --prompt come first",
    )
    parser.add_argument(
        "--max-tokens",
        "-m",
        type=positive,
        default=DEFAULT_MAX_TOKENS,
        help="longest answer in tokens (default: %(default)s)",
    )
    add_adapters(parser)
    parser.add_argument(
        "--stop", nargs="+", action="extend", default=[], help="texts that end the answer"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object with text, tokens and timings",
    )
    parser.add_argument(
        "--verbose", "-v", action="store_true", help="print settings and statistics on stderr"
    )
    add_sampling(parser)
    add_image_options(parser)
    add_cache_options(parser)
    return parser


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


def options_from(args: argparse.Namespace, kind: type[T]) -> T:
    """An options object from the flags of its fields; None keeps its defaults."""
    stated = {f.name: getattr(args, f.name) for f in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in stated.items() if value is not None})


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be 1 or more")
    return value


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and exits: 0 done, 2 bad input, 130 interrupted."""
    parser = build_parser()
    args = parser.parse_args(argv)
    run_command(parser.prog, lambda: run(args))


def run_command(prog: str, action: Callable[[], None]) -> NoReturn:
    """Runs an action and exits: 0 done, 1 nobody reads on, 2 bad input, 130 interrupted."""
    try:
        action()
    except Lfm2VlError as error:
        one_line = " ".join(str(error).split())
        sys.stderr.write(f"{prog}: error: {one_line}\n")
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # the reader has gone; nothing may be flushed to it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(0)


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C waits until the work looks: yields a function that tells whether it came."""
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield came.is_set
        return
    before = signal.signal(signal.SIGINT, lambda number, frame: came.set())
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def run(args: argparse.Namespace) -> None:
    """Does what the arguments ask for; errors are exceptions."""
    image_options = options_from(args, ImageOptions)
    cache_options = options_from(args, CacheOptions)
    stated = {f.name: getattr(args, f.name) for f in fields(Sampling)}
    Sampling().override(**stated)  # a wrong value is told before the model is loaded
    if args.chat:
        _chat(args, image_options, cache_options, stated)
        return
    messages = _messages(args)
    images = _images(args)

    from .generate import stream_generate
    from .loading import load

    model, processor = load(
        args.model, dtype=args.dtype, revision=args.revision, adapter_path=args.adapter_path
    )
    prompt = processor(messages, images, image_options=image_options)
    if args.verbose:
        _write_settings(processor.generation_config, stated)
    responses = stream_generate(
        model,
        processor,
        prompt,
        max_tokens=args.max_tokens,
        seed=args.seed,
        stop=args.stop,
        cache_options=cache_options,
        measure_vision=args.verbose or args.json,
        **stated,
    )
    if args.json:
        last = _print_json(args.model, processor, prompt, stated, responses)
    else:
        last = _print_text(responses)
    if args.verbose:
        _write_statistics(last)


def _chat(
    args: argparse.Namespace,
    image_options: ImageOptions,
    cache_options: CacheOptions,
    stated: dict[str, Any],
) -> None:
    if args.json or "-" in (args.prompt, *args.image):
        raise PromptError("--chat reads standard input itself, without --json and -")

    from .chat import Chat
    from .generate import AnswerOptions
    from .loading import load
    from .session import Session

    model, processor = load(
        args.model, dtype=args.dtype, revision=args.revision, adapter_path=args.adapter_path
    )
    sampling = processor.generation_config.sampling.override(**stated)
    options = AnswerOptions(args.max_tokens, sampling, args.seed, tuple(args.stop))
    session = Session(
        model, processor, args.system, image_options=image_options, cache_options=cache_options
    )
    Chat(session, options, args.verbose).run(args.image, args.prompt)


def _images(args: argparse.Namespace) -> list[Any]:
    return [sys.stdin.buffer.read() if image == "-" else image for image in args.image]


def _messages(args: argparse.Namespace) -> list[dict[str, Any]]:
    if args.prompt is None:
        raise PromptError("--prompt is missing; ask something, or talk with --chat")
    if args.prompt == "-" and "-" in args.image:
        raise PromptError("standard input can be the prompt or an image, not both")
    if args.image.count("-") > 1:
        raise PromptError("standard input can be only one image")
    text = sys.stdin.read() if args.prompt == "-" else args.prompt
    if not text.strip():
        raise PromptError("the prompt is empty; ask something")
    content: Any = text
    if args.image:
        content = [*({"type": "image"} for _ in args.image), {"type": "text", "text": text}]
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    return [*system, {"role": "user", "content": content}]


def _print_text(responses: Iterator[GenerationResponse]) -> GenerationResponse:
    for response in responses:
        sys.stdout.write(response.text)
        if sys.stdout.isatty():
            sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    return response


def _print_json(
    model: str,
    processor: Lfm2VlProcessor,
    prompt: Prompt,
    stated: dict[str, Any],
    responses: Iterator[GenerationResponse],
) -> GenerationResponse:
    text, tokens = "", []
    for response in responses:
        text += response.text
        tokens.append(response.token)
    answer = {
        "model": model,
        "text": text,
        "tokens": tokens,
        "finish_reason": response.finish_reason,
        "prompt_tokens": response.prompt_tokens,
        "image_tokens": list(response.image_tokens),
        "image_views": [span.views for span in prompt.image_spans],
        "generation_tokens": response.generation_tokens,
        "sampling": asdict(processor.generation_config.sampling.override(**stated)),
        "timings": {
            "vision_s": response.vision_time,
            "time_to_first_token_s": response.time_to_first_token,
            "prompt_tps": response.prompt_tps,
            "generation_tps": response.generation_tps,
            "peak_memory_gb": response.peak_memory,
        },
    }
    sys.stdout.write(json.dumps(answer, ensure_ascii=False) + "\n")
    sys.stdout.flush()
    return response


def _write_settings(config: GenerationConfig, stated: dict[str, Any]) -> None:
    used = asdict(config.sampling.override(**stated))
    recommended = asdict(config.sampling)
    parts = []
    for name, value in used.items():
        source = "default"
        if stated[name] is not None:
            source = "flag"
        elif value != getattr(Sampling(), name) and value == recommended[name]:
            source = config.sampling_source
        parts.append(f"{name} {value:g} ({source})")
    sys.stderr.write(f"sampling: {', '.join(parts)}\n")


def _write_statistics(last: GenerationResponse) -> None:
    images = ", ".join(map(str, last.image_tokens)) or "none"
    vision = "" if last.vision_time is None else f", vision {last.vision_time * 1000:.0f} ms"
    sys.stderr.write(
        f"images: tokens {images}{vision}\n"
        f"prompt: {last.prompt_tokens} tokens, {last.prompt_tps:.1f} tok/s, "
        f"first token after {last.time_to_first_token:.3f} s\n"
        f"answer: {last.generation_tokens} tokens, {last.generation_tps:.1f} tok/s, "
        f"ended by {last.finish_reason}\n"
        f"peak memory: {last.peak_memory:.2f} GB\n"
    )
