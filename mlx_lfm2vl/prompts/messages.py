"""Conversations in the `transformers` form, and the images and films that stand in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..errors import PromptError
from .image_processor import ImageInput
from .video import MAX_PIXELS, each_frame

See = Callable[[Any], Any]  # what is to be kept of a picture of a film
Message = Mapping[str, Any]
Conversation = str | Sequence[Message]


def is_image(item: Any) -> bool:
    """Whether an item of a message's content is the place of an image."""
    return isinstance(item, Mapping) and item.get("type") in ("image", "image_url")


def is_video(item: Any) -> bool:
    """Whether an item of a message's content is a film."""
    return isinstance(item, Mapping) and item.get("type") in ("video", "video_url", "input_video")


def image_of(item: Mapping[str, Any]) -> Any:
    """The image that an item names, under any of its keys; None if it is one that comes beside."""
    return _named(item, ("image", "url", "path", "image_url"))


def video_of(item: Mapping[str, Any]) -> Any:
    """The film that an item names, under any of its keys; None if there is none."""
    return _named(item, ("video", "url", "path", "video_url"))


def _named(item: Mapping[str, Any], names: Sequence[str]) -> Any:
    found = next((item[name] for name in names if item.get(name) is not None), None)
    return found.get("url") if isinstance(found, Mapping) else found  # {"image_url": {"url": …}}


def frame_items(
    video: Any, frames: int | None, see: See, max_pixels: int = MAX_PIXELS
) -> Iterator[dict[str, Any]]:
    """What stands for a film in a message: each of its frames after its time.

    Args:
        frames, max_pixels: see `each_frame`.
        see: makes of each frame, a Pillow image, what the item is to hold.

    Raises:
        PromptError, ImageError: as `sample_video`.
    """
    for picture, seconds in each_frame(video, frames, max_pixels):
        yield {"type": "text", "text": f"{seconds:.1f} s:"}
        yield {"type": "image", "image": see(picture)}


def _with_frames(message: Message, see: See) -> Message:
    """A message whose films have become frames."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, (list, tuple)) or not any(map(is_video, content)):
        return message
    items: list[Any] = []
    for item in content:
        if not is_video(item):
            items.append(item)
            continue
        film = video_of(item)
        if film is None:
            raise PromptError(
                f"the film {item!r:.200} has no video; it must be a path, URL or bytes"
            )
        items += frame_items(film, item.get("frames"), see)
    return {**message, "content": items}


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
