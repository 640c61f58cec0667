"""Sizes, tiles and token counts of the official code for 500 random sizes."""

import json

import pytest

from mlx_lfm2vl import ImageProcessorConfig, Lfm2VlImageProcessor

from .conftest import FIXTURES

GEOMETRY = json.loads((FIXTURES / "geometry.json").read_text())


@pytest.mark.parametrize("number", range(len(GEOMETRY["settings"])))
def test_geometry_equals_the_official_code(number):
    config = ImageProcessorConfig(**GEOMETRY["settings"][number])
    processor = Lfm2VlImageProcessor(config)
    tiled = 0
    for (width, height), expected in zip(
        GEOMETRY["sizes"], GEOMETRY["expected"][number], strict=True
    ):
        new_width, new_height, cols, rows, tokens = expected
        layout = processor.layout(height, width)
        assert processor.smart_resize(height, width) == (new_width, new_height)
        assert (layout.cols, layout.rows) == (cols, rows), f"{width}x{height}"
        if (cols, rows) == (1, 1):
            # the official count is that of a view which its pixels do not have
            tokens = 256 + 2
        assert processor.count_image_tokens(width, height) == tokens, f"{width}x{height}"
        tiled += rows > 0
    assert 50 < tiled < len(GEOMETRY["sizes"]) - 50, "tiles or whole views are hardly tested"
