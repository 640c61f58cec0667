"""The command line `python -m mlx_lfm2vl.detect`, also installed as `mlx-lfm2vl-detect`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import ImageError, PromptError
from ..options import ImageOptions
from ..serving.folder import find_images
from .options import (
    add_adapters,
    add_image_options,
    add_images,
    add_model,
    options_from,
    path,
    positive,
    text,
)
from .terminal import Parser, make_parser, one_line, run_command, tell, write

if TYPE_CHECKING:
    from ..generation.grounding import Box

EPILOG = """\
examples:
  %(prog)s --image photo.jpg --query "red car" --draw boxes.png
  %(prog)s --image photos --query cat dog --json --draw drawn --coco boxes.json
"""


def build_parser() -> Parser:
    """The arguments."""
    parser = make_parser(
        "mlx-lfm2vl-detect",
        "Find things in images with LFM2-VL: boxes in pixels, with scores.",
        EPILOG,
    )
    add_model(parser)
    add_adapters(parser)
    add_images(parser, "files, URLs, patterns, or folders", required=True)
    parser.add_argument(
        "--query",
        "-q",
        nargs="+",
        action="extend",
        required=True,
        type=text,
        metavar="TEXT",
        help="what to look for; each is asked about alone",
    )
    parser.add_argument(
        "--draw", type=path, metavar="FILE", help="PNG to write; of several images, a folder"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON line for each image")
    parser.add_argument(
        "--coco", type=path, metavar="FILE", help="write all boxes in COCO's format"
    )
    parser.add_argument(
        "--max-boxes", type=positive, default=64, metavar="N", help="of each query (default: 64)"
    )
    add_image_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and exits: 0 done, 2 bad input, 130 interrupted."""
    parser = build_parser()
    run_command(parser.prog, lambda: run(parser.parse_args(argv)))


def run(args: argparse.Namespace) -> None:
    """Does what the arguments ask for; errors are exceptions."""
    if not all(query.strip() for query in args.query):
        raise PromptError("a query is empty; say what to look for")
    urls = [image for image in args.image if image.startswith(("http:", "https:", "data:"))]
    images = [*urls, *find_images([image for image in args.image if image not in urls])]
    options = options_from(args, ImageOptions)

    from ..checkpoints.writing import complete_file
    from ..generation.grounding import detect, to_coco
    from ..prompts.image_source import load_image
    from .generate import load_model

    model, processor, notice = load_model(args)
    found: dict[str, Any] = {}
    for image in images:
        try:
            picture = load_image(image)
        except ImageError as error:
            if len(images) == 1:
                raise
            tell(one_line(str(error)))
            continue
        notice(picture)
        boxes = detect(
            model, processor, picture, args.query, max_boxes=args.max_boxes, image_options=options
        )
        found[image] = picture.size, boxes
        _show(image, picture.size, boxes, args.json)
        if args.draw is not None:
            name = f"{len(found):04}-{Path(image).stem[:80]}.png"
            _draw(picture, boxes, Path(args.draw) / name if len(images) > 1 else Path(args.draw))
    if args.coco is not None:
        with complete_file(Path(args.coco)) as file:
            file.write_text(json.dumps(to_coco(found), ensure_ascii=False), encoding="utf-8")


def _draw(picture: Any, boxes: Sequence[Box], target: Path) -> None:
    from ..checkpoints.writing import complete_file
    from ..generation.grounding import draw

    with complete_file(target) as file:
        draw(picture, boxes).save(file, "PNG")


def _show(image: str, size: tuple[int, int], boxes: Sequence[Box], as_json: bool) -> None:
    if as_json:
        items = [box.to_dict() for box in boxes]
        entry = {"image": image, "width": size[0], "height": size[1], "boxes": items}
        lines = [json.dumps(entry, ensure_ascii=False)]
    else:
        lines = [f"{image}: {box}" for box in boxes] or [f"{image}: nothing found"]
    write("\n".join(lines) + "\n")
