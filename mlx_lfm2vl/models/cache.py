"""What decoding remembers: keys and values of attention layers, inputs of convolutions.

Each kind is one class with one protocol, duck-typed like `mlx_lm.models.cache`: `offset` for
positions, `make_mask`, `update_and_fetch` and `attend` for a pass, `state` for what lies on the
device, `copy`, `meta` and `restore` to keep it, and `padded` and `traced` to decode in rows.
Offsets and slots are Python ints.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from ..errors import PromptError
from ..options import CacheOptions
from .config import Lfm2Config
from .layers import backend

BLOCK = 256  # slots; buffers grow by so many, so that most tokens write in place
CPU_BLOCK = 128  # tokens that attend together


class Step(NamedTuple):
    """Where the tokens of a traced step stand, one per row; each (rows,).

    Attributes:
        offset: position of the token.
        slot: where its keys and values go.
        last: the last slot that it sees.
        before: where those of the token before go, which these buffers lack; None if they do not.
    """

    offset: mx.array
    slot: mx.array
    last: mx.array
    before: mx.array | None = None


class Quantized(NamedTuple):
    """Keys or values as integers: packed, scales and biases, (batch, kv heads, positions, ...)."""

    packed: mx.array
    scales: mx.array
    biases: mx.array


class KVCache:
    """Keys and values in numbered slots: all of them, or the first `keep` and a sliding window.

    With a window, a token at position p sees the positions below `keep` and those above
    p - (max_size - keep). Positions stay absolute: keys carry their rotation, so slots need no
    order. Position p lives in slot p while there are slots left, and then in slot
    keep + (p - keep) mod (max_size - keep).

    Attributes:
        offset: position of the next token.
        arrays: buffers (batch, kv heads, slots, ...), keys and then values.
    """

    has_slots = True

    def __init__(self, max_size: int | None = None, keep: int = 0) -> None:
        self.offset = 0
        self.arrays: list[mx.array] = []
        self.max_size = max_size
        self.keep = keep
        if max_size is not None and not 0 <= keep < max_size:
            raise PromptError(f"keep is {keep}; it must be 0 or more, and below {max_size}")

    @property
    def kind(self) -> tuple[Any, ...]:
        """Equal for caches whose rows may decode together."""
        return (type(self).__name__,)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Takes (batch, kv heads, new, head dim); returns what is seen, as `make_mask` has it."""
        new, length, start = self._parts(keys, values), keys.shape[2], self.offset
        self.offset += length
        if length == 1 or self.max_size is None or self.offset <= self.max_size:
            slot = self.slot(start)
            buffers: Sequence[mx.array | None] = self.arrays or [None] * len(new)
            self.arrays = [_write(b, part, slot) for b, part in zip(buffers, new, strict=True)]
            return self._pair([array[..., : self.used, :] for array in self.arrays])
        seen = self._seen(start, length)
        if start > 0:
            before = mx.array([self.slot(p) for p in seen if p < start], mx.uint32)
            pairs = zip(self.arrays, new, strict=True)
            new = [mx.concatenate([array[:, :, before], part], axis=2) for array, part in pairs]
        place = {position: i for i, position in enumerate(seen)}
        kept = mx.array([place[self._position(slot)] for slot in range(self.used)])
        self.arrays = [part[:, :, kept] for part in new]
        return self._pair(new)

    def attend(
        self, queries: mx.array, keys: Any, values: Any, mask: mx.array | str | None, scale: float
    ) -> mx.array:
        """Attention over what `update_and_fetch` gave, (batch, heads, tokens, head dim) -> same."""
        return attention(queries, keys, values, mask, scale)

    def make_mask(self, length: int) -> mx.array | str | None:
        """What `length` new tokens may see: boolean (length, positions) if it is not plain."""
        if length == 1:
            return None
        if self.max_size is None or self.offset + length <= self.max_size:
            return "causal"
        keys = mx.array(self._seen(self.offset, length))
        queries = mx.arange(self.offset, self.offset + length)[:, None]
        window = self.max_size - self.keep
        return (keys <= queries) & ((keys < self.keep) | (keys > queries - window))

    def slot(self, position: int) -> int:
        """Where a position lives, or will."""
        if self.max_size is None or position < self.max_size:
            return position
        return self.keep + (position - self.keep) % (self.max_size - self.keep)

    @property
    def used(self) -> int:
        """Slots that hold something."""
        return self.offset if self.max_size is None else min(self.offset, self.max_size)

    @property
    def capacity(self) -> int:
        """Slots, used or not."""
        return self.arrays[0].shape[2] if self.arrays else 0

    def reserve(self, slots: int) -> None:
        """Makes capacity for so many slots, in whole blocks."""
        if self.arrays and slots > self.capacity:
            self.arrays = self.padded(self.state, blocks(slots))

    @staticmethod
    def padded(arrays: Sequence[mx.array], capacity: int) -> list[mx.array]:
        """State with empty slots at its end."""
        more = [(0, 0), (0, 0), (0, capacity - arrays[0].shape[2]), (0, 0)]
        return [mx.pad(array, more) if more[2][1] > 0 else array for array in arrays]

    def traced(self, arrays: Sequence[mx.array], step: Step) -> _InStep:
        """This kind inside of a traced step, its arrays those of all rows."""
        return KVStep().begin(arrays, step)

    def set_window(self, max_size: int | None, keep: int = 0) -> None:
        """Another window, for a cache that nothing has left yet, nor would have in the new one."""
        self.max_size, self.keep = max_size, keep

    def copy(self) -> KVCache:
        """A cache of its own, without capacity for more."""
        return self.restore(self.meta, [mx.contiguous(array) for array in self.state])

    def to_quantized(self, group_size: int, bits: int) -> QuantizedKVCache:
        """The same positions as integers."""
        quantized = QuantizedKVCache(group_size, bits)
        if self.arrays:
            quantized.update_and_fetch(*self.state)
        return quantized

    @property
    def state(self) -> list[mx.array]:
        """What lies on the device, without empty slots."""
        return [array[..., : self.used, :] for array in self.arrays]

    @property
    def meta(self) -> dict[str, Any]:
        """What `restore` needs besides the state, for JSON."""
        return {"offset": self.offset, "max_size": self.max_size, "keep": self.keep}

    @classmethod
    def restore(cls, meta: Mapping[str, Any], state: Sequence[mx.array]) -> KVCache:
        """A cache from what `meta` and `state` gave."""
        cache = cls(meta["max_size"], meta["keep"])
        cache.offset, cache.arrays = meta["offset"], list(state)
        return cache

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    def shapes(self, config: Lfm2Config) -> list[tuple[int, ...]]:
        """What its state must look like in a model of this configuration."""
        return [
            (1, config.num_key_value_heads, self.used, width)
            for width in self._widths(config.head_dim)
        ]

    def _widths(self, head_dim: int) -> list[int]:
        return [head_dim, head_dim]

    def _parts(self, keys: mx.array, values: mx.array) -> list[mx.array]:
        """Keys and values as they are stored."""
        return [keys, values]

    def _pair(self, arrays: Sequence[mx.array]) -> tuple[Any, Any]:
        """Stored arrays as keys and values."""
        return arrays[0], arrays[1]

    def _position(self, slot: int) -> int:
        """The newest position that lives in a slot."""
        assert self.max_size is not None
        if slot < self.keep or self.offset <= self.max_size:
            return slot
        last = self.offset - 1
        return last - (last - slot) % (self.max_size - self.keep)

    def _seen(self, start: int, length: int) -> list[int]:
        """Positions that the tokens from `start` on may see: pinned, sliding, new."""
        assert self.max_size is not None
        pinned = min(self.keep, start)
        oldest = max(pinned, start - (self.max_size - self.keep))
        return [*range(pinned), *range(oldest, start + length)]


class QuantizedKVCache(KVCache):
    """As `KVCache`, in integers of `bits` bits with a scale for each group along the head."""

    def __init__(self, group_size: int, bits: int) -> None:
        super().__init__()
        self.group_size = group_size
        self.bits = bits

    @property
    def kind(self) -> tuple[Any, ...]:
        return (type(self).__name__, self.group_size, self.bits)

    def attend(
        self, queries: mx.array, keys: Any, values: Any, mask: mx.array | str | None, scale: float
    ) -> mx.array:
        return quantized_attention(
            queries, keys, values, mask, scale, group_size=self.group_size, bits=self.bits
        )

    def traced(self, arrays: Sequence[mx.array], step: Step) -> _InStep:
        return QuantizedKVStep(self.group_size, self.bits).begin(arrays, step)

    @property
    def meta(self) -> dict[str, Any]:
        return {"offset": self.offset, "group_size": self.group_size, "bits": self.bits}

    @classmethod
    def restore(cls, meta: Mapping[str, Any], state: Sequence[mx.array]) -> KVCache:
        cache = cls(meta["group_size"], meta["bits"])
        cache.offset, cache.arrays = meta["offset"], list(state)
        return cache

    def _widths(self, head_dim: int) -> list[int]:
        groups = head_dim // self.group_size
        return [head_dim * self.bits // 32, groups, groups] * 2

    def _parts(self, keys: mx.array, values: mx.array) -> list[mx.array]:
        size, bits = self.group_size, self.bits
        return [*mx.quantize(keys, size, bits), *mx.quantize(values, size, bits)]

    def _pair(self, arrays: Sequence[mx.array]) -> tuple[Any, Any]:
        return Quantized(*arrays[:3]), Quantized(*arrays[3:])


class _InStep(KVCache):
    """While a step is traced: positions are arrays, one per row, and all slots are looked at.

    Attributes:
        arrays: buffers of all rows.
        latest: keys and values of the last token, if the buffers take them a step later.
    """

    def begin(self, arrays: Sequence[mx.array], step: Step) -> _InStep:
        """Takes in what `state` gave."""
        count = len(arrays) if step.before is None else len(arrays) // 2
        self.arrays, self.latest = list(arrays[:count]), list(arrays[count:])
        self.step, self.offset = step, step.offset  # type: ignore[assignment]
        return self

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        new = self._parts(keys, values)
        if self.step.before is not None:
            self._put(self.latest, self.step.before)
            self.latest = new
        self._put(new, self.step.slot)
        return self._pair(self.arrays)

    def _put(self, parts: Sequence[mx.array], slots: mx.array) -> None:
        places, pairs = slots[:, None, None, None], zip(self.arrays, parts, strict=True)
        self.arrays = [mx.put_along_axis(array, places, part, axis=2) for array, part in pairs]

    def make_mask(self, length: int) -> mx.array:
        """Boolean (rows, 1, 1, slots)."""
        return mx.arange(self.capacity) <= self.step.last[:, None, None, None]

    @property
    def state(self) -> list[mx.array]:
        return [*self.arrays, *self.latest]


class KVStep(_InStep):
    """`KVCache` in a traced step."""


class QuantizedKVStep(_InStep, QuantizedKVCache):
    """`QuantizedKVCache` in a traced step."""


class ConvCache:
    """The last `conv_L_cache - 1` gated inputs of a short convolution.

    Attributes:
        offset: position of the next token.
        arrays: the inputs, each (batch, 1, hidden), the oldest first; none before the first token.
            They are never written in place, so copies may share them.
    """

    has_slots = False

    def __init__(self, offset: int = 0, arrays: Sequence[mx.array] = ()) -> None:
        self.offset = offset
        self.arrays = list(arrays)

    def reserve(self, slots: int) -> None:
        """There is nothing to grow."""

    @staticmethod
    def padded(arrays: Sequence[mx.array], capacity: int) -> list[mx.array]:
        """State as it is."""
        return list(arrays)

    def traced(self, arrays: Sequence[mx.array], step: Step) -> ConvCache:
        """This kind inside of a traced step."""
        return ConvCache(0, arrays)

    def set_window(self, max_size: int | None, keep: int = 0) -> None:
        """A convolution has its own."""

    def copy(self) -> ConvCache:
        """A cache of its own."""
        return ConvCache(self.offset, self.arrays)

    def shapes(self, config: Lfm2Config) -> list[tuple[int, ...]]:
        """What its state must look like in a model of this configuration."""
        return [(1, 1, config.hidden_size)] * (config.conv_L_cache - 1)

    @property
    def state(self) -> list[mx.array]:
        return self.arrays

    @property
    def meta(self) -> dict[str, Any]:
        return {"offset": self.offset}

    @classmethod
    def restore(cls, meta: Mapping[str, Any], state: Sequence[mx.array]) -> ConvCache:
        """A cache from what `meta` and `state` gave."""
        # older files hold the inputs as one array
        return cls(meta["offset"], [x for a in state for x in mx.split(a, a.shape[1], axis=1)])

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)


Cache = KVCache | ConvCache
KINDS: Mapping[str, type[Cache]] = {
    kind.__name__: kind for kind in (KVCache, QuantizedKVCache, ConvCache)
}


def blocks(slots: int) -> int:
    """The next whole number of blocks, in slots."""
    return -(-slots // BLOCK) * BLOCK


def make_attention_cache(options: CacheOptions, first_turn: int) -> KVCache:
    """An empty cache for one attention layer.

    Raises:
        PromptError: the first turn does not fit into half of the window, and `keep` is not given.
    """
    size, keep = options.max_kv_size, options.keep
    if size is not None and keep is None:
        keep = first_turn
        if keep > size // 2:
            raise PromptError(
                f"the first turn takes {first_turn} positions, more than half of max_kv_size "
                f"{size}; raise it to {2 * first_turn}, or give keep"
            )
    return KVCache(size, keep if keep is not None else 0)


def quantize_caches(cache: list[Cache], options: CacheOptions) -> None:
    """Turns keys and values into integers, in place, once they are long enough."""
    for i, entry in enumerate(cache):
        if type(entry) is KVCache and is_long(entry.offset, options):
            assert options.kv_bits is not None
            cache[i] = entry.to_quantized(options.kv_group_size, options.kv_bits)


def is_long(offset: int, options: CacheOptions) -> bool:
    """Whether keys and values of so many positions are integers."""
    return options.kv_bits is not None and offset >= options.quantized_kv_start


def copy_cache(cache: Iterable[Cache]) -> list[Cache]:
    """A copy that shares nothing that is written in place."""
    return [entry.copy() for entry in cache]


def cache_nbytes(cache: Iterable[Cache]) -> int:
    """Bytes of all arrays of a cache."""
    return sum(entry.nbytes for entry in cache)


def _write(buffer: mx.array | None, new: mx.array, start: int) -> mx.array:
    """Writes positions from slot `start` on, growing in blocks."""
    stop = start + new.shape[2]
    if buffer is None or (start == 0 and stop > buffer.shape[2]):
        buffer = mx.zeros((*new.shape[:2], blocks(stop), new.shape[3]), new.dtype)
    elif stop > buffer.shape[2]:
        [buffer] = KVCache.padded([buffer[..., :start, :]], blocks(stop))
    buffer[..., start:stop, :] = new
    return buffer


def attention(
    queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array | str | None, scale: float
) -> mx.array:
    """Grouped-query attention, (batch, heads, tokens, head dim) -> same; the tokens are the last.

    A CPU computes scores that a causal mask hides before it throws them away; there, tokens are
    taken in blocks, so that they are few.
    """
    length, before = queries.shape[2], keys.shape[2] - queries.shape[2]
    step = CPU_BLOCK if isinstance(mask, str) and backend() == "cpu" else length
    parts = []
    for start in range(0, length, step):
        end = before + min(start + step, length)
        block = queries[:, :, start : start + step], keys[:, :, :end], values[:, :, :end]
        parts.append(mx.fast.scaled_dot_product_attention(*block, scale=scale, mask=mask))
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)


def quantized_attention(
    queries: mx.array,
    keys: Quantized,
    values: Quantized,
    mask: mx.array | str | None,
    scale: float,
    *,
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
    scores = mx.quantized_matmul(queries, *keys, True, group_size, bits)
    if isinstance(mask, str):
        mask = causal_mask(length, positions - length)
    if mask is not None:
        # (rows, 1, tokens, positions) -> also over the groups of heads
        mask = mask[:, :, None] if mask.ndim == 4 else mask
        scores = mx.where(mask, scores, mx.finfo(scores.dtype).min)
    weights = mx.softmax(scores, axis=-1, precise=True)
    out = mx.quantized_matmul(weights, *values, False, group_size, bits)
    return out.reshape(batch, heads, length, dim)


def causal_mask(length: int, offset: int) -> mx.array:
    """Boolean (length, offset + length): tokens see themselves and what came before."""
    return mx.arange(length)[:, None] + offset >= mx.arange(length + offset)
