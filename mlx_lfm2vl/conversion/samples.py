"""What models are asked about: built-in pictures and texts, and those of a user."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConvertError, DataError

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TEXTS = (
    "The lighthouse keeper climbed the stairs every evening, lit the lamp, and wrote down the "
    "wind, the clouds and the ships that passed.",
    "To make the dough, mix 500 g of flour with 320 ml of water, 10 g of salt and 3 g of yeast; "
    "knead it for ten minutes and let it rest.",
    "def mean(values):\n    total = sum(values)\n    return total / len(values)\n",
    "Q: A train leaves at 9:40 and arrives at 11:05. How long does it travel? A: 85 minutes.",
    "Der Zug nach Zürich fährt heute von Gleis sieben ab, etwa zehn Minuten später als geplant.",
    "La niña abrió la ventana, miró la lluvia y decidió quedarse en casa con un libro.",
    '[{"label": "cup", "bbox": [0.12, 0.40, 0.31, 0.77]}, {"label": "spoon", "bbox": [0.35, 0.5]}]',
)
QUESTION = "Describe this image."


# other texts and pictures than those of a report, which must not tell what calibration has seen
CALIBRATION_TEXTS = (
    "In the morning the market opens: fruit and cheese on the left, bread and flowers on the "
    "right, and coffee at the corner of the square.",
    "First install the package, then run the command with the name of a folder; the result is a "
    "table of sizes and times.",
    "for name, count in sorted(totals.items()):\n    print(f'{name}: {count}')\n",
    "Question: how many legs do three spiders have? Answer: 3 times 8 is 24 legs.",
    "Die Bibliothek öffnet um zehn Uhr, montags bleibt sie geschlossen.",
    "Le chat dort sur la chaise près de la fenêtre, et il pleut depuis ce matin.",
    '{"name": "bicycle", "wheels": 2, "color": "blue", "parts": ["bell", "lamp", "saddle"]}',
)
CALIBRATION_QUESTIONS = (QUESTION, "What shapes and colours are there?", "What is written here?")
CALIBRATION_IMAGES = 12


@dataclass
class Samples:
    """What checkpoints are asked: conversations that await an answer, and bare texts.

    Attributes:
        answers: of each conversation, if the user gave one.
    """

    conversations: list[list[Any]]
    texts: list[str]
    answers: list[str | None] = field(default_factory=list)


def samples(folder: str | Path | None) -> Samples:
    """What conversions are compared on: built-in images and texts, and those of a user.

    Args:
        folder: see `user_samples`; answers at the end of conversations are left out.
    """
    found = Samples([question(image) for image in made_images()], list(TEXTS))
    if folder is not None:
        theirs = user_samples(folder)
        found.conversations += theirs.conversations
        found.texts += theirs.texts
    return found


def calibration_samples(folder: str | Path | None) -> Samples:
    """What a conversion is calibrated on: a user's samples, or pictures and texts made in code."""
    if folder is not None:
        return user_samples(folder)
    pictures = [drawn_image(number) for number in range(CALIBRATION_IMAGES)]
    talks = [question(image, text) for text in CALIBRATION_QUESTIONS for image in pictures]
    return Samples(talks, list(CALIBRATION_TEXTS), [None] * len(talks))


def user_samples(folder: str | Path) -> Samples:
    """The samples of a user.

    Args:
        folder: holds images, `.txt` files, and `.jsonl` files with a conversation on each line,
            `{"messages": […], "images": […]}` as for training; or is such a `.jsonl` file.
    """
    path = Path(folder).expanduser()
    paths = sorted(path.glob("*")) if path.is_dir() else [path]
    images = [question(str(p)) for p in paths if p.suffix.lower() in IMAGE_SUFFIXES]
    texts = [_read(p) for p in paths if p.suffix == ".txt"]
    talks = [talk for p in paths if p.suffix == ".jsonl" for talk in read_conversations(p)]
    if not images and not texts and not talks:
        raise ConvertError(f"{folder} holds no image, no .txt file and no .jsonl file")
    answers: list[str | None] = [None] * len(images)
    answers += [answer for _, answer in talks]
    return Samples(images + [talk for talk, _ in talks], texts, answers)


def question(image: Any, text: str = QUESTION) -> list[Any]:
    """A conversation that asks about one image."""
    items = [{"type": "image", "image": image}, {"type": "text", "text": text}]
    return [{"role": "user", "content": items}]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def read_conversations(path: Path) -> list[tuple[list[Any], str | None]]:
    """The conversations of a file of JSON lines, up to their last question, and its answer."""
    talks = []
    for number, line in enumerate(_read(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            talks.append(_conversation(json.loads(line), path.parent))
        except (KeyError, TypeError, ValueError, RecursionError, StopIteration) as error:
            raise DataError(
                f'{path} line {number} is no {{"messages": [...]}} with a place for each of its '
                f'"images": {error!r}'
            ) from None
    return talks


def _conversation(entry: Any, folder: Path) -> tuple[list[Any], str | None]:
    messages, answer = list(entry["messages"]), None
    if messages[-1:] and messages[-1]["role"] == "assistant":
        content = messages.pop()["content"]
        answer = content if isinstance(content, str) else "".join(i["text"] for i in content)
    if not messages:
        raise ValueError("nothing is asked")
    images = iter(entry.get("images") or [])
    talk = [_located(message, folder, images) for message in messages]
    if next(images, None) is not None:
        raise ValueError("more images than places")
    return talk, answer


def _located(message: Any, folder: Path, images: Iterator[Any]) -> Any:
    """The message with its images, their paths seen from the file of conversations."""
    if not isinstance(message["content"], list):
        return message
    items = []
    for item in message["content"]:
        if item["type"] in ("image", "image_url"):
            given = (item.get(key) for key in ("image", "url", "path", "image_url"))
            image = next((value for value in given if value is not None), None)
            image = image["url"] if isinstance(image, dict) else image
            image = str(next(images) if image is None else image)
            remote = image.startswith(("http://", "https://", "data:"))
            item = {"type": "image", "image": image if remote else str(folder / image)}
        items.append(item)
    return {**message, "content": items}


def made_images() -> Iterator[Image.Image]:
    """Three pictures made in code: shapes, a printed word, and one large enough to be tiled."""
    from PIL import Image, ImageDraw, ImageFont

    shapes = Image.linear_gradient("L").resize((300, 220)).convert("RGB")
    pen = ImageDraw.Draw(shapes)
    pen.ellipse((30, 40, 130, 140), fill="red")
    pen.rectangle((170, 60, 270, 180), fill="navy", outline="white", width=5)
    yield shapes
    word = Image.new("RGB", (400, 160), "ivory")
    font = ImageFont.load_default(72)
    ImageDraw.Draw(word).text((40, 40), "EXIT 42", fill="darkgreen", font=font)
    yield word
    large = Image.radial_gradient("L").resize((1100, 800)).convert("RGB")
    pen = ImageDraw.Draw(large)
    for n in range(12):
        x, y = 60 + 250 * (n % 4), 60 + 240 * (n // 4)
        pen.polygon((x, y + 120, x + 60, y, x + 120, y + 120), fill=f"hsl({n * 30}, 90%, 50%)")
    yield large


def drawn_image(number: int) -> Image.Image:
    """A picture made in code for calibration: coloured shapes and a word on a gradient."""
    from PIL import Image, ImageDraw, ImageFont

    rng = random.Random(number)
    size = rng.randint(180, 420), rng.randint(180, 420)
    picture = Image.linear_gradient("L").rotate(90 * (number % 4)).resize(size).convert("RGB")
    pen = ImageDraw.Draw(picture)
    for _ in range(rng.randint(1, 4)):
        side, x, y = rng.randint(40, 110), rng.randrange(size[0] - 60), rng.randrange(size[1] - 60)
        draw = rng.choice((pen.ellipse, pen.rectangle))
        draw((x, y, x + side, y + side), fill=rng.choice(("red", "green", "blue", "gold", "white")))
    word = rng.choice(("OPEN", "TAXI", "7 km", "Menu", "STOP", "1984"))
    place = rng.randrange(size[0] // 2), rng.randrange(size[1] // 2)
    pen.text(place, word, fill=rng.choice(("black", "white")), font=ImageFont.load_default(48))
    return picture
