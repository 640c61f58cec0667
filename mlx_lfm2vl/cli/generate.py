"""The command line `python -m mlx_lfm2vl.generate`, also installed as `mlx-lfm2vl-generate`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NoReturn

from .._version import __version__
from ..errors import PromptError
from ..options import (
    DEFAULT_MAX_TOKENS,
    CacheOptions,
    GenerationConfig,
    ImageOptions,
    Sampling,
    SamplingConfig,
)

if TYPE_CHECKING:
    from ..generation.answer import GenerationResponse
    from ..prompts.processor import Lfm2VlProcessor, Prompt
    from ..prompts.question import AnswerSettings, Tools
from .options import (
    add_adapters,
    add_cache_options,
    add_image_options,
    add_model,
    add_sampling,
    add_tools,
    options_from,
    positive,
    tools_from,
)
from .terminal import run_command

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
    add_tools(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and exits: 0 done, 2 bad input, 130 interrupted."""
    parser = build_parser()
    args = parser.parse_args(argv)
    run_command(parser.prog, lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Does what the arguments ask for; errors are exceptions."""
    image_options = options_from(args, ImageOptions)
    cache_options = options_from(args, CacheOptions)
    sampling = options_from(args, Sampling)  # a wrong value is told before the model is loaded
    tools, constraint = tools_from(args)
    if args.chat:
        _chat(args, image_options, cache_options, sampling, tools, constraint)
        return
    messages = _messages(args)
    images = _images(args)

    from ..checkpoints.loading import load
    from ..generation.generate import stream_generate

    model, processor = load(
        args.model, dtype=args.dtype, revision=args.revision, adapter_path=args.adapter_path
    )
    prompt = processor(messages, images, tools=tools, image_options=image_options)
    if args.verbose:
        _write_settings(processor.generation_config, sampling)
    responses = stream_generate(
        model,
        processor,
        prompt,
        cache_options=cache_options,
        measure_vision=args.verbose or args.json,
        **_answer_settings(args, sampling, constraint),
    )
    if args.json:
        last = _print_json(args.model, processor, prompt, sampling, responses)
    else:
        last = _print_text(responses)
    if args.verbose:
        _write_statistics(last)


def _chat(
    args: argparse.Namespace,
    image_options: ImageOptions,
    cache_options: CacheOptions,
    sampling: Sampling,
    tools: Tools | None,
    constraint: AnswerSettings,
) -> None:
    if args.json or "-" in (args.prompt, *args.image):
        raise PromptError("--chat reads standard input itself, without --json and -")

    from ..checkpoints.loading import load
    from ..serving.session import Session
    from .chat import Chat

    model, processor = load(
        args.model, dtype=args.dtype, revision=args.revision, adapter_path=args.adapter_path
    )
    settings = _answer_settings(args, sampling, constraint)
    session = Session(
        model,
        processor,
        args.system,
        tools=tools,
        image_options=image_options,
        cache_options=cache_options,
    )
    Chat(session, settings, args.verbose).run(args.image, args.prompt)


def _answer_settings(
    args: argparse.Namespace, sampling: Sampling, constraint: AnswerSettings
) -> AnswerSettings:
    return {
        "max_tokens": args.max_tokens,
        "sampling": sampling,
        "seed": args.seed,
        "stop": args.stop,
        **constraint,
    }


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
    sampling: Sampling,
    responses: Iterator[GenerationResponse],
) -> GenerationResponse:
    text, tokens, calls = "", [], list[dict[str, Any]]()
    for response in responses:
        text += response.text
        tokens.append(response.token)
        calls += [call.to_dict() for call in response.tool_calls]
    answer = {
        "model": model,
        "text": text,
        "tokens": tokens,
        "tool_calls": calls,
        "finish_reason": response.finish_reason,
        "prompt_tokens": response.prompt_tokens,
        "image_tokens": list(response.image_tokens),
        "image_views": [image.views for image in prompt.images],
        "generation_tokens": response.generation_tokens,
        "sampling": asdict(sampling.apply(processor.generation_config.sampling)),
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


def _write_settings(config: GenerationConfig, sampling: Sampling) -> None:
    used = asdict(sampling.apply(config.sampling))
    recommended = asdict(config.sampling)
    parts = []
    for name, value in used.items():
        source = "default"
        if getattr(sampling, name) is not None:
            source = "flag"
        elif value != getattr(SamplingConfig(), name) and value == recommended[name]:
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
