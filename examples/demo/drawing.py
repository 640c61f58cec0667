"""Draws scenes of the demo world: by Pillow, and for tests by matplotlib and as SVG.

All draw the same outlines; what differs is how edges are smoothed, and by whom.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFilter, ImageFont

if TYPE_CHECKING:
    from world import Scene, Thing

Point = tuple[float, float]
Color = tuple[int, int, int]

# per name: what people and programs call so
SHADES: dict[str, tuple[Color, ...]] = {
    "red": ((215, 40, 40), (255, 0, 0), (220, 20, 60), (231, 76, 60), (214, 39, 40)),
    "green": ((35, 150, 60), (0, 128, 0), (0, 220, 0), (44, 160, 44), (46, 204, 113)),
    "blue": ((45, 85, 220), (0, 0, 255), (31, 119, 180), (30, 144, 255), (20, 20, 170)),
    "yellow": ((240, 205, 30), (255, 255, 0), (255, 215, 0), (250, 225, 60)),
    "purple": ((145, 60, 180), (128, 0, 128), (148, 103, 189), (155, 89, 182), (110, 20, 170)),
    "orange": ((245, 130, 25), (255, 165, 0), (255, 127, 14), (230, 126, 34), (255, 140, 0)),
}
ROUND = 72  # corners of a circle


def font(size: float) -> ImageFont.FreeTypeFont:
    """Pillow's own scalable font."""
    chosen = ImageFont.load_default(size)
    assert isinstance(chosen, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return chosen


# ---- outlines


def outlines(kind: str, turn: float, part: float) -> list[list[Point]]:
    """The closed lines around a shape, in the unit square and touching all its sides.

    Args:
        turn: degrees to the right.
        part: how thick or pointed, from 0 to 1; what it means depends on the kind.
    """
    lines = [_turned(line, turn) for line in _plain(kind, part)]
    xs, ys = zip(*lines[0], strict=True)
    left, top, wide, tall = min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)
    return [[((x - left) / wide, (y - top) / tall) for x, y in line] for line in lines]


def proportions(kind: str, turn: float, part: float) -> float:
    """Width over height of a shape."""
    xs, ys = zip(*_turned(_plain(kind, part)[0], turn), strict=True)
    return (max(xs) - min(xs)) / (max(ys) - min(ys))


def _plain(kind: str, part: float) -> list[list[Point]]:
    if kind in ("circle", "ring"):
        inner = [[((0.85 - 0.4 * part) * x, (0.85 - 0.4 * part) * y) for x, y in _circle()]]
        return [_circle(), *(inner if kind == "ring" else [])]
    if kind == "square":
        return [[(-1, -1), (1, -1), (1, 1), (-1, 1)]]
    if kind == "triangle":
        height = 1.6 + 0.5 * part
        return [[(0, -height), (1, 0), (-1, 0)]]
    if kind == "cross":
        a = 0.2 + 0.25 * part
        corner = [(a, -1), (a, -a), (1, -a)]  # of the upper right quarter, and three more
        points: list[Point] = []
        for _ in range(4):
            points += corner
            corner = [(-y, x) for x, y in corner]
        return [points]
    if kind == "star":
        inner = 0.36 + 0.16 * part
        radii = [inner if i % 2 else 1.0 for i in range(10)]
        angles = [math.pi * i / 5 for i in range(10)]
        return [[(r * math.sin(a), -r * math.cos(a)) for r, a in zip(radii, angles, strict=True)]]
    return [[_heart(2 * math.pi * i / 48) for i in range(48)]]


def _circle() -> list[Point]:
    angles = [2 * math.pi * i / ROUND for i in range(ROUND)]
    return [(math.cos(a), math.sin(a)) for a in angles]


def _heart(a: float) -> Point:
    y = 13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)
    return 16 * math.sin(a) ** 3, -y


def _turned(line: list[Point], turn: float) -> list[Point]:
    sine, cosine = math.sin(math.radians(turn)), math.cos(math.radians(turn))
    return [(cosine * x - sine * y, sine * x + cosine * y) for x, y in line]


def _placed(thing: Thing, zoom: float = 1) -> list[list[Point]]:
    x1, y1, x2, y2 = (zoom * value for value in thing.box)
    lines = outlines(thing.kind, thing.turn, thing.part)
    return [[(x1 + x * (x2 - x1), y1 + y * (y2 - y1)) for x, y in line] for line in lines]


# ---- pictures


def draw(scene: Scene, pen: str = "pillow") -> Image.Image:
    """The scene as an RGB picture.

    Args:
        pen: "pillow", with smooth edges or without, outlines, noise and traces of JPEG;
            "matplotlib" or "svg", clean.
    """
    rng = random.Random(scene.seed)
    is_dark = rng.random() < 0.3
    paper = _background(rng, scene.width, scene.height, is_dark)
    things = [(thing, _shade(rng, thing.color)) for thing in scene.shapes]
    picture = PENS[pen](rng, scene, paper, things)
    ink = (250, 250, 250) if is_dark else (15, 15, 15)
    for thing in scene.texts:
        _draw_text(picture, thing, ink)
    return _worn(rng, picture) if pen == "pillow" else picture


Shaded = list[tuple["Thing", Color]]


def _with_pillow(
    rng: random.Random, scene: Scene, paper: Image.Image, things: Shaded
) -> Image.Image:
    zoom = rng.choice((1, 2, 3, 4)) if max(scene.width, scene.height) < 200 else rng.choice((1, 2))
    layer = Image.new("RGBA", (scene.width * zoom, scene.height * zoom), (0, 0, 0, 0))
    mask = Image.new("L", layer.size)
    edge = rng.choice((None, None, None, (0, 0, 0), (255, 255, 255), (90, 90, 90)))
    for thing, color in things:
        mask.paste(0, (0, 0, *mask.size))
        brush, lines = ImageDraw.Draw(mask), _placed(thing, zoom)
        # a pixel is filled from its corner: what ends at 10.0 fills up to pixel 9
        for line, fill in zip(lines, (255, 0), strict=False):
            brush.polygon([(x - 0.5, y - 0.5) for x, y in line], fill=fill)
        layer.paste(color, (0, 0), mask)
        if edge is not None:
            for line in lines:
                width = max(1, round(0.02 * zoom * (thing.box[2] - thing.box[0])))
                inner = _shrunk(line, 0.5 * width)
                ImageDraw.Draw(layer).line([*inner, inner[0]], fill=edge, width=width)
    layer = layer.resize(paper.size, Image.Resampling.BOX)
    paper.paste(layer, (0, 0), layer)
    return paper


def _shrunk(line: list[Point], by: float) -> list[Point]:
    """A line moved towards its middle, so that a pen along it stays inside."""
    xs, ys = zip(*line, strict=True)
    x0, y0 = (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2
    wide, tall = (max(xs) - min(xs)) / 2, (max(ys) - min(ys)) / 2
    sx, sy = max(0.0, 1 - by / wide), max(0.0, 1 - by / tall)
    return [(x0 + sx * (x - x0), y0 + sy * (y - y0)) for x, y in line]


def _with_svg(rng: random.Random, scene: Scene, paper: Image.Image, things: Shaded) -> Image.Image:
    import resvg_py

    parts = []
    for thing, color in things:
        lines = (" L".join(f"{x:.2f},{y:.2f}" for x, y in line) for line in _placed(thing))
        path = " ".join(f"M{line} Z" for line in lines)
        parts.append(f'<path d="{path}" fill="rgb{color}" fill-rule="evenodd"/>')
    size = f'width="{scene.width}" height="{scene.height}"'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{"".join(parts)}</svg>'
    layer = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")
    paper.paste(layer, (0, 0), layer)
    return paper


def _with_matplotlib(
    rng: random.Random, scene: Scene, paper: Image.Image, things: Shaded
) -> Image.Image:
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    figure = Figure(figsize=(scene.width / 100, scene.height / 100), dpi=100)
    canvas, axes = FigureCanvasAgg(figure), figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, scene.width)
    axes.set_ylim(scene.height, 0)
    axes.imshow(paper, extent=(0, scene.width, scene.height, 0), aspect="auto")
    for thing, color in things:
        lines = _placed(thing)
        # a hole goes round the other way
        parts = [Path([*line, line[0]][:: 1 if i == 0 else -1]) for i, line in enumerate(lines)]
        shade = tuple(value / 255 for value in color)
        axes.add_patch(PathPatch(Path.make_compound_path(*parts), facecolor=shade, linewidth=0))
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy()).resize(paper.size)


PENS: dict[str, Callable[[random.Random, Scene, Image.Image, Shaded], Image.Image]] = {
    "pillow": _with_pillow,
    "svg": _with_svg,
    "matplotlib": _with_matplotlib,
}


def _shade(rng: random.Random, name: str) -> Color:
    red, green, blue = (_clip(v + rng.randint(-10, 10)) for v in rng.choice(SHADES[name]))
    return red, green, blue


def _background(rng: random.Random, width: int, height: int, is_dark: bool) -> Image.Image:
    gray = rng.randint(0, 60) if is_dark else rng.choice((255, rng.randint(185, 250)))
    tint = 0 if gray == 255 else 14
    base = tuple(_clip(gray + rng.randint(-tint, tint)) for _ in range(3))
    other = tuple(_clip(value + rng.randint(-22, 22)) for value in base)
    picture = Image.new("RGB", (width, height), base)
    brush = ImageDraw.Draw(picture)
    style = rng.choice(("plain", "plain", "plain", "gradient", "stripes", "dots"))
    if style == "gradient":
        for y in range(height):
            mixed = (round(a + (b - a) * y / height) for a, b in zip(base, other, strict=True))
            brush.line((0, y, width, y), fill=tuple(mixed))
    step = rng.randint(8, 20) * max(1, min(width, height) // 130)
    if style == "stripes":
        for x in range(0, width + height, 2 * step):
            brush.line((x, 0, x - height, height), fill=other, width=step // 2)
    if style == "dots":
        for x in range(0, width, step):
            for y in range(0, height, step):
                brush.ellipse((x, y, x + step // 5, y + step // 5), fill=other)
    return picture


def _worn(rng: random.Random, picture: Image.Image) -> Image.Image:
    """What cameras and files do to pictures: some blur, noise, or traces of JPEG."""
    kind = rng.choice(("clean", "clean", "clean", "blur", "noise", "jpeg"))
    if kind == "blur":
        return picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 0.9)))
    if kind == "noise":
        noise = Image.frombytes(
            "RGB", picture.size, rng.randbytes(3 * picture.width * picture.height)
        )
        return Image.blend(picture, noise, rng.uniform(0.02, 0.08))
    if kind == "jpeg":
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=rng.randint(45, 85))
        return Image.open(file).convert("RGB")
    return picture


def _clip(value: float) -> int:
    return max(0, min(255, round(value)))


def _draw_text(picture: Image.Image, thing: Thing, ink: Color) -> None:
    x1, y1, x2, _ = thing.box
    low, high = 4.0, 4.0 * picture.height
    while high - low > 0.1:  # the size whose box is that of the thing
        size = (low + high) / 2
        left, _, right, _ = font(size).getbbox(thing.text)
        low, high = (low, size) if right - left > x2 - x1 else (size, high)
    left, top, _, _ = font(low).getbbox(thing.text)
    ImageDraw.Draw(picture).text((x1 - left, y1 - top), thing.text, fill=ink, font=font(low))
