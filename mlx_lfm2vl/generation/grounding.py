"""Things in a picture: boxes of what was asked for, the blocks of a page, the fields of a form.

Wordings and scales are those the models were trained on: LFM2.5-VL-450M and 1.6B answer boxes from
0 to 1, LFM2.5-VL-3B from 0 to 1000.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx

from ..errors import AnswerError, OutputError, PromptError
from ..models.lfm2_vl import Lfm2VlForConditionalGeneration
from ..options import ImageOptions
from ..prompts.constraint import can_constrain
from ..prompts.image_processor import NO_OPTIONS, ImageInput
from ..prompts.image_source import load_image
from ..prompts.messages import Message
from ..prompts.messages import _image_list as image_list
from ..prompts.processor import Lfm2VlProcessor
from ..prompts.question import Question
from .answer import GenerationResponse
from .engine import AnswerRow, Engine
from .generate import generate
from .memory import memory_limits

if TYPE_CHECKING:
    from PIL import Image

THOUSANDTHS_VOCAB_SIZE = 128_000  # of LFM2.5-VL-3B, the only one that answers in thousandths
MAX_BOXES = 64
MAX_TOKENS = 2048
MAX_ROWS = 8  # labels asked about at once
SAME = 0.95  # overlap from which on two boxes of one label are one
BOX_KEYS = ("bbox_2d", "bbox", "box")
BOX_ARRAY = re.compile(r"[\"'](?:bbox_2d|bbox|box)[\"']\s*:\s*([\[(][^\])]*)")

DETECT = (
    "Detect all instances of: {query}. Response must be a JSON array: "
    '[{{"label": ..., "bbox": [x1, y1, x2, y2]}}, ...]. Coordinates are normalized to [0,1].'
)
DETECT_THOUSANDTHS = "Detect all instances of: {query}."
SYSTEM_THOUSANDTHS = """\
Return only a valid JSON array. Do not include markdown, code fences, comments, or any text \
outside the JSON.
Each array item must be an object with:
- image_id: the zero-based image index. For a single-image input, use 0. For multi-image inputs, \
use 0 for the first image, 1 for the second, and so on.
- bbox_2d: [xmin, ymin, xmax, ymax] normalized integer coordinates in [0, 1000]
- label: a concise label you choose for the predicted object or region

Return one item per visible matching object or region. Return [] if none are visible."""
LAYOUT = """\
Parse this document into its layout regions. The pages are provided as images in reading order. \
For every region, in reading order across all pages, output a header line immediately followed by \
the region's content:

image_index=<n> <label> [xmin, ymin, xmax, ymax]
<content>

where:
- image_index is the zero-based index of the page image the region appears on (0 for the first \
image, 1 for the second, and so on)
- <label> is one of these layout labels: text, title, list, table, table_caption, table_footnote, \
image, image_block, image_caption, image_footnote, chart, equation, formula_number, code, \
code_caption, algorithm, aside_text, ref_text, phonetic, page_header, page_footer, page_number, \
page_footnote
- [xmin, ymin, xmax, ymax] are normalized integer coordinates in [0, 1000]
- <content> is the region's content: plain text for text regions, LaTeX for equations, OTSL for \
tables, and a short description for images and charts

Separate each region block with one blank line. Return only the parsed regions."""
BLOCK = re.compile(
    r"^image_index=(\d+)\s+(?:<label>)?([^\[\n<]+?)(?:</label>)?\s*\[([\d.,\s]+)\][ \t]*$", re.M
)

Size = tuple[int, int]


@dataclass(frozen=True)
class Box:
    """A thing in a picture.

    Attributes:
        label: what it is.
        x1, y1, x2, y2: left, top, right and bottom in pixels of the upright picture.
        image_size: (width, height) of that picture.
        score: how sure the model was of the coordinates, from 0 to 1: the geometric mean of their
            tokens' probabilities. It orders boxes, and is no calibrated probability.
    """

    label: str
    x1: float
    y1: float
    x2: float
    y2: float
    image_size: Size
    score: float | None = None

    @property
    def xyxy(self) -> tuple[float, float, float, float]:
        """All four coordinates in pixels."""
        return self.x1, self.y1, self.x2, self.y2

    @property
    def normalized(self) -> tuple[float, float, float, float]:
        """All four coordinates from 0 to 1."""
        width, height = self.image_size
        return self.x1 / width, self.y1 / height, self.x2 / width, self.y2 / height

    @property
    def center(self) -> tuple[float, float]:
        """(x, y) in pixels."""
        return (self.x1 + self.x2) / 2, (self.y1 + self.y2) / 2

    @property
    def area(self) -> float:
        """Square pixels."""
        return (self.x2 - self.x1) * (self.y2 - self.y1)

    def iou(self, other: Box) -> float:
        """Shared area over area of both."""
        width = min(self.x2, other.x2) - max(self.x1, other.x1)
        height = min(self.y2, other.y2) - max(self.y1, other.y1)
        shared = max(width, 0.0) * max(height, 0.0)
        union = self.area + other.area - shared
        return shared / union if union > 0 else 0.0

    def expand(self, share: float) -> Box:
        """A box that is larger by a share of its sides on each of them, inside the picture."""
        (width, height), dx, dy = self.image_size, self.x2 - self.x1, self.y2 - self.y1
        x1, x2 = (min(max(x, 0.0), width) for x in (self.x1 - share * dx, self.x2 + share * dx))
        y1, y2 = (min(max(y, 0.0), height) for y in (self.y1 - share * dy, self.y2 + share * dy))
        return replace(self, x1=x1, y1=y1, x2=x2, y2=y2)

    def crop(self, image: ImageInput) -> Image.Image:
        """This part of the picture, at least a pixel."""
        left, top = math.floor(self.x1), math.floor(self.y1)
        right, bottom = max(math.ceil(self.x2), left + 1), max(math.ceil(self.y2), top + 1)
        return load_image(cast(Any, image)).crop((left, top, right, bottom))

    def __str__(self) -> str:
        score = "" if self.score is None else f" {self.score:.2f}"
        return f"{self.label} [{', '.join(f'{value:.0f}' for value in self.xyxy)}]{score}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON: label, box in pixels to two places, score."""
        score = None if self.score is None else round(self.score, 4)
        return {"label": self.label, "box": [round(v, 2) for v in self.xyxy], "score": score}


# ---- boxes


def parse_boxes(text: str, size: Size) -> list[Box]:
    """The whole boxes in an answer, whatever else stands around them; never raises.

    Args:
        text: what a model wrote: JSON, with or without prose, fences and a torn end, coordinates
            from 0 to 1 or from 0 to 1000.
        size: (width, height) of the upright picture in pixels.
    """
    return without_duplicates(box for box, _, _ in _find_boxes(text, size))


def _find_boxes(text: str, size: Size) -> list[tuple[Box, int, int]]:
    """Boxes, and where each one's coordinates begin and end in the text."""
    found = list(_objects(text))
    # a thousandth is a whole number above 2; few boxes lie in the first two thousandths
    thousandths = sum(max(values) > 2 for _, values, _, _ in found)
    scale = 1000 if 2 * thousandths > len(found) or _are_small_integers(text, found) else 1
    boxes = []
    for label, values, start, stop in found:
        if min(values) >= -0.05 * scale and max(values) <= 1.05 * scale:
            (x1, x2), (y1, y2) = (
                sorted(min(max(v / scale, 0.0), 1.0) * side for v in values[axis::2])
                for axis, side in enumerate(size)
            )
            if x1 < x2 and y1 < y2:
                boxes.append((Box(label, x1, y1, x2, y2, size), start, stop))
    return boxes


Found = tuple[str, list[float], int, int]  # label, coordinates, and where these stand


def _are_small_integers(text: str, found: Sequence[Found]) -> bool:
    """Whether these are thousandths in a corner: no part of a unit is written as `bbox_2d`."""
    return "bbox_2d" in text and all(v == int(v) for _, values, _, _ in found for v in values)


def _objects(text: str) -> Iterator[Found]:
    decoder, place = json.JSONDecoder(), text.find("{")
    while place >= 0:
        value, end = _object_at(decoder, text, place)
        values = next((value[key] for key in BOX_KEYS if key in value), None)
        step = place + 1
        if isinstance(values, (list, tuple)) and len(values) == 4 and all(map(_is_number, values)):
            label = value.get("label", value.get("name", ""))
            array = BOX_ARRAY.search(text, place, end)
            if isinstance(label, str) and array is not None:
                yield label, [float(v) for v in values], array.start(1), array.end(1)
                step = end
        place = text.find("{", step)


def _object_at(decoder: json.JSONDecoder, text: str, place: int) -> tuple[dict[str, Any], int]:
    """A JSON object or flat Python dictionary, and its end; empty where there is none."""
    try:
        return decoder.raw_decode(text, place)
    except (ValueError, RecursionError):
        flat = re.compile(r"\{[^{}]{0,1000}\}").match(text, place)
    try:
        value = ast.literal_eval(flat[0]) if flat is not None else {}
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = {}
    return (value, flat.end()) if flat is not None and isinstance(value, dict) else ({}, place + 1)


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) < 1e6 and not math.isnan(value)


def without_duplicates(boxes: Iterable[Box]) -> list[Box]:
    """Each thing once: of boxes with one label and nearly one place, the surest."""
    kept: list[Box] = []
    for box in boxes:
        place = next(
            (i for i, k in enumerate(kept) if k.label == box.label and k.iou(box) > SAME), None
        )
        if place is None:
            kept.append(box)
        elif (box.score or 0.0) > (kept[place].score or 0.0):
            kept[place] = box
    return kept


def answers_thousandths(model: Lfm2VlForConditionalGeneration) -> bool:
    """Whether a model answers boxes from 0 to 1000."""
    return model.config.text_config.vocab_size >= THOUSANDTHS_VOCAB_SIZE


def detect_messages(query: str, thousandths: bool) -> list[dict[str, Any]]:
    """The question for boxes as the models were trained on it, with a place for the image."""
    text = (DETECT_THOUSANDTHS if thousandths else DETECT).format(query=query)
    content = [{"type": "image"}, {"type": "text", "text": text}]
    system = [{"role": "system", "content": SYSTEM_THOUSANDTHS}] if thousandths else []
    return [*system, {"role": "user", "content": content}]


def box_schema(thousandths: bool, label: str | None = None, max_boxes: int = MAX_BOXES) -> Any:
    """The JSON schema of an answer with boxes; with a label, no other may come."""
    hundredths = {"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.01}
    whole = {"type": "integer", "minimum": 0, "maximum": 1000}
    corner = whole if thousandths else hundredths
    corners = {"type": "array", "items": corner, "minItems": 4, "maxItems": 4}
    name = {"type": "string", "maxLength": 100} if label is None else {"const": label}
    properties: dict[str, Any] = {"label": name, "bbox": corners}
    if thousandths:
        properties = {"image_id": {"const": 0}, "bbox_2d": corners, "label": name}
    return {"type": "array", "items": _object_schema(properties), "maxItems": max_boxes}


def _object_schema(properties: dict[str, Any]) -> dict[str, Any]:
    closed = {"required": [*properties], "additionalProperties": False}
    return {"type": "object", "properties": properties, **closed}


def guided(schema: Any, close: bool = False) -> dict[str, Any]:
    """Settings that keep answers to a schema, if llguidance is installed.

    Without it the model answers freely, and what is whole of its answer is read.
    """
    return {"schema": schema, "close": close} if can_constrain() else {}


class Reading:
    """An answer, and how probable each of its tokens with a digit was.

    `add` is called in the thread that answers; afterwards `boxes` may be called in any.
    """

    def __init__(self) -> None:
        self.text = ""
        self.digits: list[tuple[int, int, Any]] = []

    def add(self, response: GenerationResponse) -> None:
        """Takes a response."""
        start = len(self.text)
        self.text += response.text
        if any(character.isdigit() for character in response.text):
            logprob = response.logprobs[response.token]
            mx.async_eval(logprob)  # so that not all of the vocabulary is kept
            self.digits.append((start, len(self.text), logprob))
        if response.finish_reason is not None:
            self.digits = [(first, last, log.item()) for first, last, log in self.digits]

    def boxes(self, size: Size) -> list[Box]:
        """The boxes in it with their scores; `size`: (width, height) of the picture."""
        boxes = []
        for box, start, stop in _find_boxes(self.text, size):
            logs = [log for first, last, log in self.digits if first < stop and last > start]
            boxes.append(replace(box, score=math.exp(math.fsum(logs) / len(logs))))
        return boxes


def detect_questions(
    processor: Lfm2VlProcessor,
    thousandths: bool,
    image: ImageInput,
    labels: str | Sequence[str],
    max_boxes: int = MAX_BOXES,
    max_tokens: int = MAX_TOKENS,
) -> list[Question]:
    """The questions of `detect`: one, or one for each label of a list."""
    queries: list[Any] = list(labels) if isinstance(labels, (list, tuple)) else [labels]
    if not queries or not all(isinstance(query, str) and query.strip() for query in queries):
        raise PromptError(f"labels are {labels!r:.200}; say what to look for, such as 'red car'")
    questions = []
    for query in queries:
        prompt = processor(detect_messages(query, thousandths), [image])
        schema = box_schema(thousandths, None if query is labels else query, max_boxes)
        settings: Any = {"max_tokens": max_tokens, "temperature": 0.0, **guided(schema)}
        questions.append(Question(prompt, **settings))
    return questions


def join_boxes(
    readings: Iterable[Reading], labels: str | Sequence[str], size: Size, max_boxes: int = MAX_BOXES
) -> list[Box]:
    """The boxes in the answers to `detect_questions`."""
    found: list[Box] = []
    names = [None] if isinstance(labels, str) else labels
    for name, reading in zip(names, readings, strict=True):
        boxes = without_duplicates(reading.boxes(size))[:max_boxes]
        found += boxes if name is None else [replace(box, label=name) for box in boxes]
    return without_duplicates(found)


def detect(
    model: Lfm2VlForConditionalGeneration,
    processor: Lfm2VlProcessor,
    image: ImageInput,
    labels: str | Sequence[str],
    *,
    max_boxes: int = MAX_BOXES,
    max_tokens: int = MAX_TOKENS,
    image_options: ImageOptions = NO_OPTIONS,
) -> list[Box]:
    """Finds things in a picture, greedily.

    Args:
        image: a path, URL, bytes, Pillow image or array.
        labels: a text says freely what to look for, and the model chooses the labels; of a list,
            each is asked about alone, and its boxes carry it. The picture is encoded once.
        max_boxes: for each label, at most.

    Raises:
        PromptError: nothing to look for.
        ImageError: the image cannot be read.
    """
    picture = load_image(cast(Any, image))
    processed = processor.image_processor(picture, image_options)
    thousandths = answers_thousandths(model)
    questions = detect_questions(processor, thousandths, processed, labels, max_boxes, max_tokens)
    readings = _read_answers(model, processor, questions)
    return join_boxes(readings, labels, picture.size, max_boxes)


def _read_answers(
    model: Lfm2VlForConditionalGeneration, processor: Lfm2VlProcessor, questions: list[Question]
) -> list[Reading]:
    """Answers questions about one picture together; it is encoded once."""
    features: dict[str, mx.array] = {}
    with memory_limits(model):
        engine = Engine(model, processor, max_rows=MAX_ROWS, fair=False)
        rows = (AnswerRow(model, processor, question, features) for question in questions)
        readings = {engine.begin(row): Reading() for row in rows}
        while not engine.is_idle:
            for row, response, error in engine.step():
                if error is not None:
                    raise error
                readings[row].add(response)
    return list(readings.values())


# ---- pages and forms


@dataclass(frozen=True)
class Block:
    """A region of a page.

    Attributes:
        box: its place; the label says of what kind it is.
        text: plain; LaTeX of equations, OTSL of tables, a description of pictures.
        page: which image, counted from 0.
    """

    box: Box
    text: str
    page: int = 0


def parse_layout(text: str, sizes: Sequence[Size]) -> list[Block]:
    """The whole blocks in an answer to `LAYOUT`; never raises. `sizes`: (width, height) by page."""
    heads = list(BLOCK.finditer(text))
    ends = [*(head.start() for head in heads[1:]), len(text)]
    blocks = []
    for head, end in zip(heads, ends, strict=False):
        page = int(head[1][:9])
        item = f'{{"bbox_2d": [{head[3]}], "label": {json.dumps(head[2])}}}'
        if page < len(sizes) and (boxes := parse_boxes(item, sizes[page])):
            blocks.append(Block(boxes[0], text[head.end() : end].strip(), page))
    return blocks


def layout(
    model: Lfm2VlForConditionalGeneration,
    processor: Lfm2VlProcessor,
    images: ImageInput | Sequence[ImageInput],
    *,
    max_tokens: int = 4 * MAX_TOKENS,
    image_options: ImageOptions = NO_OPTIONS,
) -> list[Block]:
    """The regions of one page or several in reading order, as LFM2.5-VL-3B was trained to tell.

    Raises:
        ImageError: an image cannot be read.
    """
    pages = [load_image(cast(Any, image)) for image in image_list(images)]
    settings: Any = {"max_tokens": max_tokens, "temperature": 0.0, "image_options": image_options}
    text = generate(model, processor, LAYOUT, pages, **settings)
    return parse_layout(text, [page.size for page in pages])


def extract(
    model: Lfm2VlForConditionalGeneration,
    processor: Lfm2VlProcessor,
    image: ImageInput,
    fields: Mapping[str, str],
    *,
    max_tokens: int = MAX_TOKENS,
    image_options: ImageOptions = NO_OPTIONS,
) -> dict[str, Any]:
    """Fields of a picture, as the Extract checkpoints were trained: YAML in the system message.

    Args:
        fields: a description for each name, such as `{"total": "the sum to be paid"}`.
        max_tokens: an answer that would be longer is cut, and what is missing of it is empty.

    Raises:
        PromptError: no fields.
        ImageError: the image cannot be read.
        AnswerError: the answer is no JSON object.
    """
    if not isinstance(fields, Mapping) or not fields:
        raise PromptError(f"fields are {fields!r:.200}; give a description for each name")
    lines = (f"{name}: {' '.join(str(text).split())}" for name, text in fields.items())
    messages: list[Message] = [
        {"role": "system", "content": "\n".join(lines)},
        {"role": "user", "content": [{"type": "image", "image": image}]},
    ]
    schema = _object_schema({name: {"type": "string"} for name in fields})
    settings: Any = {"max_tokens": max_tokens, "temperature": 0.0, "image_options": image_options}
    text = generate(model, processor, messages, **settings, **guided(schema, close=True))
    value, _ = _object_at(json.JSONDecoder(), text, max(text.find("{"), 0))
    if not value or not isinstance(value, dict):
        raise AnswerError(f"the answer is no JSON object: {text!r:.200}")
    return value


# ---- what others take

COLORS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#f032e6", "#9a6324")


def draw(image: ImageInput, boxes: Sequence[Box], min_side: int = 640) -> Image.Image:
    """The upright picture with a frame and a name for each box, one colour per label.

    A picture with smaller sides is enlarged by a whole number, so that names can be read.
    """
    from PIL import ImageDraw, ImageFont

    picture = load_image(cast(Any, image))
    zoom = max(1, min_side // max(picture.size))
    drawn = picture.resize((picture.width * zoom, picture.height * zoom))
    brush, line = ImageDraw.Draw(drawn), max(3, round(max(drawn.size) / 320))
    font = ImageFont.load_default(5 * line)
    labels = list(dict.fromkeys(box.label for box in boxes))
    for box in boxes:
        color = COLORS[labels.index(box.label) % len(COLORS)]
        x1, y1, x2, y2 = (float(value * zoom) for value in box.xyxy)
        for inset, thick, ink in ((0, line + 2, "white"), (1, line, color)):
            frame = (x1 - line + inset, y1 - line + inset, x2 + line - inset, y2 + line - inset)
            brush.rectangle(frame, outline=ink, width=thick)
        name = box.label if box.score is None else f"{box.label} {box.score:.2f}"
        _, _, width, height = brush.textbbox((line, line), name, font=font)
        left = min(max(x1 - line, 0), max(drawn.width - width - line, 0))
        above = y1 - height - 2 * line
        top = above if above >= 0 else y1
        brush.rectangle((left, top, left + width + line, top + height + line), color)
        brush.text((left + line, top + line), name, fill="white", font=font)
    return drawn


def to_coco(pictures: Mapping[str, tuple[Size, Sequence[Box]]]) -> dict[str, Any]:
    """COCO's data set of (size, boxes) by file name; annotations have scores, too."""
    labels = sorted({box.label for _, boxes in pictures.values() for box in boxes})
    images, annotations = [], list[dict[str, Any]]()
    for number, (name, ((width, height), boxes)) in enumerate(pictures.items(), 1):
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        for box in boxes:
            ids = {"id": len(annotations) + 1, "image_id": number}
            ids["category_id"] = labels.index(box.label) + 1
            place = [box.x1, box.y1, box.x2 - box.x1, box.y2 - box.y1]
            score = {} if box.score is None else {"score": box.score}
            annotations.append({**ids, "bbox": place, "area": box.area, "iscrowd": 0, **score})
    categories = [{"id": number, "name": label} for number, label in enumerate(labels, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def to_supervision(boxes: Sequence[Box]) -> Any:
    """`supervision.Detections`; the labels stand in `data["class_name"]`.

    Raises:
        OutputError: supervision is not installed.
    """
    try:
        import numpy as np
        import supervision
    except ImportError:
        raise OutputError("supervision is not installed: pip install supervision") from None
    labels = sorted({box.label for box in boxes})
    scores = [1.0 if box.score is None else box.score for box in boxes]
    return supervision.Detections(
        xyxy=np.array([box.xyxy for box in boxes], np.float32).reshape(-1, 4),
        confidence=np.array(scores, np.float32),
        class_id=np.array([labels.index(box.label) for box in boxes], int),
        data={"class_name": np.array([box.label for box in boxes], str)},
    )
