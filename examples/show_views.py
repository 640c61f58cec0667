"""Draws what the model sees of an image: its tiles with their labels, and the thumbnail.

    python examples/show_views.py examples/photos/rocket.jpg views.png --enlarge 3

No model is needed; the settings are those of the published checkpoints.
"""

from __future__ import annotations

import argparse

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mlx_lfm2vl import ImageProcessorConfig, Lfm2VlImageProcessor
from mlx_lfm2vl.prompts.image_processor import ProcessedImage
from mlx_lfm2vl.prompts.image_source import load_image

GAP = 24  # pixels between views


def unpack(processed: ProcessedImage, patch: int) -> list[Image.Image]:
    """The views as pictures, put together again from their patches."""
    pictures, start = [], 0
    for rows, cols in processed.spatial_shapes:
        stop = start + rows * cols
        grid = processed.pixel_values[start:stop].reshape(rows, cols, patch, patch, 3)
        pixels = grid.transpose(0, 2, 1, 3, 4).reshape(rows * patch, cols * patch, 3)
        pictures.append(Image.fromarray(np.ascontiguousarray(pixels)))
        start = stop
    return pictures


def draw(processor: Lfm2VlImageProcessor, image: Image.Image) -> Image.Image:
    """One sheet with all views, each with its label and its number of tokens."""
    processed = processor(image)
    layout, size = processed.layout, processor.config.tile_size
    tokens = processor.view_tokens(layout)
    views = unpack(processed, processor.config.encoder_patch_size)
    grid_width, grid_height = layout.cols * (size + GAP), layout.rows * (size + GAP)
    width, height = layout.whole[::-1] if layout.whole is not None else (0, 0)
    sheet = Image.new("RGB", (GAP + grid_width + width + GAP, GAP + max(grid_height, height + GAP)))
    sheet.paste("white", (0, 0, *sheet.size))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(28)
    for number, (view, count) in enumerate(zip(views, tokens, strict=True)):
        row, col = divmod(number, max(layout.cols, 1))
        place = (GAP + col * (size + GAP), GAP + row * (size + GAP))
        label = f"row {row + 1} col {col + 1}: {count} tokens"
        if number == layout.rows * layout.cols:
            place = (GAP + grid_width, GAP)
            label = f"{'thumbnail' if layout.rows else 'whole image'}: {count} tokens"
        sheet.paste(view, place)
        text = (place[0] + 10, place[1] + 8)
        pen.rectangle(pen.textbbox(text, label, font=font), fill="black")
        pen.text(text, label, fill="white", font=font)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("image")
    parser.add_argument("output")
    parser.add_argument("--enlarge", type=int, default=1, help="times, to see a small photo tiled")
    args = parser.parse_args()
    image = load_image(args.image)
    image = image.resize((image.width * args.enlarge, image.height * args.enlarge))
    processor = Lfm2VlImageProcessor(ImageProcessorConfig())
    draw(processor, image).save(args.output)
    tokens = processor.count_image_tokens(image.width, image.height)
    print(f"{image.width}x{image.height} pixels take {tokens} positions of the prompt")


if __name__ == "__main__":
    main()
