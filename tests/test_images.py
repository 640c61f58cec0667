"""Odd but good images, the layout of views, and what an image costs."""

import base64
import contextlib
import io
import os
import random
import resource
import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import Image, ImageColor

from mlx_lfm2vl import ImageError, ImageOptions, ImageProcessorConfig, Lfm2VlImageProcessor
from mlx_lfm2vl.errors import one_line
from mlx_lfm2vl.prompts import image_processor, image_source
from mlx_lfm2vl.prompts.image_processor import ImageLayout
from mlx_lfm2vl.prompts.image_source import FORMATS, image_size, load_image

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


@pytest.mark.parametrize("order", ["<", ">"])
def test_sixteen_bit_tiff_of_either_byte_order(order):
    values = np.linspace(0, 65535, 400).reshape(20, 20).astype(f"{order}u2")
    mode = {"<": "I;16", ">": "I;16B"}[order]
    data = through_file(Image.frombytes(mode, (20, 20), values.tobytes()), "TIFF")
    assert data[:2] == {"<": b"II", ">": b"MM"}[order]
    assert np.array_equal(np.asarray(load_image(data))[..., 0], values >> 8)


@pytest.mark.parametrize("transparency", [0, bytes(range(8))])
def test_palette_with_transparency(transparency):
    image = gradient().quantize(8)
    data = through_file(image, "PNG", transparency=transparency)
    assert np.array_equal(load_image(data), image.convert("RGB"))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG", "TIFF"])
@pytest.mark.parametrize("junk", [b"", b"II*\0\xff\xff\xff\xff", b"MM\0*", b"junk" * 9])
def test_junk_as_exif_beside_a_good_picture(kind, junk):
    exif = {} if kind == "TIFF" else {"exif": b"Exif\0\0" + junk}
    data = through_file(gradient(), kind, **exif)
    assert image_size(data) == load_image(data).size == (60, 40)


def test_pillow_warns_of_nothing(capsys):
    large = through_file(Image.new("1", (10_000, 10_000)), "PNG")
    palette = through_file(gradient().quantize(8), "PNG", transparency=bytes(range(8)))
    exif = through_file(gradient(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for data in (palette, exif):
            load_image(data)
        image_size(large)
        warnings.warn("another's", stacklevel=1)
    assert [str(warning.message) for warning in told] == ["another's"]


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (30, 20), color) for color in ("red", "blue")]
    data = through_file(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(load_image(data))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])  # Pillow turns TIFF by itself
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(orientation, kind):
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
    data = through_file(stored, kind, exif=exif)
    assert image_size(data) == upright.size
    assert np.array_equal(load_image(data), upright)
    assert np.array_equal(load_image(load_image(data)), upright)


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
        # as many programs write it
        "data:image/png;BASE64," + base64.urlsafe_b64encode(data).decode().rstrip("="),
    ]
    for source in sources:
        assert np.array_equal(load_image(source), image)
    grey = np.asarray(image)[..., 0]
    assert np.array_equal(load_image(grey[..., None]), load_image(grey))


@pytest.mark.parametrize("kind", ["EPS", "PDF", "TGA", "JPEG2000", "PCX", "XBM"])
def test_other_formats_stay_closed(kind, tmp_path):
    """None of them is opened, whatever its name; EPS would start Ghostscript."""
    path = tmp_path / "photo.jpg"
    gradient().convert("1" if kind == "XBM" else "RGB").save(path, kind)
    for read in (load_image, image_size):
        for source in (path, path.read_bytes(), io.BytesIO(path.read_bytes())):
            with pytest.raises(ImageError, match=r"is not an image of a known format \(JPEG, PNG"):
                read(source)


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind != "HEIF"])
def test_known_formats(kind):
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow has no {kind}")
    data = through_file(gradient(48, 48), kind)
    assert image_size(data) == load_image(data).size == (48, 48)


def test_the_size_of_files_is_bounded_wherever_they_lie(tmp_path, monkeypatch):
    path = tmp_path / "large.png"
    with path.open("wb") as file:
        file.truncate(257 * 2**20)
    with pytest.raises(ImageError, match=r"large\.png cannot be read: it has more than 268435456"):
        load_image(path)
    data = through_file(gradient(), "PNG")
    monkeypatch.setattr(image_source, "MAX_FILE_BYTES", len(data) - 1)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    for source in (data, bytearray(data), io.BytesIO(data), url):
        with pytest.raises(ImageError, match="more than"):
            load_image(source)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("pipe", "a pipe or a device"), ("zero", "a pipe or a device"), ("folder", "a folder")],
)
def test_only_regular_files_are_opened(name, reason, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ImageError, match=f"{name} cannot be read: it is {reason}"):
        load_image(tmp_path / name)


def test_sides_are_bounded():
    for size in ((2**24 + 1, 1), (1, 2**24 + 1)):
        with pytest.raises(ImageError, match="a side has 16777217 pixels; at most 16777216"):
            image_size(through_file(Image.new("1", size), "PNG"))


PARTS = [
    *[
        "~",
        "~nosuch",
        "~nosuch\0",
        "~root",
        "file.png",
        "folder",
        "pipe",
        "zero",
        "nowhere",
        "loop",
    ],
    *["x" * 300, "é" * 200, "\0", "a\nb", "\udcff", "\x1b[31m", "", " ", ".", "..", "/", "-", "%"],
    *["http:", "data:", "file:", "CON", "a" * 5000, "\u202ex", "\u2028", "*", "?", "{}", "$HOME"],
]


def test_three_hundred_odd_paths(tmp_path, monkeypatch):
    """Good files with odd names are read; everything else is one line that names the path."""
    monkeypatch.chdir(tmp_path)
    good = through_file(gradient(), "PNG")
    (tmp_path / "file.png").write_bytes(good)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "folder" / "pipe")
    for name, target in (("zero", "/dev/zero"), ("nowhere", "nothing"), ("loop", "loop")):
        (tmp_path / name).symlink_to(target)
    rng, read = random.Random(3), 0
    for number in range(300):
        count = rng.randint(1, 3)
        path = rng.choice(["/", ""]).join(rng.choice(PARTS) for _ in range(count))
        if number % 5 == 0:  # a good file of this name, if there can be one
            with contextlib.suppress(OSError, ValueError):
                file = open(path, "xb")  # noqa: SIM115
                with file:
                    file.write(good)
        try:
            assert load_image(path).size == image_size(path) == (60, 40)
            read += 1
        except ImageError as error:
            line = str(error)
        else:
            continue
        assert "\n" not in line
        assert line.isprintable()
        assert "data URL" in line if path.startswith("data:") else one_line(path) in line
        with pytest.raises(ImageError):
            image_size(path)
    assert read > 20
    for name in ("~x.png", "~nosuch", "a\nb.png", "\x1b.png", "é" * 120):
        (tmp_path / name).write_bytes(good)
        assert load_image(name).size == (60, 40)


def mutants(rng, count):
    """Damaged pictures of all formats, most of them still with their first bytes."""
    Image.init()
    exif = Image.Exif()
    exif[0x0112] = 6
    seeds = []
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "AVIF"):
        if kind in Image.SAVE:
            seeds.append(through_file(gradient(), kind, exif=exif))
    seeds.append(through_file(gradient().quantize(9), "PNG", transparency=bytes(range(9))))
    seeds.append(through_file(gradient().quantize(9), "GIF", save_all=True))
    seeds.append(through_file(gradient(), "TIFF", compression="tiff_lzw"))
    seeds.append(through_file(gradient(), "JPEG", progressive=True))
    for _ in range(count):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.choice([1, 1, 3, 30])):
            place = rng.randrange(rng.choice([len(data), min(len(data), 120)]))
            action = rng.randrange(5)
            if action == 0:
                data[place] = rng.randrange(256)
            elif action == 1:
                data[place : place + 4] = rng.choice([b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff"])
            elif action == 2:
                data[place:place] = rng.randbytes(rng.randint(1, 9))
            elif action == 3 and len(data) > 100:
                del data[place : place + rng.randint(1, 9)]
            elif rng.random() < 0.2:
                del data[max(place, 20) :]
        yield bytes(data)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def test_six_hundred_damaged_pictures(tmp_path):
    """Each is a picture or one line that names the file, and none takes much memory."""
    path = tmp_path / "damaged.png"
    before, pictures, lines = peak_bytes(), 0, set()
    for data in mutants(random.Random(11), 600):
        path.write_bytes(data)
        for read in (load_image, image_size):
            try:
                size = read(path)
                pictures += 1
                assert min(size if read is image_size else size.size) > 0
            except ImageError as error:
                lines.add(str(error))
    assert pictures > 200
    assert len(lines) > 20
    for line in lines:
        assert line.startswith(f"{path} ")
        assert "\n" not in line
        assert line.isprintable()
    assert peak_bytes() - before < 2 * 10**9


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


@pytest.mark.parametrize("resample", [2, 3])
@pytest.mark.parametrize("size", [(1, 40_000), (30, 40_000), (3, 1_200_000), (1_200_000, 1)])
def test_thin_pictures_look_the_same_in_either_order(size, resample, monkeypatch):
    processor = Lfm2VlImageProcessor(ImageProcessorConfig(resample=resample))
    height = np.arange(max(size))[:, None]
    pixels = 127 + 120 * np.sin(height / max(size) * np.array([20, 300, 2000]))
    strip = Image.fromarray(np.repeat(pixels.astype(np.uint8)[:, None], min(size), axis=1))
    strip = strip if size[1] > size[0] else strip.transpose(Image.Transpose.TRANSPOSE)
    bounded = processor(strip).pixel_values.astype(int)
    if size[0] * size[1] < 2_000_000:
        monkeypatch.setattr(image_processor, "MOST_PIXELS", 2**40)
    monkeypatch.setattr(image_processor, "LONG_SIDE", 2**40)
    assert np.abs(processor(strip).pixel_values - bounded).max() <= 1


def test_normal_pictures_are_resized_as_before(monkeypatch):
    """Neither bound touches a picture that is not a thin line."""
    monkeypatch.setattr(Image.Image, "reduce", None)
    heights = []
    resize = Image.Image.resize

    def watched(image, size, resample):
        heights.append(size[1] == image.height)
        return resize(image, size, resample)

    monkeypatch.setattr(Image.Image, "resize", watched)
    for size in ((4000, 3000), (300, 9000), (60, 16_384), (9000, 300), (7, 5)):
        PROCESSOR(Image.new("RGB", size))
        assert heights[0], size
        heights.clear()


@pytest.mark.parametrize("ratio", [1, 10, 200, 257, 10**4, 10**7])
@pytest.mark.parametrize("most", [64, 100, 256])
def test_max_image_tokens_holds_for_the_thinnest(ratio, most):
    options = ImageOptions(min_image_tokens=16, max_image_tokens=most)
    for size in ((1, ratio), (ratio, 1)):
        assert PROCESSOR.plan(*size, options).view_tokens[-1] <= most


THIN = """
import resource, sys, time
from pathlib import Path
from PIL import Image
from mlx_lfm2vl import ImageProcessorConfig, Lfm2VlImageProcessor

def peak():
    status = Path("/proc/self/status")  # Linux counts the parent's memory in ru_maxrss
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024

processor = Lfm2VlImageProcessor(ImageProcessorConfig(resample=3))
processor(Image.new("RGB", (700, 900)))
before, start = peak(), time.perf_counter()
image = processor(sys.argv[1])
print(sum(image.view_tokens), time.perf_counter() - start, peak() - before)
"""


@pytest.mark.parametrize("size", [(1, 10**7), (10**7, 1)])
def test_a_line_of_ten_million_pixels_costs_little(size, tmp_path):
    path = tmp_path / "thin.png"
    Image.new("RGB", size, "red").save(path)
    assert path.stat().st_size < 40_000
    run = [sys.executable, "-c", THIN, path]
    out = subprocess.run(run, capture_output=True, text=True, check=True, timeout=60).stdout
    tokens, seconds, memory = map(float, out.split())
    assert tokens == 10 * 256 + 256
    assert seconds < 5  # half a second on a machine that does nothing else
    assert memory < 200e6
