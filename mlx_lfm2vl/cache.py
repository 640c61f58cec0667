"""What decoding remembers: keys and values of attention layers, inputs of convolutions.

Duck-typed like `mlx_lm.models.cache`: `state` for evaluation, `offset` for positions. Offsets are
Python ints.
"""

from __future__ import annotations

import mlx.core as mx


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
    def state(self) -> list[mx.array]:
        return [] if self.keys is None or self.values is None else [self.keys, self.values]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.state)


class ConvCache:
    """The last `conv_L_cache - 1` gated inputs of a short convolution.

    `state_array` is (batch, conv_L_cache - 1, hidden) or None before the first token.
    """

    def __init__(self) -> None:
        self.inputs: mx.array | None = None
        self.offset = 0

    @property
    def state(self) -> list[mx.array]:
        return [] if self.inputs is None else [self.inputs]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.state)


Cache = KVCache | ConvCache


def _write(buffer: mx.array | None, new: mx.array, start: int, step: int) -> mx.array:
    batch, heads, length, dim = new.shape
    if buffer is None or start + length > buffer.shape[2]:
        blocks = -(-length // step)
        room = mx.zeros((batch, heads, blocks * step, dim), new.dtype)
        buffer = room if buffer is None else mx.concatenate([buffer[..., :start, :], room], axis=2)
    buffer[..., start : start + length, :] = new
    return buffer
