"""Caches after known beginnings of prompts, to continue from, and features of recent images.

A convolution state cannot be trimmed, so a beginning is reused where it was kept, or not at all:
after the system message, after images, after an answer.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from ..models.cache import Cache, cache_nbytes, copy_cache, is_long
from ..options import MOST, Bound, CacheOptions
from ..prompts.processor import Prompt, PromptImage

MAX_PREFIX_BYTES = 1 << 30
PREFIX_BYTES = Bound(int, 0, 1 << 50)
MOST_STOPS = 8  # beginnings of one prompt that end with an image

Key = tuple[str, Any]  # digest of tokens and images, and how keys and values are kept


class Entry(NamedTuple):
    """A cache and how many positions it holds, or the features of an image."""

    value: Any
    nbytes: int
    length: int


class PrefixStore:
    """What was read before, found by hash, bounded by bytes; the least recently used goes first.

    Whoever shares an engine shares its store.

    Attributes:
        max_bytes: what all entries may take together.
        nbytes: what they take.
        entries: caches by `Key`, features by digest, the least recently used first.
        features: the image features among them, by digest.
    """

    def __init__(self, max_bytes: int = MAX_PREFIX_BYTES) -> None:
        PREFIX_BYTES.check("max_bytes", max_bytes)
        self.max_bytes = max_bytes
        self.nbytes = 0
        self.entries: OrderedDict[Key | str, Entry] = OrderedDict()
        self.features: MutableMapping[str, mx.array] = Features(self)

    def places(self, prompt: Prompt) -> list[int]:
        """Lengths of the beginnings of a prompt that are worth keeping."""
        stops = [image.stop for image in prompt.images][::-1]
        # of a film's frames a few: each beginning is a copy of all before it
        chosen = stops[:: -(-len(stops) // MOST_STOPS) or 1]
        return sorted({prompt.system_length, *chosen} - {0})

    def known(self, prompt: Prompt, options: CacheOptions) -> int:
        """The length of the longest known beginning of a prompt."""
        return next((self.entries[key].length for key in self.keys(prompt, options)), 0)

    def find(self, prompt: Prompt, options: CacheOptions) -> list[Cache] | None:
        """A cache of one's own that holds the longest known beginning of a prompt."""
        for key in self.keys(prompt, options):
            self.entries.move_to_end(key)
            cache = copy_cache(self.entries[key].value)
            keep = options.keep if options.keep is not None else prompt.first_turn_length
            for entry in cache:
                entry.set_window(options.max_kv_size, 0 if options.max_kv_size is None else keep)
            return cache
        return None

    def keys(self, prompt: Prompt, options: CacheOptions) -> Iterator[Key]:
        """The keys of all known beginnings of a prompt, the longest first."""
        most = len(prompt.token_ids)
        lengths = sorted({entry.length for entry in self.entries.values() if entry.length < most})
        found = digests(prompt.token_ids, prompt.images, lengths)
        for length, digest in reversed(list(zip(lengths, found, strict=True))):
            key = (digest, _kind(prompt, options, length))
            if key in self.entries:
                yield key

    def put(
        self,
        token_ids: Sequence[int],
        prompt: Prompt,
        cache: Sequence[Cache],
        options: CacheOptions,
    ) -> None:
        """Keeps a copy of a cache that holds these tokens, the images of a prompt among them."""
        length = len(token_ids)
        [digest] = digests(token_ids, prompt.images, [length])
        twin = copy_cache(cache)
        mx.async_eval([entry.arrays for entry in twin])
        self.add((digest, _kind(prompt, options, length)), Entry(twin, cache_nbytes(twin), length))

    def add(self, key: Key | str, entry: Entry) -> None:
        """Keeps an entry, if it fits at all."""
        self.discard(key)
        self.entries[key] = entry
        self.nbytes += entry.nbytes
        while self.nbytes > self.max_bytes:
            self.discard(next(iter(self.entries)))

    def discard(self, key: Key | str) -> None:
        """Forgets an entry, if it is there."""
        if key in self.entries:
            self.nbytes -= self.entries.pop(key).nbytes

    def clear(self) -> None:
        """Forgets everything."""
        self.entries.clear()
        self.nbytes = 0


class Features(MutableMapping[str, mx.array]):
    """Image features (image tokens, hidden) by digest, as entries of a store."""

    def __init__(self, store: PrefixStore) -> None:
        self.store = store

    def __getitem__(self, digest: str) -> mx.array:
        features: mx.array = self.store.entries[digest].value
        self.store.entries.move_to_end(digest)
        return features

    def __setitem__(self, digest: str, features: mx.array) -> None:
        self.store.add(digest, Entry(features, features.nbytes, MOST))

    def __delitem__(self, digest: str) -> None:
        self.store.discard(digest)

    def __contains__(self, digest: object) -> bool:
        return digest in self.store.entries

    def __iter__(self) -> Iterator[str]:
        return (key for key in self.store.entries if isinstance(key, str))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def digests(
    token_ids: Sequence[int], images: Sequence[PromptImage], lengths: Sequence[int]
) -> list[str]:
    """A digest for each of some beginnings, ascending in length: tokens, and the images in them."""
    ids, found, start = array("I", token_ids), [], 0
    content = hashlib.blake2b(digest_size=16)
    stops = {image.stop: image.digest for image in images}
    for place in sorted({*lengths, *(stop for stop in stops if stop <= max(lengths, default=0))}):
        content.update(ids[start:place].tobytes())
        content.update(stops.get(place, "").encode())
        start = place
        if place in lengths:
            found.append(content.hexdigest())
    return found


def _kind(prompt: Prompt, options: CacheOptions, length: int) -> Any:
    """What sets caches of one beginning apart; those that are plain as yet are all alike."""
    if is_long(length, options):
        return options.kv_group_size, options.kv_bits, options.quantized_kv_start
    if options.max_kv_size is not None and length > options.max_kv_size:
        keep = options.keep if options.keep is not None else prompt.first_turn_length
        return options.max_kv_size, keep
    return None
