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
from ..errors import SnapshotError
from ..models.cache import KINDS, Cache, cache_nbytes
from ..prompts.image_processor import ImageInput, ImageLayout, ProcessedImage
from ..prompts.messages import Message
from .prefixes import Entry, Key

FORMAT = "mlx_lfm2vl.session"
VERSION = 2

Entries = Mapping[Key, Entry]
Contents = tuple[list[Message], list[ImageInput], dict[Key, Entry]]


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
    pending: Sequence[ImageInput],
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
        "pending": [number(image) for image in pending],
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
    """Messages, pending images and prefixes of a file.

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
        return _contents(json.loads(metadata["data"]), arrays)
    except (KeyError, TypeError, ValueError, IndexError, RecursionError, RuntimeError) as error:
        raise SnapshotError(f"{path} is damaged: {type(error).__name__}: {error}") from None


def _contents(data: Mapping[str, Any], arrays: Mapping[str, mx.array]) -> Contents:
    images = [_image(about, arrays[f"image.{n}"]) for n, about in enumerate(data["images"])]
    entries: dict[Key, Entry] = {}
    for n, about in enumerate(data["prefixes"]):
        cache: list[Cache] = [
            KINDS[name].restore(meta, [arrays[f"prefix.{n}.{at}.{k}"] for k in range(count)])
            for at, (name, meta, count) in enumerate(about["layers"])
        ]
        kind = tuple(about["kind"]) if isinstance(about["kind"], list) else None
        entry = Entry(cache, cache_nbytes(cache), int(about["length"]))
        entries[str(about["digest"]), kind] = entry
    messages = [map_images(message, lambda n: images[n]) for message in data["messages"]]
    return messages, [images[n] for n in data["pending"]], entries


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
