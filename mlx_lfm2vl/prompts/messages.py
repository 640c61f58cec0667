"""Conversations in the `transformers` form, and the images that stand in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import PromptError
from .image_processor import ImageInput

Message = Mapping[str, Any]
Conversation = str | Sequence[Message]


def _image_list(images: ImageInput | Sequence[ImageInput] | None) -> list[ImageInput]:
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]  # type: ignore[list-item]


def _without_images(message: Message, later: Iterable[ImageInput], found: list[Any]) -> Message:
    if not isinstance(message, Mapping) or "role" not in message:
        raise PromptError(
            f"message {message!r} has no role; it must be a dict with role and content"
        )
    content = message.get("content")
    if not isinstance(content, (list, tuple)):
        return message
    items = []
    for item in content:
        if not isinstance(item, Mapping) or item.get("type") not in ("image", "image_url"):
            items.append(item)
            continue
        image = next((item[k] for k in ("image", "url", "path", "image_url") if k in item), None)
        if isinstance(image, Mapping):  # {"image_url": {"url": …}}
            image = image.get("url")
        if image is None:
            image = next(iter(later), None)
        if image is None:
            raise PromptError("the messages have more image places than images were given")
        found.append(image)
        items.append({"type": "image"})
    return {**message, "content": items}
