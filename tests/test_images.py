"""Odd but good images, the layout of views, and what an image costs."""

import base64
import io
import sys

import numpy as np
import pytest
from PIL import Image, ImageColor

from mlx_lfm2vl import ImageError, ImageOptions, ImageProcessorConfig, Lfm2VlImageProcessor
from mlx_lfm2vl.prompts.image_processor import ImageLayout
from mlx_lfm2vl.prompts.image_source import load_image

PROCESSOR = Lfm2VlImageProcessor(ImageProcessorConfig())


def gradient(width=60, height=40) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def through_file(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "LA", "RGBA", "YCbCr", "HSV", "F", "I"])
def test_every_mode_becomes_rgb_as_pillow_converts(mode):
    image = gradient().convert("L" if mode in ("LA", "F", "I") else "RGB").convert(mode)
    assert np.array_equal(load_image(image), image.convert("RGB"))


def test_sixteen_bit_grey_keeps_its_picture():
    values = np.linspace(0, 65535, 400).reshape(20, 20).astype(np.uint16)
    loaded = np.asarray(load_image(through_file(Image.fromarray(values), "PNG")))
    assert np.abs(loaded[..., 0].astype(int) - values // 256).max() <= 1


def test_palette_with_transparency():
    image = gradient().quantize(8)
    data = through_file(image, "PNG", transparency=0)
    assert np.array_equal(load_image(data), image.convert("RGB"))


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (30, 20), color) for color in ("red", "blue")]
    data = through_file(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(load_image(data))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = gradient()
    exif = Image.Exif()
    exif[0x0112] = orientation
    turn = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = upright if turn is None else upright.transpose(turn)
    assert np.array_equal(load_image(through_file(stored, "PNG", exif=exif)), upright)


@pytest.mark.parametrize("kind", ["path", "bytes", "file"])
def test_heic_with_the_extra(kind, tmp_path):
    heif = pytest.importorskip("pillow_heif", reason="needs the extra heic")
    path = tmp_path / "photo.heic"
    heif.from_pillow(gradient(64, 48)).save(path, quality=-1)
    source = {"path": path, "bytes": path.read_bytes(), "file": io.BytesIO(path.read_bytes())}[kind]
    difference = np.abs(np.asarray(load_image(source)).astype(int) - np.asarray(gradient(64, 48)))
    assert difference.max() < 16  # chroma is stored at half size


def test_heic_without_the_extra(tmp_path, monkeypatch):
    from PIL import Image as pillow

    monkeypatch.setattr(pillow, "OPEN", {})
    monkeypatch.setattr(pillow, "ID", [])
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match="HEIC needs pillow-heif"):
        load_image(b"\0\0\0\x18ftypheic" + bytes(100))


def test_the_same_image_from_every_source(tmp_path):
    image = gradient()
    data = through_file(image, "PNG")
    (tmp_path / "a.png").write_bytes(data)
    sources = [
        image,
        np.asarray(image),
        data,
        io.BytesIO(data),
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        "data:image/png;base64," + base64.b64encode(data).decode(),
    ]
    for source in sources:
        assert np.array_equal(load_image(source), image)
    grey = np.asarray(image)[..., 0]
    assert np.array_equal(load_image(grey[..., None]), load_image(grey))


def test_spellings_of_image_items(tmp_path, loaded):
    path = str(tmp_path / "a.png")
    gradient().save(path)
    processor = loaded()[1]
    prompts = [
        processor([{"role": "user", "content": [item, {"type": "text", "text": "What?"}]}])
        for item in (
            {"type": "image", "image": path},
            {"type": "image", "url": path},
            {"type": "image", "path": path},
            {"type": "image_url", "image_url": {"url": path}},
            {"type": "image_url", "image_url": path},
        )
    ]
    for prompt in prompts:
        assert prompt.token_ids == prompts[0].token_ids
        assert np.array_equal(prompt.pixel_values, prompts[0].pixel_values)
        assert len(prompt.images) == 1


@pytest.mark.parametrize(
    ("size", "layout"),
    [
        ((300, 420), ImageLayout(0, 0, (416, 288))),
        ((512, 512), ImageLayout(0, 0, (512, 512))),
        ((900, 1400), ImageLayout(3, 2, (608, 384))),
        ((2000, 1000), ImageLayout(2, 4, (352, 704))),
        ((5, 7), ImageLayout(0, 0, (320, 224))),
        ((10_000, 40), ImageLayout(0, 0, (32, 8064))),
        ((12_000, 40), ImageLayout(0, 0, (32, 8192))),
        ((40, 12_000), ImageLayout(0, 0, (8192, 32))),
        ((1, 10**7), ImageLayout(10, 1, (8192, 32))),
    ],
)
def test_layout_of_known_sizes(size, layout):
    width, height = size
    assert PROCESSOR.layout(height, width) == layout


@pytest.mark.parametrize("size", [(12_000, 40), (5, 7), (1, 1), (700, 900), (1400, 500)])
def test_count_equals_what_processing_gives(size):
    processed = PROCESSOR(Image.new("RGB", size))
    patches = sum(rows * cols for rows, cols in processed.spatial_shapes)
    assert processed.pixel_values.shape == (patches, 768)
    assert processed.pixel_values.dtype == np.uint8
    tokens = PROCESSOR.view_tokens(processed.layout)
    assert sum(tokens) == patches // 4
    tiles = processed.layout.rows * processed.layout.cols
    marks = 2 + (tiles + 1 if tiles > 1 else 0)
    assert PROCESSOR.count_image_tokens(*size) == sum(tokens) + marks


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        # 1400x900: 3 columns, 2 rows of 256 tokens, a thumbnail of 240, 7 marks, start and end
        (ImageOptions(), 6 * 256 + 228 + 7 + 2),
        (ImageOptions(use_thumbnail=False), 6 * 256 + 6 + 2),
        (ImageOptions(do_image_splitting=False), 228 + 2),
        (ImageOptions(max_tiles=1, min_tiles=1), 228 + 2),
        (ImageOptions(max_pixels_tolerance=10.0), 228 + 2),
        (ImageOptions(use_image_special_tokens=False), 6 * 256 + 228),
        (ImageOptions(tile_size=256), 6 * 64 + 228 + 7 + 2),
        (ImageOptions(min_tiles=2, max_tiles=4), 2 * 256 + 228 + 3 + 2),
        (ImageOptions(max_image_tokens=64, do_image_splitting=False), 54 + 2),
    ],
)
def test_every_switch_is_honoured(options, tokens):
    assert PROCESSOR.count_image_tokens(1400, 900, options) == tokens
    processed = PROCESSOR(Image.new("RGB", (1400, 900)), options)
    assert sum(PROCESSOR.view_tokens(processed.layout, options)) == len(processed.pixel_values) // 4


def test_min_image_tokens_makes_small_images_larger():
    few = PROCESSOR.count_image_tokens(40, 40, ImageOptions(min_image_tokens=4))
    assert few == 4 + 2
    assert PROCESSOR.count_image_tokens(40, 40) == 64 + 2


def test_a_grid_of_one_tile_counts_what_it_shows():
    """With min_tiles 1 a nearly square image becomes a single tile without a thumbnail."""
    options = ImageOptions(min_tiles=1)
    processed = PROCESSOR(Image.new("RGB", (725, 721)), options)
    assert processed.layout == ImageLayout(1, 1, None)
    assert PROCESSOR.count_image_tokens(725, 721, options) == 256 + 2
    assert len(processed.pixel_values) == 4 * 256


def test_tiles_come_row_by_row_and_the_thumbnail_last():
    colors = [["red", "lime", "blue"], ["white", "black", "yellow"]]
    image = Image.new("RGB", (3 * 512, 2 * 512))
    for row, line in enumerate(colors):
        for col, color in enumerate(line):
            image.paste(color, (col * 512, row * 512, (col + 1) * 512, (row + 1) * 512))
    processed = PROCESSOR(image)
    views = np.split(processed.pixel_values, np.arange(1, 7) * 1024)
    for view, color in zip(views, colors[0] + colors[1], strict=False):
        middle = view.reshape(32, 32, 16, 16, 3)[16, 16, 8, 8]
        assert middle.tolist() == list(ImageColor.getrgb(color))
    assert processed.spatial_shapes[-1] == (26, 38)


def test_patches_hold_row_column_channel():
    image = gradient(512, 512)
    processed = PROCESSOR(image)
    pixels = np.asarray(image)
    patch = processed.pixel_values.reshape(32, 32, 16, 16, 3)[3, 5]
    assert np.array_equal(patch, pixels[48:64, 80:96])
