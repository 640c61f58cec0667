"""Conversations in the `transformers` form, and the images that stand in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import PromptError
from .image_processor import ImageInput

Message = Mapping[str, Any]
Conversation = str | Sequence[Message]


def is_image(item: Any) -> bool:
    """Whether an item of a message's content is the place of an image."""
    return isinstance(item, Mapping) and item.get("type") in ("image", "image_url")


def image_of(item: Mapping[str, Any]) -> Any:
    """The image that an item names, under any of its keys; None if it is one that comes beside."""
    names = ("image", "url", "path", "image_url")
    image = next((item[name] for name in names if item.get(name) is not None), None)
    return image.get("url") if isinstance(image, Mapping) else image  # {"image_url": {"url": …}}


def _image_list(images: ImageInput | Sequence[ImageInput] | None) -> list[ImageInput]:
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]  # type: ignore[list-item]


def _without_images(message: Message, later: Iterable[ImageInput], found: list[Any]) -> Message:
    if not isinstance(message, Mapping) or "role" not in message:
        raise PromptError(
            f"message {message!r:.200} has no role; it must be a dict with role and content"
        )
    content = message.get("content")
    if not isinstance(content, (list, tuple)):
        return message
    items = []
    for item in content:
        if not is_image(item):
            items.append(item)
            continue
        image = image_of(item)
        if image is None:
            image = next(iter(later), None)
        if image is None:
            raise PromptError("the messages have more image places than images were given")
        found.append(image)
        items.append({"type": "image"})
    return {**message, "content": items}
