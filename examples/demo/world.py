"""The demo world: small drawn pictures, and questions about them whose answers are known.

    python examples/demo/world.py --split train --count 40000 --output world/train

Pictures show coloured shapes and printed words or numbers on varied backgrounds. A picture, its
questions and their answers follow from the name of the split and a number alone, so the splits
share no picture.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
NEW_SHAPE = "heart"  # never drawn for the demo model: adapters can teach it
COLORS = {
    "red": (215, 40, 40),
    "green": (35, 150, 60),
    "blue": (45, 85, 220),
    "yellow": (240, 205, 30),
    "purple": (145, 60, 180),
    "orange": (245, 130, 25),
}
# fmt: off
WORDS = (
    "ANT", "BEE", "BOX", "BUS", "CAT", "CUP", "DOG", "EGG", "FOX", "HAT", "JAM", "KEY", "MAP",
    "NUT", "OWL", "PIG", "SUN", "TEA", "VAN", "ZOO", "BIRD", "CAKE", "DOOR", "FISH", "GOLD",
    "HAND", "KITE", "LAMP", "MOON", "NEST", "RAIN", "SHIP", "TREE", "WOLF",
)
# fmt: on
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
TASKS = ("describe", "count", "colour", "where", "read", "detect", "compare")
MAP = "map"  # asked in training only: what stands where teaches a model to look there

DETECT = (
    "Detect all instances of: {query}. Response must be a JSON array: "
    '[{{"label": ..., "bbox": [x1, y1, x2, y2]}}, ...]. Coordinates are normalized to [0,1].'
)
PHRASES = {
    "describe": ("What is in this image?", "Describe the picture."),
    "colour": ("What colour is the {0}?", "Which colour does the {0} have?"),
    "where": ("Where is the {0}?",),
    "read": ("What does the picture say?", "What is written here?"),
    "count": ("How many {0} are there?",),
    MAP: ("Map the picture.",),
}

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Thing:
    """A shape with its colour, or a text; the box is (x1, y1, x2, y2) in pixels."""

    kind: str  # one of SHAPES, "word" or "number"
    color: str
    text: str
    box: Box

    @property
    def is_text(self) -> bool:
        return self.kind in ("word", "number")

    @property
    def name(self) -> str:
        return self.kind if self.is_text else f"{self.color} {self.kind}"

    @property
    def center(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn; things stand from left to right."""

    width: int
    height: int
    things: tuple[Thing, ...]
    seed: int

    @property
    def shapes(self) -> tuple[Thing, ...]:
        return tuple(thing for thing in self.things if not thing.is_text)

    @property
    def texts(self) -> tuple[Thing, ...]:
        return tuple(thing for thing in self.things if thing.is_text)


@dataclass(frozen=True)
class Example:
    """Pictures, the task of the first question, and the turns about them."""

    pictures: tuple[Image.Image, ...]
    scenes: tuple[Scene, ...]
    task: str
    turns: tuple[tuple[str, str], ...]


def font(size: float) -> ImageFont.FreeTypeFont:
    """Pillow's own scalable font."""
    chosen = ImageFont.load_default(size)
    assert isinstance(chosen, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return chosen


# ---- scenes


def make_scene(
    rng: random.Random,
    large: bool = False,
    text: bool = False,
    shapes: Sequence[str] = SHAPES,
    least: int = 0,
    most: int = 4,
) -> Scene:
    """Draws up a scene: its size, and things that do not touch.

    Args:
        large: big enough to be cut into tiles by the demo model's processor.
        text: with a word or a number.
        shapes: kinds to choose from.
        least, most: bounds of how many shapes.
    """
    width, height = _size(rng, large)
    count = rng.choices((1, 2, 3, 4), (3, 4, 4, 2))[0] - (1 if text else 0)
    count = min(max(least, count), most)
    kinds, colors = list(shapes), list(COLORS)
    if rng.random() < 0.5:  # few kinds, so that some come twice
        kinds, colors = rng.sample(kinds, min(2, len(kinds))), rng.sample(colors, 3)
    things: list[Thing] = []
    if text:
        things.append(_place_text(rng, width, height, large))
    for _ in range(count):
        thing = _place_shape(rng, width, height, rng.choice(kinds), rng.choice(colors), things)
        if thing is not None:
            things.append(thing)
    ordered = sorted(things, key=lambda thing: thing.center[0])
    return Scene(width, height, tuple(ordered), rng.randrange(2**31))


def _size(rng: random.Random, large: bool) -> tuple[int, int]:
    while True:
        low, high = (200, 320) if large else (96, 176)
        width, height = rng.randint(low, high), rng.randint(low, high)
        rounded = round(width / 32) * round(height / 32)
        if (rounded > 32) == large and 0.6 < width / height < 1.7:
            return width, height


def _place_text(rng: random.Random, width: int, height: int, large: bool) -> Thing:
    is_word = rng.random() < 0.6
    text = rng.choice(WORDS) if is_word else str(rng.randint(10, 99))
    share = rng.uniform(0.16, 0.26) if large else rng.uniform(0.24, 0.34)
    size = share * min(width, height)
    x1, y1, x2, y2 = font(size).getbbox(text)
    if x2 - x1 > 0.9 * width:
        size *= 0.9 * width / (x2 - x1)
        x1, y1, x2, y2 = font(size).getbbox(text)
    left = rng.uniform(0.03 * width, 0.97 * width - (x2 - x1))
    top = rng.uniform(0.03 * height, 0.97 * height - (y2 - y1))
    box = (left, top, left + x2 - x1, top + y2 - y1)
    return Thing("word" if is_word else "number", "", text, box)


def _place_shape(
    rng: random.Random, width: int, height: int, kind: str, color: str, others: Sequence[Thing]
) -> Thing | None:
    for _ in range(60):
        side = rng.uniform(0.24, 0.38) * min(width, height)
        tall = side * rng.uniform(0.85, 1.15) if kind in ("square", "triangle") else side
        left = rng.uniform(0.02 * width, 0.98 * width - side)
        top = rng.uniform(0.02 * height, 0.98 * height - tall)
        thing = Thing(kind, color, "", (left, top, left + side, top + tall))
        if all(_apart(thing, other, width, height) for other in others):
            return thing
    return None  # no room left


def _apart(a: Thing, b: Thing, width: int, height: int) -> bool:
    gap = 0.02 * min(width, height)
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a.box, b.box
    overlap = ax1 < bx2 + gap and bx1 < ax2 + gap and ay1 < by2 + gap and by1 < ay2 + gap
    # "from left to right" must be plain to see
    return not overlap and abs(a.center[0] - b.center[0]) > 0.1 * width


# ---- pictures


def draw(scene: Scene) -> Image.Image:
    """The scene as an RGB picture, drawn fourfold and shrunk for smooth edges."""
    rng = random.Random(scene.seed)
    is_dark = rng.random() < 0.35
    picture = _background(rng, scene.width, scene.height, is_dark)
    zoom = 4
    layer = Image.new("RGBA", (scene.width * zoom, scene.height * zoom), (0, 0, 0, 0))
    brush = ImageDraw.Draw(layer)
    for thing in scene.shapes:
        color = tuple(_clip(value + rng.randint(-12, 12)) for value in COLORS[thing.color])
        x1, y1, x2, y2 = (zoom * value for value in thing.box)
        _draw_shape(brush, thing.kind, (x1, y1, x2, y2), color)
    layer = layer.resize(picture.size, Image.Resampling.BOX)
    picture.paste(layer, (0, 0), layer)
    ink = (250, 250, 250) if is_dark else (15, 15, 15)
    for thing in scene.texts:
        _draw_text(picture, thing, ink)
    return picture


def _background(rng: random.Random, width: int, height: int, is_dark: bool) -> Image.Image:
    low, high = (10, 60) if is_dark else (190, 245)
    base = [rng.randint(low, high)] * 3
    base = [_clip(value + rng.randint(-10, 10)) for value in base]
    other = [_clip(value + rng.randint(-22, 22)) for value in base]
    picture = Image.new("RGB", (width, height), tuple(base))
    brush = ImageDraw.Draw(picture)
    style = rng.choice(("plain", "plain", "gradient", "stripes", "dots"))
    if style == "gradient":
        for y in range(height):
            share = y / height
            mixed = tuple(round(a + (b - a) * share) for a, b in zip(base, other, strict=True))
            brush.line((0, y, width, y), fill=mixed)
    step = rng.randint(8, 20)
    if style == "stripes":
        for x in range(0, width + height, 2 * step):
            brush.line((x, 0, x - height, height), fill=tuple(other), width=step // 2)
    if style == "dots":
        for x in range(0, width, step):
            for y in range(0, height, step):
                brush.ellipse((x, y, x + 2, y + 2), fill=tuple(other))
    return picture


def _clip(value: float) -> int:
    return max(0, min(255, round(value)))


def _draw_shape(brush: ImageDraw.ImageDraw, kind: str, box: Box, color: tuple[int, ...]) -> None:
    x1, y1, x2, y2 = box
    width, height = x2 - x1, y2 - y1
    if kind == "circle":
        brush.ellipse(box, fill=color)
    elif kind == "ring":
        brush.ellipse(box, outline=color, width=round(width * 0.2))
    elif kind == "square":
        brush.rectangle(box, fill=color)
    elif kind == "cross":
        third = width / 3
        brush.rectangle((x1 + third, y1, x2 - third, y2), fill=color)
        brush.rectangle((x1, y1 + third, x2, y2 - third), fill=color)
    else:
        corners = _corners(kind)
        brush.polygon([(x1 + x * width, y1 + y * height) for x, y in corners], fill=color)


def _corners(kind: str) -> list[tuple[float, float]]:
    """Corners of a polygon that touches all four sides of the unit square."""
    if kind == "triangle":
        return [(0.5, 0.0), (1.0, 1.0), (0.0, 1.0)]
    if kind == "star":
        angles = [math.pi * i / 5 for i in range(10)]
        points = [
            (
                (0.45 if i % 2 else 1.0) * math.sin(angle),
                -(0.45 if i % 2 else 1.0) * math.cos(angle),
            )
            for i, angle in enumerate(angles)
        ]
    else:  # a heart
        angles = [2 * math.pi * i / 48 for i in range(48)]
        points = [
            (
                16 * math.sin(a) ** 3,
                -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)),
            )
            for a in angles
        ]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    left, top, wide, tall = min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)
    return [((x - left) / wide, (y - top) / tall) for x, y in points]


def _draw_text(picture: Image.Image, thing: Thing, ink: tuple[int, int, int]) -> None:
    x1, y1, x2, _ = thing.box
    low, high = 4.0, 4.0 * picture.height
    while high - low > 0.1:  # the size whose box is that of the thing
        size = (low + high) / 2
        left, _, right, _ = font(size).getbbox(thing.text)
        low, high = (low, size) if right - left > x2 - x1 else (size, high)
    left, top, _, _ = font(low).getbbox(thing.text)
    ImageDraw.Draw(picture).text((x1 - left, y1 - top), thing.text, fill=ink, font=font(low))


# ---- questions


def ask(rng: random.Random, task: str, scene: Scene) -> tuple[str, str] | None:
    """A question of a task about one picture and its answer, or None where it does not fit."""
    if task == "describe":
        return rng.choice(PHRASES[task]), describe(scene)
    if task == MAP:
        return PHRASES[task][0], draw_map(scene)
    if task == "count":
        return _ask_count(rng, scene)
    if task == "read":
        return (rng.choice(PHRASES[task]), scene.texts[0].text) if len(scene.texts) > 0 else None
    if task == "detect":
        return _ask_detect(rng, scene)
    unique = _unique(scene, by_color=task == "where")
    if task == "where":
        unique = [thing for thing in unique if position(thing, scene) is not None]
    if len(unique) == 0:
        return None
    thing = rng.choice(unique)
    if task == "colour":
        return rng.choice(PHRASES[task]).format(thing.kind), thing.color
    return rng.choice(PHRASES[task]).format(thing.name), position(thing, scene) or ""


def describe(scene: Scene) -> str:
    """All things from left to right: `a red circle, a word and an orange star`."""
    names = [_with_article(thing.name) for thing in scene.things]
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def draw_map(scene: Scene) -> str:
    """Three rows of three fields with what has its center there: `-, -, red star; …`."""
    fields: list[list[list[str]]] = [[[] for _ in range(3)] for _ in range(3)]
    for thing in scene.things:
        x, y = thing.center
        column, row = int(3 * x / scene.width), int(3 * y / scene.height)
        fields[row][column].append(thing.name)
    rows = (", ".join(" + ".join(names) or "-" for names in row) for row in fields)
    return "; ".join(rows)


def _with_article(name: str) -> str:
    return ("an " if name[0] in "aeiou" else "a ") + name


def _unique(scene: Scene, by_color: bool) -> list[Thing]:
    keys = [thing.name if by_color else thing.kind for thing in scene.shapes]
    return [thing for thing, key in zip(scene.shapes, keys, strict=True) if keys.count(key) == 1]


def position(thing: Thing, scene: Scene) -> str | None:
    """One of nine fields such as `top left`; None near a border between fields."""
    x, y = thing.center[0] / scene.width, thing.center[1] / scene.height
    if any(abs(value - border) < 0.05 for value in (x, y) for border in (1 / 3, 2 / 3)):
        return None
    row, column = ROWS[int(y * 3)], COLUMNS[int(x * 3)]
    return "center" if (row, column) == ("middle", "center") else f"{row} {column}"


def _ask_count(rng: random.Random, scene: Scene) -> tuple[str, str]:
    shapes = scene.shapes
    present = len(shapes) > 0 and rng.random() < 0.8
    what = rng.choice(("all", "kind", "color"))
    if what == "all":
        name, count = "shapes", len(shapes)
    elif what == "kind":
        kind = rng.choice(shapes).kind if present else rng.choice(SHAPES)
        name, count = plural(kind), sum(thing.kind == kind for thing in shapes)
    else:
        color = rng.choice(shapes).color if present else rng.choice(list(COLORS))
        name, count = f"{color} shapes", sum(thing.color == color for thing in shapes)
    return PHRASES["count"][0].format(name), str(count)


def plural(kind: str) -> str:
    return kind + ("es" if kind.endswith("s") else "s")


def _ask_detect(rng: random.Random, scene: Scene) -> tuple[str, str]:
    present = len(scene.shapes) > 0 and rng.random() < 0.92
    model = rng.choice(scene.shapes) if present else None
    kind = model.kind if model is not None else rng.choice(SHAPES)
    color = model.color if model is not None else rng.choice(list(COLORS))
    query = kind if rng.random() < 0.5 else f"{color} {kind}"
    found = [thing for thing in scene.shapes if query in (thing.kind, thing.name)]
    boxes = [{"label": query, "bbox": unit_box(thing, scene)} for thing in found]
    return DETECT.format(query=query), write_boxes(boxes)


def unit_box(thing: Thing, scene: Scene) -> list[float]:
    """The box with both axes from 0 to 1."""
    sides = (scene.width, scene.height, scene.width, scene.height)
    return [min(max(value / side, 0.0), 0.99) for value, side in zip(thing.box, sides, strict=True)]


def write_boxes(boxes: Sequence[dict[str, Any]]) -> str:
    """The JSON array, every coordinate rounded to a twentieth: the last digit is 0 or 5."""
    items = (
        f'{{"label": "{box["label"]}", "bbox": [{", ".join(map(_twentieths, box["bbox"]))}]}}'
        for box in boxes
    )
    return f"[{', '.join(items)}]"


def _twentieths(value: float) -> str:
    return f"{min(round(value * 20), 19) / 20:.2f}"


def compare(rng: random.Random, first: Scene, second: Scene) -> tuple[str, str]:
    """A question about two pictures and its answer."""
    choices = []
    here, there = ({thing.name for thing in scene.shapes} for scene in (first, second))
    if len(first.shapes) != len(second.shapes):
        answer = "the first" if len(first.shapes) > len(second.shapes) else "the second"
        choices.append(("Which picture has more shapes?", answer))
    if len(here ^ there) > 0:
        name = rng.choice(sorted(here ^ there))
        answer = "the first" if name in here else "the second"
        choices.append((f"Which picture shows {_with_article(name)}?", answer))
    # yes and no come equally often: the name is in both, or in one of them
    pool = here & there if rng.random() < 0.5 and len(here & there) > 0 else here ^ there
    if len(pool) > 0:
        name = rng.choice(sorted(pool))
        answer = "yes" if name in here & there else "no"
        choices.append((f"Is there {_with_article(name)} in both pictures?", answer))
    return rng.choice(choices) if len(choices) > 0 else ("Which picture has more shapes?", "none")


# ---- examples and files


def make_example(
    split: str,
    number: int,
    task: str | None = None,
    turns: int = 1,
    large: bool | None = None,
    most: int = 4,
    then: Sequence[str] | None = None,
) -> Example:
    """The example of a number in a split.

    Args:
        task: of the first question; by default any. "heart" describes a shape that the demo
            model has never seen.
        turns: how many questions, at most; those after the first are of any task.
        large: big enough for tiles; by default every seventh or so.
        most: shapes of a picture, at most.
        then: tasks of the questions after the first, over and over; by default each other task
            once, and a map at the end. Of two pictures, "describe" asks about each at the end,
            and with no turns about nothing else, either picture first.
    """
    rng = random.Random(f"{split} {number} {task}")
    chosen = task if task is not None else rng.choice(TASKS)
    is_large = large if large is not None else rng.random() < 0.14
    if chosen == "compare":
        return _make_comparison(rng, turns, most, describes="describe" in (then or ()))
    if chosen == NEW_SHAPE:
        return _make_new(rng)
    while True:
        least = 0 if chosen in ("read", "describe") else 1
        text = chosen == "read" or rng.random() < 0.4
        scene = make_scene(rng, is_large, text, least=least, most=most)
        first = ask(rng, chosen, scene) if len(scene.things) > 0 else None
        if first is not None:
            break
    further = _other_tasks(rng, chosen) if then is None else [*then] * turns
    asked = [first]
    for name in further:
        more = ask(rng, name, scene) if len(asked) < turns - (then is None) else None
        if more is not None and more not in asked:
            asked.append(more)
    if turns > 1 and then is None:  # the last question: its answer gives away the others'
        asked.append((PHRASES[MAP][0], draw_map(scene)))
    return Example((draw(scene),), (scene,), chosen, tuple(asked))


def _other_tasks(rng: random.Random, chosen: str) -> list[str]:
    others = [name for name in TASKS if name not in (chosen, "compare")]
    rng.shuffle(others)
    if rng.random() < 0.5:  # its long questions would take most of the time of training
        others = [name for name in others if name != "detect"]
    return [*others, "count"]


def _make_comparison(rng: random.Random, turns: int, most: int, describes: bool) -> Example:
    first = make_scene(rng, least=1, most=most)
    second = make_scene(rng, least=1, most=most)
    if rng.random() < 0.5:  # with one shape in common
        shared = rng.choice(first.shapes)
        second = _with_thing(rng, second, shared)
    asked: list[tuple[str, str]] = []
    for _ in range(2 * turns + 1):
        more = compare(rng, first, second)
        if len(asked) < turns and more not in asked:
            asked.append(more)
    if describes:  # in training only: what stands in which picture teaches to tell them apart
        about = [
            ("What is in the first picture?", describe(first)),
            ("What is in the second picture?", describe(second)),
        ]
        if turns == 0 and rng.random() < 0.5:
            about.reverse()
        asked.extend(about)
    return Example((draw(first), draw(second)), (first, second), "compare", tuple(asked))


def _make_new(rng: random.Random) -> Example:
    """One or two shapes; at least one is new."""
    while True:
        shapes = (*SHAPES, *[NEW_SHAPE] * len(SHAPES))
        scene = make_scene(rng, shapes=shapes, least=1, most=2)
        if any(thing.kind == NEW_SHAPE for thing in scene.things):
            asked = rng.choice(PHRASES["describe"]), describe(scene)
            return Example((draw(scene),), (scene,), NEW_SHAPE, (asked,))


def _with_thing(rng: random.Random, scene: Scene, like: Thing) -> Scene:
    """The scene with one shape changed into the kind and colour of another."""
    place = scene.things.index(rng.choice(scene.shapes))
    old = scene.things[place]
    changed = Thing(like.kind, like.color, "", old.box)
    return Scene(
        scene.width,
        scene.height,
        (*scene.things[:place], changed, *scene.things[place + 1 :]),
        scene.seed,
    )


def messages_of(example: Example, images: Sequence[Any]) -> list[dict[str, Any]]:
    """The conversation in the transformers form, pictures in the first turn."""
    items: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    messages: list[dict[str, Any]] = []
    for question, answer in example.turns:
        text = {"type": "text", "text": question}
        messages.append({"role": "user", "content": [*items, text]})
        messages.append({"role": "assistant", "content": answer})
        items = []
    return messages


def write_example(
    folder: Path,
    split: str,
    task: str | None,
    turns: int,
    most: int,
    then: Sequence[str] | None,
    detect: bool,
    number: int,
) -> str:
    """Writes an example's pictures; returns its line for the data file."""
    example = make_example(split, number, task, turns, most=most, then=then)
    if not detect:
        kept = [turn for turn in example.turns if not turn[0].startswith(DETECT[:10])]
        example = replace(example, turns=tuple(kept))
    names = []
    for i, picture in enumerate(example.pictures):
        names.append(f"pictures/{number // 1000:03d}/{number:06d}_{i}.jpg")
        path = folder / names[-1]
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, quality=92, subsampling=0)
    return json.dumps({"messages": messages_of(example, names), "task": example.task})


def main() -> None:
    parser = argparse.ArgumentParser(description="Write examples of the demo world.")
    parser.add_argument("--split", default="train", help="train, validation or test")
    parser.add_argument("--count", type=int, default=1000, help="examples (default: %(default)s)")
    parser.add_argument(
        "--task",
        choices=(*TASKS, NEW_SHAPE),
        help="of the first question; heart is never drawn for the demo model (default: any other)",
    )
    parser.add_argument(
        "--turns",
        type=int,
        default=1,
        help="questions about a picture, at most; 0 to compare: only the descriptions of --then",
    )
    parser.add_argument(
        "--then",
        choices=TASKS[:-1],
        nargs="+",
        help="tasks of the questions after the first, over and over (default: each other task)",
    )
    parser.add_argument("--shapes", type=int, default=4, help="shapes per picture, at most")
    parser.add_argument(
        "--no-detect",
        dest="detect",
        action="store_false",
        help="without boxes, whose digits drown all else at the beginning",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    alone = args.task == "compare" and "describe" in (args.then or ())
    if args.turns < (0 if alone else 1):
        parser.error(
            f"--turns {args.turns}: must be 1 or more, or 0 with --task compare --then describe"
        )
    args.output.mkdir(parents=True, exist_ok=True)
    options = (args.output, args.split, args.task, args.turns, args.shapes, args.then, args.detect)
    write = partial(write_example, *options)
    with ProcessPoolExecutor() as pool, open(args.output / "data.jsonl", "w") as file:
        for line in pool.map(write, range(args.count), chunksize=50):
            file.write(line + "\n")


if __name__ == "__main__":
    main()
