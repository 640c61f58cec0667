"""Caches after known beginnings of a prompt, to go on from there.

A convolution state cannot be trimmed, so a beginning is reused where it was kept, or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import SnapshotError
from ..models.cache import (
    Cache,
    ConvCache,
    KVCache,
    Quantized,
    QuantizedKVCache,
    RotatingKVCache,
    cache_nbytes,
    copy_cache,
)

FORMAT = "mlx_lfm2vl.session"
VERSION = 1


@dataclass(frozen=True)
class PrefixKey:
    """What a beginning consists of: its tokens, and a digest of each image in it."""

    token_ids: tuple[int, ...]
    image_digests: tuple[str, ...]

    def begins(self, token_ids: list[int], image_digests: list[str]) -> bool:
        """Whether a prompt begins like this, and goes on."""
        length, images = len(self.token_ids), len(self.image_digests)
        return (
            length < len(token_ids)
            and tuple(image_digests[:images]) == self.image_digests
            and tuple(token_ids[:length]) == self.token_ids
        )


class SnapshotStore:
    """Snapshots by prefix, bounded by bytes; the least recently used one leaves first."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.entries: OrderedDict[PrefixKey, list[Cache]] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes of all snapshots."""
        return sum(map(cache_nbytes, self.entries.values()))

    def put(self, key: PrefixKey, cache: list[Cache]) -> None:
        """Keeps a copy of a cache, where it fits at all."""
        self.entries.pop(key, None)
        twin = copy_cache(cache)
        mx.async_eval([entry.state for entry in twin])
        self.entries[key] = twin
        while self.nbytes > self.max_bytes:
            self.entries.popitem(last=False)

    def longest(
        self, token_ids: list[int], image_digests: list[str]
    ) -> tuple[int, list[Cache]] | None:
        """The longest known beginning of a prompt: its length and a copy of its cache."""
        known = [key for key in self.entries if key.begins(token_ids, image_digests)]
        if not known:
            return None
        best = max(known, key=lambda key: len(key.token_ids))
        self.entries.move_to_end(best)
        return len(best.token_ids), copy_cache(self.entries[best])

    def clear(self) -> None:
        """Forgets everything."""
        self.entries.clear()


def model_fingerprint(model: nn.Module) -> str:
    """A digest of all names, shapes and types of a model, and of the values of its norms."""
    content = hashlib.blake2b(digest_size=16)
    for name, array in tree_flatten(model.parameters()):
        content.update(f"{name} {array.shape} {array.dtype};".encode())
        if "language_model" in name and array.ndim == 1:
            content.update(bytes(memoryview(array.astype(mx.float32))))
    return content.hexdigest()


def describe(cache: Iterable[Cache]) -> list[dict[str, Any]]:
    """The numbers of a cache, to be written as JSON beside its arrays."""
    entries: list[dict[str, Any]] = []
    for entry in cache:
        about: dict[str, Any] = {"kind": type(entry).__name__, "offset": entry.offset}
        if isinstance(entry, RotatingKVCache):
            about |= {"max_size": entry.max_size, "keep": entry.keep}
        if isinstance(entry, QuantizedKVCache):
            about |= {"group_size": entry.group_size, "bits": entry.bits}
        entries.append(about)
    return entries


def rebuild(about: Iterable[Mapping[str, Any]], arrays: list[list[mx.array]]) -> list[Cache]:
    """A cache from what `describe` and `state` gave."""
    return [_rebuild_entry(*pair) for pair in zip(about, arrays, strict=True)]


def _rebuild_entry(about: Mapping[str, Any], arrays: list[mx.array]) -> Cache:
    if about["kind"] == "ConvCache":
        conv = ConvCache()
        (conv.inputs,), conv.offset = arrays, about["offset"]
        return conv
    if about["kind"] == "QuantizedKVCache":
        quantized = QuantizedKVCache(about["group_size"], about["bits"])
        quantized.keys, quantized.values = Quantized(*arrays[:3]), Quantized(*arrays[3:])
        quantized.offset = about["offset"]
        return quantized
    plain: KVCache | RotatingKVCache = KVCache()
    if about["kind"] == "RotatingKVCache":
        plain = RotatingKVCache(about["max_size"], about["keep"])
    (plain.keys, plain.values), plain.offset = arrays, about["offset"]
    return plain


def write_file(
    path: Path, fingerprint: str, data: Mapping[str, Any], arrays: Mapping[str, mx.array]
) -> None:
    """Writes a session beside its place and renames it, so that none is ever half there."""
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "fingerprint": fingerprint,
        "data": json.dumps(data),
    }
    handle, temporary = tempfile.mkstemp(suffix=".safetensors", dir=path.parent)
    os.close(handle)
    try:
        mx.save_safetensors(temporary, dict(arrays), metadata)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def read_file(path: Path, fingerprint: str) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """Reads a session.

    Raises:
        SnapshotError: with the reason why it is refused.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="mlx") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise SnapshotError(f"{path} cannot be read as a session: {error}") from None
    expected = {"format": FORMAT, "version": str(VERSION), "fingerprint": fingerprint}
    meaning = {"fingerprint": "it belongs to another model"}
    for key, value in expected.items():
        if metadata.get(key) != value:
            reason = meaning.get(key, f"its {key} is {metadata.get(key)}, not {value}")
            raise SnapshotError(f"{path} is refused: {reason}")
    arrays = mx.load(str(path))
    assert isinstance(arrays, dict)
    mx.eval(arrays)
    return json.loads(metadata["data"]), arrays
