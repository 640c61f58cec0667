"""What decoding remembers: keys and values of attention layers, inputs of convolutions.

Duck-typed like `mlx_lm.models.cache`: `update_and_fetch`, `make_mask`, `state` for evaluation,
`offset` for positions. Offsets are Python ints.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import mlx.core as mx

from ..errors import PromptError
from ..options import CacheOptions


class Quantized(NamedTuple):
    """Keys or values as integers: packed, scales and biases, (batch, kv heads, positions, ...)."""

    packed: mx.array
    scales: mx.array
    biases: mx.array


class KVCache:
    """Keys and values that grow in blocks.

    Arrays are (batch, kv heads, positions, head dim). Room is made `step` positions at a time, so
    that most tokens write in place.
    """

    step = 256

    def __init__(self) -> None:
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.offset = 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Appends (batch, kv heads, new, head dim) and returns all positions so far."""
        start, self.offset = self.offset, self.offset + keys.shape[2]
        self.keys = _write(self.keys, keys, start, self.step)
        self.values = _write(self.values, values, start, self.step)
        return self.keys[..., : self.offset, :], self.values[..., : self.offset, :]

    @property
    def next_slot(self) -> int:
        """Where the next position goes."""
        return self.offset

    @property
    def room(self) -> int:
        """Slots, filled or not."""
        return 0 if self.keys is None else self.keys.shape[2]

    def make_room(self) -> None:
        """Grows where the next position has no slot."""
        if self.keys is not None and self.values is not None:
            self.keys = _grow(self.keys, self.offset, 1, self.step)
            self.values = _grow(self.values, self.offset, 1, self.step)

    def advance(self, state: list[mx.array]) -> None:
        """Takes over keys and values into which one more position was written."""
        self.keys, self.values = state
        self.offset += 1

    def make_mask(self, length: int) -> mx.array | str | None:
        """What `length` new tokens may see."""
        return "causal" if length > 1 else None

    def copy(self) -> KVCache:
        """A cache of its own, without the room for more."""
        twin = KVCache()
        twin.offset = self.offset
        if self.keys is not None and self.values is not None:
            twin.keys = mx.contiguous(self.keys[..., : self.offset, :])
            twin.values = mx.contiguous(self.values[..., : self.offset, :])
        return twin

    def to_quantized(self, group_size: int, bits: int) -> QuantizedKVCache:
        """The same positions as integers."""
        quantized = QuantizedKVCache(group_size, bits)
        if self.keys is not None and self.values is not None:
            used = slice(0, self.offset)
            quantized.update_and_fetch(self.keys[..., used, :], self.values[..., used, :])
        return quantized

    @property
    def state(self) -> list[mx.array]:
        return [] if self.keys is None or self.values is None else [self.keys, self.values]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.state)


class QuantizedKVCache:
    """As `KVCache`, in integers of `bits` bits with a scale for each group along the head."""

    step = 256

    def __init__(self, group_size: int, bits: int) -> None:
        self.group_size = group_size
        self.bits = bits
        self.keys: Quantized | None = None
        self.values: Quantized | None = None
        self.offset = 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Quantized, Quantized]:
        """Appends and returns all positions so far, as `quantized_attention` takes them."""
        start, self.offset = self.offset, self.offset + keys.shape[2]
        self.keys = self._append(self.keys, keys, start)
        self.values = self._append(self.values, values, start)
        return self._used(self.keys), self._used(self.values)

    def make_mask(self, length: int) -> mx.array | str | None:
        """What `length` new tokens may see."""
        return "causal" if length > 1 else None

    def copy(self) -> QuantizedKVCache:
        """A cache of its own, without the room for more."""
        twin = QuantizedKVCache(self.group_size, self.bits)
        twin.offset = self.offset
        if self.keys is not None and self.values is not None:
            twin.keys = Quantized(*map(mx.contiguous, self._used(self.keys)))
            twin.values = Quantized(*map(mx.contiguous, self._used(self.values)))
        return twin

    def _append(self, buffer: Quantized | None, new: mx.array, start: int) -> Quantized:
        parts = mx.quantize(new, group_size=self.group_size, bits=self.bits)
        buffers = buffer if buffer is not None else (None, None, None)
        return Quantized(
            *(_write(b, p, start, self.step) for b, p in zip(buffers, parts, strict=True))
        )

    def _used(self, buffer: Quantized) -> Quantized:
        return Quantized(*(part[..., : self.offset, :] for part in buffer))

    @property
    def state(self) -> list[mx.array]:
        return [] if self.keys is None or self.values is None else [*self.keys, *self.values]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.state)


class RotatingKVCache:
    """The first `keep` positions and a sliding window of the last ones, `max_size` in all.

    A token at position p sees the positions below `keep` and those above p - (max_size - keep).
    Positions stay absolute: keys carry their rotation, so slots need no order. Position p lives in
    slot p while there is room, and then in slot keep + (p - keep) mod (max_size - keep).
    """

    step = 256

    def __init__(self, max_size: int, keep: int) -> None:
        if not 0 <= keep < max_size:
            raise PromptError(f"keep is {keep}; it must be 0 or more, and below {max_size}")
        self.max_size = max_size
        self.keep = keep
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.offset = 0

    @property
    def window(self) -> int:
        """How many last positions a token sees, besides the pinned ones."""
        return self.max_size - self.keep

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Takes new positions; returns what they may see, in the order of `make_mask`."""
        length, start = keys.shape[2], self.offset
        self.offset += length
        if length == 1 or self.offset <= self.max_size:
            slot = self._slot(start)
            self.keys = _write(self.keys, keys, slot, self.step, self.max_size)
            self.values = _write(self.values, values, slot, self.step, self.max_size)
            used = min(self.offset, self.max_size)
            return self.keys[..., :used, :], self.values[..., :used, :]
        seen = self._seen(start, length)
        order = mx.array([self._slot(p) for p in seen if p < start], mx.uint32)
        all_keys = _join(self.keys, keys, order)
        all_values = _join(self.values, values, order)
        place = {position: i for i, position in enumerate(seen)}
        kept = [place[self._position(slot)] for slot in range(min(self.offset, self.max_size))]
        self.keys = all_keys[:, :, mx.array(kept)]
        self.values = all_values[:, :, mx.array(kept)]
        return all_keys, all_values

    @property
    def next_slot(self) -> int:
        """Where the next position goes."""
        return self._slot(self.offset)

    @property
    def room(self) -> int:
        """Slots, filled or not."""
        return 0 if self.keys is None else self.keys.shape[2]

    def make_room(self) -> None:
        """Grows where the next position has no slot."""
        slot = self.next_slot
        if self.keys is not None and self.values is not None:
            self.keys = _grow(self.keys, slot, 1, self.step, self.max_size)
            self.values = _grow(self.values, slot, 1, self.step, self.max_size)

    def advance(self, state: list[mx.array]) -> None:
        """Takes over keys and values into which one more position was written."""
        self.keys, self.values = state
        self.offset += 1

    def make_mask(self, length: int) -> mx.array | str | None:
        """What `length` new tokens may see: boolean (length, positions) where it is not plain."""
        if length == 1:
            return None
        if self.offset + length <= self.max_size:
            return "causal"
        keys = mx.array(self._seen(self.offset, length))
        queries = mx.arange(self.offset, self.offset + length)[:, None]
        return (keys <= queries) & ((keys < self.keep) | (keys > queries - self.window))

    def copy(self) -> RotatingKVCache:
        """A cache of its own, without the room for more."""
        twin = RotatingKVCache(self.max_size, self.keep)
        twin.offset = self.offset
        if self.keys is not None and self.values is not None:
            used = min(self.offset, self.max_size)
            twin.keys = mx.contiguous(self.keys[..., :used, :])
            twin.values = mx.contiguous(self.values[..., :used, :])
        return twin

    def _slot(self, position: int) -> int:
        if position < self.max_size:
            return position
        return self.keep + (position - self.keep) % self.window

    def _position(self, slot: int) -> int:
        """The newest position that lives in a slot."""
        if slot < self.keep or self.offset <= self.max_size:
            return slot
        last = self.offset - 1
        return last - (last - slot) % self.window

    def _seen(self, start: int, length: int) -> list[int]:
        """Positions that the tokens from `start` on may see: pinned, sliding, new."""
        pinned = min(self.keep, start)
        oldest = max(pinned, start - self.window)
        return [*range(pinned), *range(oldest, start + length)]

    @property
    def state(self) -> list[mx.array]:
        return [] if self.keys is None or self.values is None else [self.keys, self.values]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.state)


class BatchKVCache:
    """Keys and values of several conversations that decode together, one token at a time.

    All rows end at the same place and begin where their length says; what is before that is never
    seen. Rows may leave and join.
    """

    step = 256

    def __init__(self, rows: Sequence[KVCache]) -> None:
        self.lengths = [row.offset for row in rows]
        self.end = max(self.lengths)
        self.keys = mx.concatenate([_pad_left(row.keys, row.offset, self.end) for row in rows])
        self.values = mx.concatenate([_pad_left(row.values, row.offset, self.end) for row in rows])

    @property
    def offset(self) -> mx.array:
        """Position of the next token of each row, (batch,)."""
        return mx.array(self.lengths)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Appends one position (batch, kv heads, 1, head dim) to each row."""
        self.keys = _write(self.keys, keys, self.end, self.step)
        self.values = _write(self.values, values, self.end, self.step)
        self.end += 1
        self.lengths = [length + 1 for length in self.lengths]
        return self.keys[..., : self.end, :], self.values[..., : self.end, :]

    def make_mask(self, length: int) -> mx.array:
        """Boolean (batch, 1, 1, positions) for the next token."""
        if length != 1:
            raise PromptError(f"a batch decodes one token at a time, not {length}")
        starts = mx.array([self.end - length for length in self.lengths])
        return (mx.arange(self.end + 1) >= starts[:, None])[:, None, None]

    def filter(self, rows: list[int]) -> None:
        """Keeps these rows, and only as many positions as the longest of them has."""
        self.lengths = [self.lengths[row] for row in rows]
        longest = max(self.lengths)
        used = slice(self.end - longest, self.end)
        self.keys = mx.contiguous(self.keys[mx.array(rows)][..., used, :])
        self.values = mx.contiguous(self.values[mx.array(rows)][..., used, :])
        self.end = longest

    def extend(self, rows: Sequence[KVCache]) -> None:
        """Adds rows behind the present ones."""
        other = BatchKVCache(rows)
        end = max(self.end, other.end)
        self.keys = mx.concatenate(
            [_pad_left(self.keys, self.end, end), _pad_left(other.keys, other.end, end)]
        )
        self.values = mx.concatenate(
            [_pad_left(self.values, self.end, end), _pad_left(other.values, other.end, end)]
        )
        self.lengths, self.end = self.lengths + other.lengths, end

    @property
    def state(self) -> list[mx.array]:
        return [self.keys, self.values]


class ConvCache:
    """The last `conv_L_cache - 1` gated inputs of a short convolution.

    `inputs` is (batch, conv_L_cache - 1, hidden), or None before the first token.
    """

    def __init__(self) -> None:
        self.inputs: mx.array | None = None
        self.offset = 0

    def advance(self, state: list[mx.array]) -> None:
        """Takes over the inputs after one more position."""
        [self.inputs] = state
        self.offset += 1

    def copy(self) -> ConvCache:
        """A cache of its own; arrays are never written in place here, so they may be shared."""
        twin = ConvCache()
        twin.inputs, twin.offset = self.inputs, self.offset
        return twin

    def filter(self, rows: list[int]) -> None:
        """Keeps these rows of a batch."""
        assert self.inputs is not None
        self.inputs = self.inputs[mx.array(rows)]

    def extend(self, rows: Sequence[ConvCache]) -> None:
        """Adds rows behind the present ones."""
        present = [self.inputs] if self.inputs is not None else []
        self.inputs = mx.concatenate([*present, *(row.inputs for row in rows)])  # type: ignore[list-item]

    @property
    def state(self) -> list[mx.array]:
        return [] if self.inputs is None else [self.inputs]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.state)


AttentionCache = KVCache | QuantizedKVCache | RotatingKVCache | BatchKVCache
Cache = AttentionCache | ConvCache


def make_attention_cache(options: CacheOptions, prompt_length: int) -> KVCache | RotatingKVCache:
    """An empty cache for one attention layer.

    Raises:
        PromptError: the prompt does not fit into half of the window, and `keep` is not stated.
    """
    if options.max_kv_size is None:
        return KVCache()
    keep = options.keep
    if keep is None:
        keep = prompt_length
        if keep > options.max_kv_size // 2:
            raise PromptError(
                f"the prompt takes {prompt_length} positions, more than half of max_kv_size "
                f"{options.max_kv_size}; raise it to {2 * prompt_length}, or state keep"
            )
    return RotatingKVCache(options.max_kv_size, keep)


def quantize_caches(cache: list[Cache], options: CacheOptions) -> None:
    """Turns keys and values into integers, in place, once they are long enough."""
    if options.kv_bits is None:
        return
    for i, entry in enumerate(cache):
        if isinstance(entry, KVCache) and entry.offset >= options.quantized_kv_start:
            cache[i] = entry.to_quantized(options.kv_group_size, options.kv_bits)


def copy_cache(cache: Iterable[Cache]) -> list[Cache]:
    """A copy that shares nothing that is written in place."""
    copies: list[Cache] = []
    for entry in cache:
        assert not isinstance(entry, BatchKVCache)
        copies.append(entry.copy())
    return copies


def cache_nbytes(cache: Iterable[Cache]) -> int:
    """Bytes of all arrays of a cache."""
    return sum(array.nbytes for entry in cache for array in entry.state)


def _write(
    buffer: mx.array | None, new: mx.array, start: int, step: int, limit: int | None = None
) -> mx.array:
    """Writes positions from `start` on, making room in blocks up to `limit` positions."""
    length = new.shape[2]
    if buffer is None:
        buffer = mx.zeros((*new.shape[:2], 0, new.shape[3]), new.dtype)
    buffer = _grow(buffer, start, length, step, limit)
    buffer[..., start : start + length, :] = new
    return buffer


def _grow(
    buffer: mx.array, start: int, length: int, step: int, limit: int | None = None
) -> mx.array:
    """Room for `length` positions from `start` on; what is there stays where it is."""
    batch, heads, slots, dim = buffer.shape
    if start + length <= slots:
        return buffer
    room = -(-length // step) * step
    if limit is not None:
        room = min(room, limit - start)
    empty = mx.zeros((batch, heads, room, dim), buffer.dtype)
    return empty if start == 0 else mx.concatenate([buffer[..., :start, :], empty], axis=2)


def _join(buffer: mx.array | None, new: mx.array, order: mx.array) -> mx.array:
    return new if buffer is None else mx.concatenate([buffer[:, :, order], new], axis=2)


def _pad_left(array: mx.array | None, length: int, end: int) -> mx.array:
    """The first `length` positions, moved to end at `end`."""
    assert array is not None
    return mx.pad(array[..., :length, :], [(0, 0), (0, 0), (end - length, 0), (0, 0)])


def quantized_attention(
    queries: mx.array,
    keys: Quantized,
    values: Quantized,
    mask: mx.array | str | None,
    scale: float,
    group_size: int,
    bits: int,
) -> mx.array:
    """Attention over integers: (batch, heads, tokens, head dim) -> same.

    Queries of one group of heads share its keys and values, as in grouped-query attention.
    """
    batch, heads, length, dim = queries.shape
    kv_heads, positions = keys.packed.shape[1], keys.packed.shape[2]
    queries = (queries * scale).reshape(batch, kv_heads, heads // kv_heads, length, dim)
    keys, values = (Quantized(*(part[:, :, None] for part in parts)) for parts in (keys, values))
    scores = mx.quantized_matmul(
        queries,
        keys.packed,
        keys.scales,
        keys.biases,
        transpose=True,
        group_size=group_size,
        bits=bits,
    )
    if isinstance(mask, str):
        offset = positions - length
        mask = mx.arange(length)[:, None] + offset >= mx.arange(positions)
    if mask is not None:
        scores = mx.where(mask, scores, mx.finfo(scores.dtype).min)
    weights = mx.softmax(scores, axis=-1, precise=True)
    out = mx.quantized_matmul(
        weights,
        values.packed,
        values.scales,
        values.biases,
        transpose=False,
        group_size=group_size,
        bits=bits,
    )
    return out.reshape(batch, heads, length, dim)
