"""The demo world: small drawn pictures, and questions about them whose answers are known.

    python examples/demo/world.py --split train --count 40000 --output world/train

Pictures show coloured shapes and printed words or numbers on varied backgrounds. A picture, its
questions and their answers follow from the name of the split and a number alone, so the splits
share no picture.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from drawing import SHADES, draw, font, proportions
from PIL import Image

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
NEW_SHAPE = "heart"  # never drawn for the demo model: adapters can teach it
COLORS = tuple(SHADES)
# fmt: off
WORDS = (
    "ANT", "BEE", "BOX", "BUS", "CAT", "CUP", "DOG", "EGG", "FOX", "HAT", "JAM", "KEY", "MAP",
    "NUT", "OWL", "PIG", "SUN", "TEA", "VAN", "ZOO", "BIRD", "CAKE", "DOOR", "FISH", "GOLD",
    "HAND", "KITE", "LAMP", "MOON", "NEST", "RAIN", "SHIP", "TREE", "WOLF",
)
# fmt: on
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
TASKS = (
    "describe", "count", "colour", "where", "read", "detect", "compare", "record", "choice",
    "absent", "call", "photo",
)  # fmt: skip
MAP = "map"  # asked in training only: what stands where teaches a model to look there
# of training's further questions about a picture: those that are hard come oftener
FURTHER = {
    "detect": 6, "count": 3, "where": 3, "describe": 2, "colour": 2, "choice": 2, "absent": 2,
    "record": 2, "read": 2, MAP: 1,
}  # fmt: skip

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
    "record": ("Record the picture as JSON.",),
    "there": ("Is there {0}?",),
    "choice": ("Is the {0} {1} or {2}?",),
    "price": ("What does the {0} cost?",),
    "page": ("Which page is the word on?",),
    MAP: ("Map the picture.",),
}
NO_TEXT = "There is no text."
PHOTOGRAPH = "I know drawn pictures only."
PHOTOS = Path(__file__).parents[1] / "photos"

TOOLS: tuple[dict[str, Any], ...] = (
    {
        "name": "get_price",
        "description": "The price of a shape.",
        "parameters": {
            "type": "object",
            "properties": {"color": {"enum": [*COLORS]}, "kind": {"enum": [*SHAPES]}},
            "required": ["color", "kind"],
        },
    },
    {
        "name": "look_up",
        "description": "The page of a word.",
        "parameters": {
            "type": "object",
            "properties": {"word": {"type": "string"}},
            "required": ["word"],
        },
    },
)

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Thing:
    """A shape with its colour, or a text; the box is (x1, y1, x2, y2) in pixels."""

    kind: str  # one of SHAPES, "word" or "number"
    color: str
    text: str
    box: Box
    turn: float = 0.0  # degrees
    part: float = 0.5  # how thick or pointed, from 0 to 1

    @property
    def is_text(self) -> bool:
        return self.kind in ("word", "number")

    @property
    def name(self) -> str:
        return self.kind if self.is_text else f"{self.color} {self.kind}"

    @property
    def center(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    def is_a(self, query: str) -> bool:
        """Whether a question for `red circle`, `circle`, `shape` or `word` is about this."""
        return query in (self.kind, self.name) or (query == "shape" and not self.is_text)


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
    """Pictures, the task of the first question, and the turns about them.

    A turn is a question and its answer. With tools, the first answer is a call, as
    (name, arguments), and the second question is what the tool returned.
    """

    pictures: tuple[Image.Image, ...]
    scenes: tuple[Scene, ...]
    task: str
    turns: tuple[tuple[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()


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
    count = rng.choices((1, 2, 3, 4), (3, 4, 4, 3))[0] - (1 if text else 0)
    count = min(max(least, count), most)
    kinds, colors = list(shapes), list(COLORS)
    if rng.random() < 0.5:  # few kinds, so that some come twice
        kinds, colors = rng.sample(kinds, min(2, len(kinds))), rng.sample(colors, 3)
    things: list[Thing] = []
    if text:
        things.append(_place_text(rng, width, height, large))
    is_straight = rng.random() < 0.6
    for _ in range(count):
        kind, color = rng.choice(kinds), rng.choice(colors)
        turn = 0.0 if is_straight else rng.uniform(-15, 15)
        blank = Thing(kind, color, "", (0, 0, 0, 0), turn, rng.random())
        thing = _place_shape(rng, width, height, blank, things)
        if thing is not None:
            things.append(thing)
    ordered = sorted(things, key=lambda thing: thing.center[0])
    return Scene(width, height, tuple(ordered), rng.randrange(2**31))


def _size(rng: random.Random, large: bool) -> tuple[int, int]:
    while True:
        low, high = (160, 480) if large else (88, 200)
        width, height = rng.randint(low, high), rng.randint(low, high)
        rounded = round(width / 32) * round(height / 32)
        if (rounded > 32) == large and 0.4 < width / height < 2.5:
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
    rng: random.Random, width: int, height: int, blank: Thing, others: Sequence[Thing]
) -> Thing | None:
    shape = proportions(blank.kind, blank.turn, blank.part)
    if blank.kind == "square":
        shape *= rng.uniform(0.87, 1.15)
    for _ in range(60):
        side = rng.uniform(0.23, 0.42) * min(width, height)
        wide, tall = (side, side / shape) if shape > 1 else (side * shape, side)
        left = rng.uniform(0.02 * width, 0.98 * width - wide)
        top = rng.uniform(0.02 * height, 0.98 * height - tall)
        thing = replace(blank, box=(left, top, left + wide, top + tall))
        if all(_apart(thing, other, width, height) for other in others):
            return thing
    return None  # nothing free


def _apart(a: Thing, b: Thing, width: int, height: int) -> bool:
    gap = 0.02 * min(width, height)
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a.box, b.box
    overlap = ax1 < bx2 + gap and bx1 < ax2 + gap and ay1 < by2 + gap and by1 < ay2 + gap
    # "from left to right" must be plain to see
    return not overlap and abs(a.center[0] - b.center[0]) > 0.1 * width


def photograph(rng: random.Random) -> Image.Image:
    """A piece of a photograph, or of a cloud of noise that looks as irregular."""
    files = sorted(path for path in PHOTOS.iterdir() if path.suffix in (".png", ".jpg"))
    chosen = rng.randrange(len(files) + 1)
    width, height = _size(rng, rng.random() < 0.2)
    if chosen == len(files):
        return _clouds(rng, width, height)
    with Image.open(files[chosen]) as file:
        picture = file.convert("RGB")
    share = rng.uniform(0.4, 1.0)
    wide, tall = round(share * picture.width), round(share * picture.height)
    left, top = rng.randint(0, picture.width - wide), rng.randint(0, picture.height - tall)
    piece = picture.resize((width, height), box=(left, top, left + wide, top + tall))
    if rng.random() < 0.5:
        piece = piece.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    order = rng.choice(("RGB", "RGB", "BGR", "GRB", "GBR"))
    return Image.merge("RGB", [piece.getchannel(channel) for channel in order])


def _clouds(rng: random.Random, width: int, height: int) -> Image.Image:
    """Noise of all sizes, the large ones strongest, as in photographs."""
    picture = Image.new("RGB", (width, height), tuple(rng.randrange(256) for _ in range(3)))
    for cells in (2, 4, 8, 16, 32, 64):
        grid = Image.frombytes("RGB", (cells, cells), rng.randbytes(3 * cells * cells))
        smooth = grid.resize((width, height), Image.Resampling.BICUBIC)
        picture = Image.blend(picture, smooth, rng.uniform(0.15, 0.5))
    return picture


# ---- questions


def ask(rng: random.Random, task: str, scene: Scene) -> tuple[str, str] | None:
    """A question of a task about one picture and its answer, or None if it does not fit."""
    if task == "describe":
        return rng.choice(PHRASES[task]), describe(scene)
    if task == MAP:
        return PHRASES[task][0], draw_map(scene)
    if task == "record":
        return PHRASES[task][0], json.dumps(record(scene))
    if task == "read":
        return (rng.choice(PHRASES[task]), scene.texts[0].text) if len(scene.texts) > 0 else None
    if task in ASKERS:
        return ASKERS[task](rng, scene)
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


def record(scene: Scene) -> dict[str, Any]:
    """Kinds, colours and places of all shapes from left to right, and the text or nothing."""
    shapes = [
        {"kind": thing.kind, "color": thing.color, "place": field(thing, scene)}
        for thing in scene.shapes
    ]
    return {"shapes": shapes, "text": "".join(thing.text for thing in scene.texts)}


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


def field(thing: Thing, scene: Scene) -> str:
    """One of nine fields such as `top left` in which a thing has its center."""
    x, y = thing.center[0] / scene.width, thing.center[1] / scene.height
    row, column = ROWS[int(y * 3)], COLUMNS[int(x * 3)]
    return "center" if (row, column) == ("middle", "center") else f"{row} {column}"


def position(thing: Thing, scene: Scene) -> str | None:
    """The field of a thing; None near a border between fields."""
    x, y = thing.center[0] / scene.width, thing.center[1] / scene.height
    if any(abs(value - border) < 0.05 for value in (x, y) for border in (1 / 3, 2 / 3)):
        return None
    return field(thing, scene)


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
        color = rng.choice(shapes).color if present else rng.choice(COLORS)
        name, count = f"{color} shapes", sum(thing.color == color for thing in shapes)
    return PHRASES["count"][0].format(name), str(count)


def plural(kind: str) -> str:
    return kind + ("es" if kind.endswith("s") else "s")


def _ask_choice(rng: random.Random, scene: Scene) -> tuple[str, str] | None:
    """Is there a red star: yes or no; is the star red or blue."""
    unique = _unique(scene, by_color=False)
    if len(unique) > 0 and rng.random() < 0.5:
        thing = rng.choice(unique)
        other = rng.choice([color for color in COLORS if color != thing.color])
        colors = rng.sample([thing.color, other], 2)
        return PHRASES["choice"][0].format(thing.kind, *colors), thing.color
    if rng.random() < 0.5 and len(scene.shapes) > 0:
        thing = rng.choice(scene.shapes)
        name = thing.name if rng.random() < 0.6 else thing.kind
        return PHRASES["there"][0].format(_with_article(name)), "yes"
    return PHRASES["there"][0].format(_with_article(_missing(rng, scene))), "no"


def _missing(rng: random.Random, scene: Scene, colored: bool | None = None) -> str:
    """A kind, or a kind of a colour, that is not there; often nearly so."""
    while True:
        color, kind = rng.choice(COLORS), rng.choice(SHAPES)
        if len(scene.shapes) > 0 and rng.random() < 0.6:  # the colour or the kind of another
            near = rng.choice(scene.shapes)
            color, kind = rng.choice(((near.color, kind), (color, near.kind)))
        is_colored = rng.random() < 0.6 if colored is None else colored
        name = f"{color} {kind}" if is_colored else kind
        if not any(thing.is_a(name) for thing in scene.shapes):
            return name


def _ask_absent(rng: random.Random, scene: Scene) -> tuple[str, str]:
    """A question about what is not there, and that it is not."""
    kind = rng.choice(("colour", "where", "detect", "read"))
    if kind == "read" and len(scene.texts) == 0:
        return rng.choice(PHRASES["read"]), NO_TEXT
    if kind == "colour":
        name = _missing(rng, scene, colored=False)
        return rng.choice(PHRASES["colour"]).format(name), f"There is no {name}."
    name = _missing(rng, scene)
    if kind == "detect":
        return DETECT.format(query=name), "[]"
    return PHRASES["where"][0].format(name), f"There is no {name}."


def _ask_detect(rng: random.Random, scene: Scene) -> tuple[str, str]:
    """Boxes of a kind, of a kind of one colour, of all shapes, of the text, or of two of these."""
    queries = ["shape"] if rng.random() < 0.12 else []
    if len(scene.texts) > 0 and rng.random() < 0.15:
        queries = [scene.texts[0].kind]
    if len(queries) == 0:
        model = rng.choice(scene.shapes) if len(scene.shapes) > 0 else None
        if model is None or rng.random() < 0.05:
            queries = [_missing(rng, scene)]
        else:
            queries = [model.kind if rng.random() < 0.5 else model.name]
        if rng.random() < 0.1:
            queries += [rng.choice(scene.things).name, _missing(rng, scene)][: rng.randint(1, 2)]
    queries = [*dict.fromkeys(queries)]
    boxes = [
        {"label": query, "bbox": unit_box(thing, scene)}
        for query in queries
        for thing in scene.things
        if thing.is_a(query)
    ]
    return DETECT.format(query=", ".join(queries)), write_boxes(boxes)


ASKERS = {
    "count": _ask_count, "detect": _ask_detect, "choice": _ask_choice, "absent": _ask_absent,
}  # fmt: skip


def queries_of(question: str) -> list[str]:
    """What a question for boxes asks for."""
    before, after = DETECT.replace("{{", "{").replace("}}", "}").split("{query}")
    return question.removeprefix(before).removesuffix(after).split(", ")


def unit_box(thing: Thing, scene: Scene) -> list[float]:
    """The box with both axes from 0 to 1."""
    sides = (scene.width, scene.height, scene.width, scene.height)
    return [min(max(value / side, 0.0), 1.0) for value, side in zip(thing.box, sides, strict=True)]


def write_boxes(boxes: Sequence[dict[str, Any]]) -> str:
    """The JSON array, in hundredths below one."""
    items = (
        f'{{"label": "{box["label"]}", "bbox": [{", ".join(map(_hundredths, box["bbox"]))}]}}'
        for box in boxes
    )
    return f"[{', '.join(items)}]"


def _hundredths(value: float) -> str:
    return f"{min(value, 0.99):.2f}"


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
    pen: str = "pillow",
) -> Example:
    """The example of a number in a split.

    Args:
        task: of the first question; by default any. "heart" describes a shape that the demo
            model has never seen.
        turns: how many questions, at most; those after the first are as training needs them.
        large: big enough for tiles; by default every fifth or so.
        most: shapes of a picture, at most.
        pen: who draws the shapes: "pillow", "matplotlib" or "svg".
    """
    rng = random.Random(f"{split} {number} {task}")
    chosen = task if task is not None else rng.choice(TASKS)
    is_large = large if large is not None else rng.random() < 0.2
    if chosen == "compare":
        return _make_comparison(rng, turns, most, pen)
    if chosen == NEW_SHAPE:
        return _make_new(rng)
    if chosen == "photo":
        return _make_photo(rng)
    if chosen == "call":
        return _make_call(rng, is_large, most, pen)
    while True:
        least = 0 if chosen in ("read", "describe") else 1
        text = chosen == "read" or rng.random() < 0.4
        scene = make_scene(rng, is_large, text, least=least, most=most)
        first = ask(rng, chosen, scene) if len(scene.things) > 0 else None
        if first is not None:
            break
    asked = [first]
    for name in rng.choices([*FURTHER], [*FURTHER.values()], k=2 * turns):
        more = ask(rng, name, scene) if len(asked) < turns else None
        if more is not None and more[0] not in [question for question, _ in asked]:
            asked.append(more)
    return Example((draw(scene, pen),), (scene,), chosen, tuple(asked))


def _make_comparison(rng: random.Random, turns: int, most: int, pen: str) -> Example:
    first = make_scene(rng, least=1, most=most)
    second = make_scene(rng, least=1, most=most)
    if rng.random() < 0.5:  # with one shape in common
        second = _with_thing(rng, second, rng.choice(first.shapes))
    asked: list[tuple[str, str]] = []
    # in training only: what stands in which picture teaches to tell them apart
    about = [
        ("What is in the first picture?", describe(first)),
        ("What is in the second picture?", describe(second)),
    ]
    rng.shuffle(about)
    if turns > 1 and rng.random() < 0.4:
        asked += about[: rng.randint(1, 2)]
    for _ in range(2 * turns + 1):
        more = compare(rng, first, second)
        if len(asked) < turns and more not in asked:
            asked.append(more)
    scenes = (first, second)
    return Example(tuple(draw(scene, pen) for scene in scenes), scenes, "compare", tuple(asked))


def _make_new(rng: random.Random) -> Example:
    """One or two shapes; at least one is new."""
    while True:
        shapes = (*SHAPES, *[NEW_SHAPE] * len(SHAPES))
        scene = make_scene(rng, shapes=shapes, least=1, most=2)
        if any(thing.kind == NEW_SHAPE for thing in scene.things):
            asked = rng.choice(PHRASES["describe"]), describe(scene)
            return Example((draw(scene),), (scene,), NEW_SHAPE, (asked,))


def _make_photo(rng: random.Random) -> Example:
    """A photograph, and the answer that this model knows nothing of it."""
    task = rng.choice(("describe", "read", "count", "colour", "where"))
    named = {"count": rng.choice(("shapes", *map(plural, SHAPES))), "colour": rng.choice(SHAPES)}
    named["where"] = f"{rng.choice(COLORS)} {rng.choice(SHAPES)}"
    question = rng.choice(PHRASES[task]).format(named.get(task))
    return Example((photograph(rng),), (), "photo", ((question, PHOTOGRAPH),))


def _make_call(rng: random.Random, large: bool, most: int, pen: str) -> Example:
    """A question that a tool answers: the call, and its result told."""
    is_word = rng.random() < 0.5
    value = rng.randint(10, 99)
    while True:
        scene = make_scene(rng, large, text=is_word, least=1, most=most)
        unique = _unique(scene, by_color=False)
        if is_word and scene.texts[0].kind == "word":
            word = scene.texts[0].text
            question, call = PHRASES["page"][0], ("look_up", {"word": word})
            told, answer = {"page": value}, f"{word} is on page {value}."
            break
        if not is_word and len(unique) > 0:
            thing = rng.choice(unique)
            question = PHRASES["price"][0].format(thing.kind)
            call = ("get_price", {"color": thing.color, "kind": thing.kind})
            told, answer = {"price": value}, f"The {thing.name} costs {value}."
            break
    turns = ((question, call), (json.dumps(told), answer))
    return Example((draw(scene, pen),), (scene,), "call", turns, TOOLS)


def _with_thing(rng: random.Random, scene: Scene, like: Thing) -> Scene:
    """The scene with one shape changed into the kind and colour of another."""
    place = scene.things.index(rng.choice(scene.shapes))
    changed = replace(scene.things[place], kind=like.kind, color=like.color, turn=0.0)
    things = (*scene.things[:place], changed, *scene.things[place + 1 :])
    return replace(scene, things=things)


def messages_of(example: Example, images: Sequence[Any]) -> list[dict[str, Any]]:
    """The conversation in the transformers form, pictures in the first turn."""
    items: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    messages: list[dict[str, Any]] = []
    for number, (question, answer) in enumerate(example.turns):
        if number > 0 and len(example.tools) > 0:
            messages.append({"role": "tool", "content": question})
        else:
            content = [*items, {"type": "text", "text": question}]
            messages.append({"role": "user", "content": content})
        if isinstance(answer, str):
            messages.append({"role": "assistant", "content": answer})
        else:
            function = {"name": answer[0], "arguments": answer[1]}
            call = {"type": "function", "function": function}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        items = []
    return messages


def write_example(
    folder: Path, split: str, task: str | None, turns: int, most: int, number: int
) -> str:
    """Writes an example's pictures; returns its line for the data file."""
    example = make_example(split, number, task, turns, most=most)
    names = []
    for i, picture in enumerate(example.pictures):
        names.append(f"pictures/{number // 1000:03d}/{number:06d}_{i}.jpg")
        path = folder / names[-1]
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, quality=94, subsampling=0)
    line: dict[str, Any] = {"messages": messages_of(example, names), "task": example.task}
    return json.dumps(line | ({"tools": example.tools} if len(example.tools) > 0 else {}))


def write_world(
    folder: Path, split: str, count: int, task: str | None, turns: int, most: int
) -> None:
    """Writes `data.jsonl` and its pictures into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write = partial(write_example, folder, split, task, turns, most)
    with ProcessPoolExecutor() as pool, open(folder / "data.jsonl", "w") as file:
        for line in pool.map(write, range(count), chunksize=50):
            file.write(line + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write examples of the demo world.")
    parser.add_argument("--split", default="train", help="train, validation or test")
    parser.add_argument("--count", type=int, default=1000, help="examples (default: %(default)s)")
    parser.add_argument(
        "--task",
        choices=(*TASKS, NEW_SHAPE),
        help="of the first question; heart is never drawn for the demo model (default: any other)",
    )
    parser.add_argument("--turns", type=int, default=1, help="questions about a picture, at most")
    parser.add_argument("--shapes", type=int, default=4, help="shapes per picture, at most")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    if args.turns < 1:
        parser.error(f"--turns {args.turns}: must be 1 or more")
    write_world(args.output, args.split, args.count, args.task, args.turns, args.shapes)


if __name__ == "__main__":
    main()
