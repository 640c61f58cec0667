"""Asks a model where things are, and draws the boxes of its answer into the picture.

    python examples/demo/detect.py --image examples/demo/picture.png --query star

The question and the answer have the form of LFM2.5-VL-450M, so `--model` may be that one, too.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps
from world import COLORS, DETECT

from mlx_lfm2vl import Lfm2VlError, generate, load
from mlx_lfm2vl.cli.generate import is_photograph


def parse(answer: str) -> list[dict[str, Any]]:
    """The objects of an answer; a ValueError if it is no array of them."""
    try:
        boxes = json.loads(answer)
        for box in boxes:
            x1, y1, x2, y2 = (float(value) for value in box["bbox"])
            if not (x1 <= x2 and y1 <= y2 and isinstance(box["label"], str)):
                raise ValueError("a box has no extent or no name")
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"the answer is no list of boxes: {answer[:60]}…") from None
    return list(boxes)


def draw(picture: Image.Image, boxes: list[dict[str, Any]]) -> Image.Image:
    """The picture with a frame and a name around each box (x1, y1, x2, y2 from 0 to 1)."""
    zoom = max(1, round(512 / max(picture.size)))
    drawn = picture.resize((picture.width * zoom, picture.height * zoom))
    brush = ImageDraw.Draw(drawn)
    font = ImageFont.load_default(14)
    for i, box in enumerate(boxes):
        x1, y1, x2, y2 = box["bbox"]
        corners = (x1 * drawn.width, y1 * drawn.height, x2 * drawn.width, y2 * drawn.height)
        color = list(COLORS.values())[(i + 2) % len(COLORS)]
        brush.rectangle(corners, outline=color, width=3)
        name = brush.textbbox((corners[0], max(corners[1] - 18, 0)), box["label"], font=font)
        brush.rectangle(name, fill=color)
        brush.text(name[:2], box["label"], fill="white", font=font, anchor="lt")
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a model's boxes into a picture.")
    parser.add_argument("--model", default="demo", help="folder or repository (default: demo)")
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--query", nargs="+", required=True, help="what to look for")
    parser.add_argument("--output", type=Path, default=Path("boxes.png"), help="PNG to write")
    args = parser.parse_args()
    try:
        picture = ImageOps.exif_transpose(Image.open(args.image)).convert("RGB")
        if args.model == "demo" and is_photograph(picture):
            print(
                "(looks like a photograph; the demo model knows only drawn shapes, "
                "--model LiquidAI/LFM2.5-VL-450M knows more)",
                file=sys.stderr,
            )
        model, processor = load(args.model)
        boxes = []
        for query in args.query:
            question = DETECT.format(query=query)
            answer = generate(model, processor, question, images=picture, temperature=0.0)
            boxes += parse(answer)
            print(f"{query}: {answer}")
        draw(picture, boxes).save(args.output)
    except (Lfm2VlError, OSError, ValueError) as error:
        sys.exit(f"detect.py: error: {' '.join(str(error).split())}")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
