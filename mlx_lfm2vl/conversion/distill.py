"""Trains what a quantized model keeps in floating point until it answers as the source does."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from .rounding import Rounded

PACE = 10  # so that a learning rate of 0.001 moves the ends of a range by 0.01 of a step


class RoundedMatrix(nn.Module):
    """A matrix in integers whose ranges can be trained: both ends of each group's.

    Attributes:
        low, high: (rows, groups) how far the ends of the range moved, in steps / `PACE`.
    """

    def __init__(self, start: Rounded, bias: mx.array | None = None) -> None:
        super().__init__()
        self._start = start  # an underscore keeps it out of the parameters
        self._dtype = start.scales.dtype
        shape = start.scales.shape
        self.low, self.high = mx.zeros(shape), mx.zeros(shape)
        if bias is not None:
            self.bias = bias

    def rounded(self) -> Rounded:
        """The matrix as it would be stored now."""
        scales, biases = self._start.scales.astype(mx.float32), self._start.biases
        top = 2**self._start.bits - 1
        return self._start._replace(
            scales=(scales * (1 + PACE * (self.high - self.low) / top)).astype(self._dtype),
            biases=(biases + scales * PACE * self.low).astype(self._dtype),
        )

    def values(self, rows: mx.array | None = None) -> mx.array:
        """(rows, columns), all or some of them."""
        now = self.rounded()
        codes, scales, biases = now.codes, now.scales, now.biases
        if rows is not None:
            codes, scales, biases = codes[rows], scales[rows], biases[rows]
        groups = codes.reshape(*scales.shape, -1).astype(mx.float32)
        return (groups * scales[..., None] + biases[..., None]).reshape(codes.shape)

    @property
    def weight(self) -> mx.array:
        return self.values()


class RoundedLinear(RoundedMatrix):
    """In the place of `nn.Linear`."""

    def __call__(self, x: mx.array) -> mx.array:
        out = x @ self.values().T
        return out + self.bias if "bias" in self else out


class RoundedEmbedding(RoundedMatrix):
    """In the place of `nn.Embedding`."""

    def __call__(self, ids: mx.array) -> mx.array:
        return self.values(ids)

    def as_linear(self, x: mx.array) -> mx.array:
        return x @ self.values().T
