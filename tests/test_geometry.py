"""Sizes, tiles and token counts of the official code for 500 random sizes; bad settings."""

import json
import math

import pytest

from mlx_lfm2vl import ConfigError, ImageOptions, ImageProcessorConfig, Lfm2VlImageProcessor
from mlx_lfm2vl.options import IMAGE_BOUNDS
from mlx_lfm2vl.prompts.image_processor import _grids

from .helpers import FIXTURES

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
        if new_width * new_height > 256 * 1024:
            # the official size of a thin image breaks max_image_tokens
            assert max(width, height) > 256 * min(width, height)
            thinner = 256 * 32, 32
            tokens -= new_width * new_height // 1024 - 256
            new_width, new_height = thinner if width > height else thinner[::-1]
        layout = processor.layout(height, width)
        assert processor.smart_resize(height, width) == (new_width, new_height)
        assert (layout.cols, layout.rows) == (cols, rows), f"{width}x{height}"
        if (cols, rows) == (1, 1):
            # the official count is that of a view which its pixels do not have
            tokens = 256 + 2
        assert processor.count_image_tokens(width, height) == tokens, f"{width}x{height}"
        tiled += rows > 0
    assert 50 < tiled < len(GEOMETRY["sizes"]) - 50, "tiles or whole views are hardly tested"


def official_grids(min_tiles, max_tiles):
    """As `Lfm2VlImageProcessor._target_ratios` makes them: slowly."""
    ratios = [
        (w, h)
        for n in range(min_tiles, max_tiles + 1)
        for w in range(1, n + 1)
        for h in range(1, n + 1)
        if min_tiles <= w * h <= max_tiles
    ]
    return sorted(set(ratios), key=lambda x: x[0] * x[1])


def test_grids_come_in_the_official_order():
    for max_tiles in range(1, 21):
        for min_tiles in range(1, max_tiles + 1):
            expected = [grid for grid in official_grids(min_tiles, max_tiles) if max(grid) <= 10]
            assert list(_grids(min_tiles, max_tiles)) == expected, (min_tiles, max_tiles)


def test_a_hundred_tiles_at_most_and_ten_on_a_side():
    processor = Lfm2VlImageProcessor(ImageProcessorConfig(max_tiles=100))
    assert processor.layout(9000, 9000).rows == 10
    for height, width in ((700, 9000), (9000, 700), (5000, 7000)):
        layout = processor.layout(height, width)
        assert max(layout.rows, layout.cols) <= 10
    with pytest.raises(ConfigError, match="max_tiles is 1000; it must be a whole number from 1"):
        ImageOptions(max_tiles=1000)
    with pytest.raises(ConfigError, match="max_tiles is 11; it must be such that a grid"):
        ImageOptions(min_tiles=11, max_tiles=11).apply(ImageProcessorConfig())


ODD = [
    None,
    "no",
    "",
    -1,
    0,
    10**12,
    10**400,
    math.nan,
    math.inf,
    -math.inf,
    1e-300,
    0.5,
    True,
    [],
    {},
]
ODD_THREES = [0.5, None, (), (0.5, 0.5), (0.5, 0.5, None), "abc", (True, 1, 1), (math.nan, 1, 1)]


@pytest.mark.parametrize("name", [*IMAGE_BOUNDS, "image_mean", "image_std"])
def test_settings_of_a_wrong_type_or_size(name):
    """Each is right, or refused in one line that names the setting and its value."""
    triples = [*ODD_THREES, *[(0, 1, 1)] * (name == "image_std")]
    refused = 0
    for value in ODD if name in IMAGE_BOUNDS else triples:
        try:
            ImageProcessorConfig(**{name: value})
            line = None
        except ConfigError as error:
            line = str(error)
        if line is None:
            kind = type(getattr(ImageProcessorConfig(), name))
            assert type(value) is kind or (kind is float and type(value) is int)
            assert kind is bool or math.isfinite(value)
        else:
            refused += 1
            assert line.startswith(f"{name} is {value!r}; it must be ")
            assert "\n" not in line
    assert refused >= 8
