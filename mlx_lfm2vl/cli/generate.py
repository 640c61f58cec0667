"""The command line `python -m mlx_lfm2vl.generate`, also installed as `mlx-lfm2vl-generate`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import PromptError
from ..options import CacheOptions, GenerationConfig, ImageOptions, Sampling, SamplingConfig
from .estimates import add_dry_run, teach, write_estimate
from .options import (
    add_adapters,
    add_answer,
    add_cache_options,
    add_constraint,
    add_image_options,
    add_images,
    add_model,
    add_prompt,
    add_sampling,
    add_videos,
    constraint_from,
    is_text,
    model_from,
    options_from,
)
from .terminal import Parser, make_parser, run_command, tell, write

if TYPE_CHECKING:
    from ..generation.answer import GenerationResponse
    from ..generation.engine import AnswerRow
    from ..models.lfm2_vl import Lfm2VlForConditionalGeneration
    from ..prompts.constraint import Constraint
    from ..prompts.processor import Lfm2VlProcessor
    from ..prompts.question import Tools

PHOTOGRAPH_BITS = 6.0  # entropy of 32 x 32 grey pixels: drawings stay below 5.5, photos above 6.4
EPILOG = """\
examples:
  %(prog)s --image photo.jpg --prompt "What is in this image?"
  %(prog)s --image a.jpg b.jpg --prompt "What changed?" --temp 0 --max-tokens 100
  %(prog)s --video film.mp4 --frames 8 --prompt "What happens?"
  %(prog)s --chat --image photo.jpg
  cat notes.txt | %(prog)s --prompt -
"""


def build_parser() -> Parser:
    """The arguments. Every default that a checkpoint decides is None here."""
    parser = make_parser(
        "mlx-lfm2vl-generate",
        "Answer a question about images (or a question alone) with LFM2-VL.",
        EPILOG,
        "%(prog)s --prompt TEXT [--image IMAGE …] [flags]",
    )
    add_model(parser)
    add_adapters(parser)
    add_images(parser, "path, URL, or - for standard input; several are seen in this order")
    add_videos(parser)
    add_prompt(parser, "the question, or - to read it from standard input")
    parser.add_argument(
        "--chat",
        action="store_true",
        help="talk instead of asking once; --image and --prompt come first",
    )
    add_answer(parser)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object with text, tokens and timings"
    )
    parser.add_argument(
        "--verbose", "-v", action="store_true", help="print settings and statistics on stderr"
    )
    add_dry_run(parser)
    add_sampling(parser)
    add_image_options(parser)
    add_constraint(parser)
    add_cache_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and exits: 0 done, 2 bad input, 130 interrupted."""
    parser = build_parser()
    run_command(parser.prog, lambda: run(parser.parse_args(argv)))


def run(args: argparse.Namespace) -> None:
    """Does what the arguments ask for; errors are exceptions."""
    image_options = options_from(args, ImageOptions)
    cache_options = options_from(args, CacheOptions)
    sampling = options_from(args, Sampling)  # a wrong value is told before the model is loaded
    constraint, tools = constraint_from(args)
    if args.chat:
        _chat(args, image_options, cache_options, constraint, tools)
        return
    messages, images = _messages(args), [_read_image(image) for image in args.image]

    from ..generation.engine import Engine
    from ..generation.estimate import estimate
    from ..generation.generate import run as answer
    from ..prompts.question import Question

    question = Question(
        messages,
        images,
        max_tokens=args.max_tokens,
        seed=args.seed,
        stop=args.stop,
        tools=tools,
        image_options=image_options,
        cache_options=cache_options,
        measure_vision=True,
        sampling=sampling,
        constraint=constraint,
    )
    model, processor, notice = load_model(args)
    if args.dry_run:
        write_estimate(estimate(model, processor, question, first=True), args.json)
        return
    engine = Engine(model, processor)
    row = engine.add(question)
    for image in images:
        notice(image)
    if args.verbose:
        _write_settings(processor.generation_config, sampling)
    responses = answer(engine, row)
    recommended = processor.generation_config.sampling
    if args.json:
        last = _print_json(model_from(args), row, sampling, recommended, responses)
    else:
        last = _print_text(responses)
    if args.verbose:
        _write_statistics(last)


def _chat(
    args: argparse.Namespace,
    image_options: ImageOptions,
    cache_options: CacheOptions,
    constraint: Constraint | None,
    tools: Tools | None,
) -> None:
    if args.json or args.dry_run or "-" in (args.prompt, *args.image):
        raise PromptError("--chat reads standard input itself, without --json, --dry-run and -")

    from ..serving.session import Session
    from .chat import SETTINGS, Chat

    model, processor, notice = load_model(args)
    session = Session(
        model,
        processor,
        args.system,
        tools=tools,
        image_options=image_options,
        cache_options=cache_options,
    )
    settings = {name: getattr(args, name) for name in SETTINGS} | {"constraint": constraint}
    chat = Chat(session, settings, args.verbose, notice)
    chat.run(args.image, args.prompt, args.video, args.frames)


def load_model(
    args: argparse.Namespace,
) -> tuple[Lfm2VlForConditionalGeneration, Lfm2VlProcessor, Callable[[Any], None]]:
    """Model, which teaches its speeds, processor, and what tells that the demo knows no photo."""
    from ..checkpoints.hub import DEMO_FOLDER, resolve_model
    from ..checkpoints.loading import load

    folder = resolve_model(model_from(args), args.revision)
    model, processor = load(folder, dtype=args.dtype, adapter_path=args.adapter_path)
    teach(model)
    is_demo = folder == DEMO_FOLDER

    def notice(image: Any) -> None:
        if is_demo and is_photograph(image):
            tell("(looks like a photograph; the demo model knows only drawn shapes and words)")

    return model, processor, notice


def is_photograph(image: Any) -> bool:
    """Whether an image has more shades than drawn shapes and words on a plain ground."""
    from PIL.Image import Resampling

    from ..prompts.image_source import load_image

    small = load_image(image).resize((32, 32), Resampling.BOX)
    return small.convert("L").entropy() > PHOTOGRAPH_BITS


def _messages(args: argparse.Namespace) -> list[dict[str, Any]]:
    if args.frames is not None and not args.video:
        raise PromptError("--frames belongs to --video, which is missing")
    if args.prompt is None:
        raise PromptError(_no_prompt(args.image))
    if args.prompt == "-" and "-" in args.image:
        raise PromptError("standard input can be the prompt or an image, not both")
    if args.image.count("-") > 1:
        raise PromptError("standard input can be only one image")
    text = _read_prompt() if args.prompt == "-" else args.prompt
    if not text.strip():
        raise PromptError("the prompt is empty; ask something")
    seen = [{"type": "image"} for _ in args.image]
    seen += [{"type": "video", "video": film, "frames": args.frames} for film in args.video]
    content = [*seen, {"type": "text", "text": text}] if seen else text
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    return [*system, {"role": "user", "content": content}]


def _no_prompt(images: Sequence[str]) -> str:
    """Says that the prompt is missing, and which words after --image were meant to be it."""
    words: list[str] = []
    for image in reversed(images):
        if image == "-" or image.startswith(("http:", "https:", "data:")) or os.path.exists(image):
            break
        words.insert(0, image)
    if not words:
        return "--prompt is missing; ask something, or talk with --chat"
    question = " ".join(words)
    return (
        f'--prompt is missing: "{question}" stands after --image and was taken for an image; '
        f'a question is --prompt "{question}"'
    )


def _read_image(image: str) -> str | bytes:
    return sys.stdin.buffer.read() if image == "-" else image


def _read_prompt() -> str:
    try:
        text: str | None = sys.stdin.read()
    except UnicodeDecodeError:
        text = None
    if text is None or not is_text(text):
        raise PromptError("the prompt on standard input is not UTF-8")
    return text


def _print_text(responses: Iterator[GenerationResponse]) -> GenerationResponse:
    for response in responses:
        if response.text:
            write(response.text)
    write("\n")
    return response


def _print_json(
    model: str,
    row: AnswerRow,
    sampling: Sampling,
    recommended: SamplingConfig,
    responses: Iterator[GenerationResponse],
) -> GenerationResponse:
    prompt, constraint = row.prompt, row.question.constraint
    assert prompt is not None
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
        **({} if constraint is None else constraint.result(text, response.closed)),
        "prompt_tokens": response.prompt_tokens,
        "image_tokens": list(response.image_tokens),
        "image_views": [image.views for image in prompt.images],
        "generation_tokens": response.generation_tokens,
        "sampling": asdict(sampling.apply(recommended)),
        "timings": {
            "vision_s": response.vision_time,
            "time_to_first_token_s": response.time_to_first_token,
            "prompt_tps": response.prompt_tps,
            "generation_tps": response.generation_tps,
            "peak_memory_gb": response.peak_memory,
        },
    }
    write(json.dumps(answer, ensure_ascii=False) + "\n")
    return response


def _write_settings(config: GenerationConfig, sampling: Sampling) -> None:
    used = asdict(sampling.apply(config.sampling))
    recommended = asdict(config.sampling)
    parts = []
    for name, value in used.items():
        if value is None:
            continue
        source = "default"
        if getattr(sampling, name) is not None:
            source = "flag"
        elif value != getattr(SamplingConfig(), name) and value == recommended[name]:
            source = config.sampling_source
        parts.append(f"{name} {value:g} ({source})")
    tell(f"sampling: {', '.join(parts)}")


def _write_statistics(last: GenerationResponse) -> None:
    images = ", ".join(map(str, last.image_tokens)) or "none"
    vision = "" if last.vision_time is None else f", vision {last.vision_time * 1000:.0f} ms"
    tell(
        f"images: tokens {images}{vision}\n"
        f"prompt: {last.prompt_tokens} tokens, {last.prompt_tps:.1f} tok/s, "
        f"first token after {last.time_to_first_token:.3f} s\n"
        f"answer: {last.generation_tokens} tokens, {last.generation_tps:.1f} tok/s, "
        f"ended by {last.finish_reason}\n"
        f"peak memory: {last.peak_memory:.2f} GB"
    )
