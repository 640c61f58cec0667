"""A conversation as one safetensors file: messages, images, and what can be reused."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..checkpoints.writing import complete_file, save_arrays
from ..errors import SnapshotError, one_line
from ..models.cache import KINDS, Cache, cache_nbytes
from ..prompts.image_processor import ImageLayout, ProcessedImage
from ..prompts.messages import Message
from .prefixes import Entry, Key

FORMAT = "mlx_lfm2vl.session"
VERSION = 2

# what a file that was changed or cut makes of its reader
DAMAGE = (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError, RuntimeError,
          OverflowError, MemoryError)  # fmt: skip
Entries = Mapping[Key, Entry]
Contents = tuple[list[Message], list[Any], dict[Key, Entry]]


def model_fingerprint(model: nn.Module) -> str:
    """A digest of all names, shapes and types of a model, and of the values of its norms."""
    content = hashlib.blake2b(digest_size=16)
    for name, array in tree_flatten(model.parameters()):
        content.update(f"{name} {array.shape} {array.dtype};".encode())
        if "language_model" in name and array.ndim == 1:
            content.update(bytes(memoryview(array.astype(mx.float32))))
    return content.hexdigest()


def write_session(
    path: Path,
    model: nn.Module,
    messages: Sequence[Message],
    pending: Sequence[Any],
    entries: Entries,
) -> None:
    """Writes a session beside its place and renames it, so that none is ever half there."""
    images: dict[str, ProcessedImage] = {}
    arrays: dict[str, mx.array] = {}

    def number(image: Any) -> int:
        images.setdefault(image.digest, image)
        return list(images).index(image.digest)

    data: dict[str, Any] = {
        "messages": [map_images(message, number) for message in messages],
        # an image's number, or the time of a frame
        "pending": [item["text"] if "text" in item else number(item["image"]) for item in pending],
        "prefixes": [],
    }
    for n, ((digest, kind), entry) in enumerate(entries.items()):
        layers = [(type(layer).__name__, layer.meta, len(layer.state)) for layer in entry.value]
        about = {"digest": digest, "kind": kind, "length": entry.length, "layers": layers}
        data["prefixes"].append(about)
        for at, layer in enumerate(entry.value):
            arrays |= {f"prefix.{n}.{at}.{k}": array for k, array in enumerate(layer.state)}
    data["images"] = [_describe(image) for image in images.values()]
    pixels = (image.pixel_values for image in images.values())
    arrays |= {f"image.{n}": mx.array(values) for n, values in enumerate(pixels)}
    with complete_file(path) as new:
        written = new.with_suffix(".safetensors")  # MLX adds it to other names
        save_arrays(written, arrays, {**_header(model), "data": json.dumps(data)})
        os.replace(written, new)


def read_session(path: Path, model: nn.Module) -> Contents:
    """Messages, pending items and prefixes of a file.

    Raises:
        SnapshotError: with the reason why it is refused.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="mlx") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise SnapshotError(f"{path} cannot be read as a session: {error}") from None
    for key, value in _header(model).items():
        if metadata.get(key) != value:
            reason = f"its {key} is {metadata.get(key)}, not {value}"
            if key == "fingerprint":
                reason = "it belongs to another model"
            raise SnapshotError(f"{path} is refused: {reason}")
    try:
        arrays = mx.load(str(path), format="safetensors")
        assert isinstance(arrays, dict)
        mx.eval(arrays)
        return _contents(json.loads(metadata["data"]), arrays, model)
    except DAMAGE as error:
        raise SnapshotError(f"{path} is damaged: {one_line(str(error))[:300]}") from None


def _contents(data: Any, arrays: Mapping[str, mx.array], model: Any) -> Contents:
    images = [_image(about, arrays[f"image.{n}"]) for n, about in enumerate(data["images"])]
    entries: dict[Key, Entry] = {}
    for n, about in enumerate(data["prefixes"]):
        cache: list[Cache] = [
            KINDS[name].restore(meta, [arrays[f"prefix.{n}.{at}.{k}"] for k in range(count)])
            for at, (name, meta, count) in enumerate(about["layers"])
        ]
        _check_cache(cache, about["length"], model)
        kind = tuple(about["kind"]) if isinstance(about["kind"], list) else None
        entry = Entry(cache, cache_nbytes(cache), about["length"])
        entries[str(about["digest"]), kind] = entry

    def image(number: Any) -> ProcessedImage:
        _check(type(number) is int and 0 <= number < len(images), f"there is no image {number!r}")
        return images[number]

    messages = [_message(message, image) for message in data["messages"]]
    pending = [
        {"type": "text", "text": seen}
        if isinstance(seen, str)
        else {"type": "image", "image": image(seen)}
        for seen in data["pending"]
    ]
    return messages, pending, entries


def _message(message: Any, image: Callable[[Any], ProcessedImage]) -> Message:
    content = message["content"]
    items = content if isinstance(content, list) else [{"type": "text", "text": content}]
    _check(isinstance(message["role"], str), f"a message has the role {message['role']!r:.100}")
    texts = [item["text"] for item in items if item["type"] != "image"]
    _check(all(isinstance(text, str) for text in texts), "a message holds something else than text")
    return map_images(message, image)


def _check_cache(cache: Sequence[Cache], length: Any, model: Any) -> None:
    """A ValueError if a cache is not one of this model that holds so many positions."""
    fresh, dtype = model.make_cache(), model.language_model.model.embedding_norm.weight.dtype
    _check(len(cache) == len(fresh) and type(length) is int and length > 0, "layers are missing")
    for entry, like in zip(cache, fresh, strict=True):
        _check(entry.has_slots == like.has_slots, "a layer is of another kind")
        _check(
            entry.offset == length, f"a layer holds {entry.offset!r:.50} positions, not {length}"
        )
        found = [array.shape for array in entry.arrays]
        fitting = entry.shapes(model.config.text_config)
        _check(found == fitting, f"a layer has the shapes {found}, not {fitting}")
        floats = [array.dtype for array in entry.arrays if array.dtype != mx.uint32]
        _check(all(kind == dtype for kind in floats), f"a layer has values of {floats}")


def _check(good: bool, what: str) -> None:
    if not good:
        raise ValueError(what)


def _header(model: nn.Module) -> dict[str, str]:
    return {"format": FORMAT, "version": str(VERSION), "fingerprint": model_fingerprint(model)}


def _describe(image: ProcessedImage) -> dict[str, Any]:
    return {
        "spatial_shapes": image.spatial_shapes,
        "layout": (image.layout.rows, image.layout.cols, image.layout.whole),
        "view_tokens": image.view_tokens,
        "use_image_special_tokens": image.use_image_special_tokens,
    }


def _image(about: Mapping[str, Any], pixel_values: mx.array) -> ProcessedImage:
    import numpy as np

    rows, cols, whole = about["layout"]
    shapes, tokens = about["spatial_shapes"], about["view_tokens"]
    numbers = [rows, cols, *(whole or ()), *tokens, *(n for shape in shapes for n in shape)]
    _check(all(type(n) is int and n >= 0 for n in numbers), "an image has odd numbers of views")
    views = rows * cols + (whole is not None)
    _check(len(shapes) == len(tokens) == views > 0, f"an image has {len(shapes)} views")
    _check(type(about["use_image_special_tokens"]) is bool, "an image has no marks, nor none")
    patches = sum(rows * cols for rows, cols in shapes)
    _check(pixel_values.dtype == mx.uint8 and pixel_values.ndim == 2, "an image holds no pixels")
    _check(pixel_values.shape[0] == patches, f"an image has {pixel_values.shape[0]} patches")
    for (height, width), count in zip(shapes, tokens, strict=True):
        _check(count > 0 and height * width % count == 0, "an image has odd numbers of tokens")
    return ProcessedImage(
        tuple((rows, cols) for rows, cols in about["spatial_shapes"]),
        ImageLayout(rows, cols, None if whole is None else tuple(whole)),
        tuple(about["view_tokens"]),
        about["use_image_special_tokens"],
        np.array(pixel_values),
    )


def map_images(message: Message, change: Callable[[Any], Any]) -> Message:
    """The message, each of its images changed."""
    content = message["content"]
    if not isinstance(content, list):
        return message
    items = [
        {**item, "image": change(item["image"])} if item["type"] == "image" else item
        for item in content
    ]
    return {**message, "content": items}
