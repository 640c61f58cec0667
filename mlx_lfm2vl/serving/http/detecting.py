"""`/v1/detect`: boxes in a picture, with their scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...generation.grounding import (
    MAX_BOXES,
    Reading,
    Size,
    box_schema,
    detect_messages,
    join_boxes,
)
from ...options import MOST
from .asking import Ask, read_count, read_image, read_image_options
from .errors import refused
from .fields import Fields
from .running import Run

MAX_LABELS = 32


@dataclass
class DetectAsk(Ask):
    """A request for boxes.

    Attributes:
        labels: what to look for: a text, or several that are asked about one by one.
        max_boxes: for each label.
    """

    labels: str | list[str] = ""
    max_boxes: int = MAX_BOXES


def read_detect(body: Any) -> DetectAsk:
    """A request.

    Raises:
        HttpError: 400, naming what is wrong or not supported.
    """
    given = Fields(body)
    labels = given.need("query", str, list)
    several = labels if isinstance(labels, list) else [labels]
    good = all(isinstance(label, str) and label.strip() for label in several)
    if not (good and 1 <= len(several) <= MAX_LABELS):
        right = f"must be a text or 1 to {MAX_LABELS} of them, none empty"
        raise refused("query", right, labels)
    url, detail = given.need("image", str, dict), None
    if isinstance(url, dict):
        inner = Fields(url, "image")
        url, detail = inner.need("url", str), inner.get("detail", str)
        inner.end()
    image = read_image(url, detail, read_image_options(given), "image")
    ask = DetectAsk(
        model=given.get("model", str),
        messages=[{"role": "user", "content": [image]}],
        settings={},
        max_tokens=read_count(given, "max_tokens", 1, MOST),
        n=len(several),
        labels=labels,
        max_boxes=read_count(given, "max_boxes", 1, 1000, MAX_BOXES),
    )
    given.end()
    return ask


def write_detect(run: Run, readings: Sequence[Reading], size: Size) -> dict[str, Any]:
    """The response."""
    ask = run.ask
    assert isinstance(ask, DetectAsk)
    boxes = join_boxes(readings, ask.labels, size, ask.max_boxes)
    return {
        "object": "detection", "model": run.model,
        "image": {"width": size[0], "height": size[1]},
        "boxes": [box.to_dict() for box in boxes],
        "usage": run.usage(), "timings": run.timings(),
    }  # fmt: skip


def detection(thousandths: bool) -> dict[str, Any]:
    """How a model is asked for boxes in a conversation: `{query}` stands for what to look for."""
    *system, user = detect_messages("{query}", thousandths)
    return {
        "system": system[0]["content"] if system else None,
        "prompt": user["content"][-1]["text"],
        "schema": box_schema(thousandths),
    }
