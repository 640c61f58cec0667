"""The command line `python -m mlx_lfm2vl.detect`, also installed as `mlx-lfm2vl-detect`."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .._version import __version__
from ..errors import ImageError, OutputError
from ..options import ImageOptions
from ..serving.folder import find_images
from .options import add_adapters, add_image_options, add_model, options_from, positive
from .terminal import run_command

if TYPE_CHECKING:
    from ..generation.grounding import Box

EPILOG = """\
examples:
  %(prog)s --image photo.jpg --query "red car" --draw boxes.png
  %(prog)s --image photos --query cat dog --json --draw drawn --coco boxes.json
"""


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(
        prog="mlx-lfm2vl-detect",
        description="Find things in images with LFM2-VL: boxes in pixels, with scores.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    add_model(parser)
    parser.add_argument(
        "--image", nargs="+", required=True, help="files, URLs, patterns, or folders"
    )
    parser.add_argument("--query", "-q", nargs="+", required=True, help="what to look for")
    parser.add_argument("--draw", metavar="PATH", help="PNG to write; of several images, a folder")
    parser.add_argument("--json", action="store_true", help="print one JSON line for each image")
    parser.add_argument("--coco", metavar="FILE", help="write all boxes in COCO's format")
    parser.add_argument(
        "--max-boxes", type=positive, default=64, help="of each query (default: 64)"
    )
    add_adapters(parser)
    add_image_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and exits: 0 done, 2 bad input, 130 interrupted."""
    parser = build_parser()
    args = parser.parse_args(argv)
    run_command(parser.prog, lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Does what the arguments ask for; errors are exceptions."""
    urls = [image for image in args.image if image.startswith(("http://", "https://", "data:"))]
    images = [*urls, *find_images([image for image in args.image if image not in urls])]
    options = options_from(args, ImageOptions)

    from ..checkpoints.loading import load
    from ..generation.grounding import detect, draw, to_coco
    from ..prompts.image_source import load_image

    model, processor = load(
        args.model, dtype=args.dtype, revision=args.revision, adapter_path=args.adapter_path
    )
    found: dict[str, Any] = {}
    for image in images:
        try:
            picture = load_image(image)
        except ImageError as error:
            if len(images) == 1:
                raise
            sys.stderr.write(f"{' '.join(str(error).split())}\n")
            continue
        boxes = detect(
            model, processor, picture, args.query, max_boxes=args.max_boxes, image_options=options
        )
        found[image] = picture.size, boxes
        _show(image, picture.size, boxes, args.json)
        if args.draw is not None:
            target = Path(args.draw)
            if len(images) > 1:
                target = target / f"{len(found):04}-{Path(image).stem[:80]}.png"
            data = io.BytesIO()
            draw(picture, boxes).save(data, "PNG")
            _write(target, data.getvalue())
    if args.coco is not None:
        _write(Path(args.coco), json.dumps(to_coco(found), ensure_ascii=False).encode())


def _show(image: str, size: tuple[int, int], boxes: Sequence[Box], as_json: bool) -> None:
    if as_json:
        items = [box.to_dict() for box in boxes]
        entry = {"image": image, "width": size[0], "height": size[1], "boxes": items}
        lines = [json.dumps(entry, ensure_ascii=False)]
    else:
        lines = [f"{image}: {box}" for box in boxes] or [f"{image}: nothing found"]
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


def _write(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all."""
    path = path.expanduser()
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise OutputError(f"{path} cannot be written: {error.strerror}") from None
