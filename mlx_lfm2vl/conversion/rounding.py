"""Integers for the values of a matrix: packing as MLX does it, and rounding that looks ahead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

ROWS_AT_ONCE = 1024
DAMPING = 0.1  # of a Hessian, as a share of its mean diagonal
CLIPS = (1.0, 0.94, 0.88, 0.82, 0.76, 0.7, 0.62, 0.54)


class Rounded(NamedTuple):
    """A matrix in integers: its value is codes · scale + bias, in groups of a row.

    Attributes:
        codes: (rows, columns) uint8.
        scales, biases: (rows, groups) in the type in which they are stored.
        bits: of a code.
    """

    codes: mx.array
    scales: mx.array
    biases: mx.array
    bits: int

    def parts(self) -> dict[str, mx.array]:
        """The arrays of a checkpoint."""
        return {"weight": pack(self.codes, self.bits), "scales": self.scales, "biases": self.biases}


def pack(codes: mx.array, bits: int) -> mx.array:
    """(rows, columns) uint8 -> (rows, columns·bits/32) uint32: one stream of bits, lowest first."""
    packed = []
    for start in range(0, len(codes), ROWS_AT_ONCE):
        block = np.array(codes[start : start + ROWS_AT_ONCE])
        stream = np.unpackbits(block[..., None], axis=-1, bitorder="little")[..., :bits]
        stream = np.packbits(stream.reshape(len(block), -1), axis=-1, bitorder="little")
        packed.append(stream.view(np.uint32))
    return mx.array(np.concatenate(packed))


def unpack(packed: mx.array, bits: int) -> mx.array:
    """The other way."""
    codes = []
    for start in range(0, len(packed), ROWS_AT_ONCE):
        block = np.array(packed[start : start + ROWS_AT_ONCE]).view(np.uint8)
        stream = np.unpackbits(block, axis=-1, bitorder="little").reshape(len(block), -1, bits)
        codes.append(np.packbits(stream, axis=-1, bitorder="little")[..., 0])
    return mx.array(np.concatenate(codes))


def plainly(weight: mx.array, bits: int, group_size: int) -> Rounded:
    """As `mx.quantize`."""
    packed, scales, biases = mx.quantize(weight, group_size, bits)
    return Rounded(unpack(packed, bits), scales, biases, bits)


def gptq(
    weight: mx.array,
    hessian: mx.array,
    bits: int,
    group_size: int,
    clips: Sequence[float] = (1.0,),
) -> Rounded:
    """Rounds column after column, and corrects those to come for the error of each.

    With the identity as Hessian and without clips this is plain rounding. Frantar et al. 2022,
    https://arxiv.org/abs/2210.17323

    Args:
        weight: (rows, columns).
        hessian: (columns, columns) float32, the sum over inputs x of x·xᵀ.
        clips: shares of the range of a group; each group takes that which errs least.
    """
    inverse, importance = _inverse_root(hessian), mx.diag(hessian)
    starts = range(0, len(weight), ROWS_AT_ONCE)
    parts = [weight[start : start + ROWS_AT_ONCE] for start in starts]
    blocks = [_gptq_rows(part, inverse, importance, bits, group_size, clips) for part in parts]
    codes, scales, biases = (mx.concatenate([*arrays]) for arrays in zip(*blocks, strict=True))
    return Rounded(codes, scales, biases, bits)


def _gptq_rows(
    weight: mx.array,
    inverse: np.ndarray[Any, Any],
    importance: mx.array,
    bits: int,
    group_size: int,
    clips: Sequence[float],
) -> tuple[mx.array, mx.array, mx.array]:
    """Codes, scales and biases of some rows, which do not depend on the others."""
    left = np.array(weight.astype(mx.float32))
    codes = np.empty(left.shape, np.uint8)
    scales, biases = [], []
    for start in range(0, left.shape[1], group_size):
        stop = start + group_size
        group = mx.array(left[:, start:stop]).astype(weight.dtype)
        scale, bias = best_range(group, bits, importance[start:stop], clips)
        scales.append(scale)
        biases.append(bias)
        s, b = (np.array(part.astype(mx.float32))[:, 0] for part in (scale, bias))
        errors = np.empty((len(left), group_size), np.float32)
        for i in range(start, stop):
            codes[:, i] = code = np.clip(np.rint((left[:, i] - b) / s), 0, 2**bits - 1)
            error = (left[:, i] - (code * s + b)) / inverse[i, i]
            left[:, i + 1 : stop] -= error[:, None] * inverse[i, i + 1 : stop]
            errors[:, i - start] = error
        left[:, stop:] -= errors @ inverse[start:stop, stop:]
    return mx.array(codes), mx.concatenate(scales, axis=1), mx.concatenate(biases, axis=1)


def _inverse_root(hessian: mx.array) -> np.ndarray[Any, Any]:
    """The upper Cholesky factor of the inverse, damped: few inputs do not tell all directions."""
    damped = hessian + (DAMPING * mx.diag(hessian).mean() + 1e-12) * mx.eye(len(hessian))
    # with rows and columns in reverse, it is the inverse of the lower factor
    lower = mx.linalg.cholesky(damped[::-1, ::-1], stream=mx.cpu)
    return np.array(mx.linalg.tri_inv(lower, stream=mx.cpu)[::-1, ::-1])


def best_range(
    group: mx.array, bits: int, importance: mx.array, clips: Sequence[float]
) -> tuple[mx.array, mx.array]:
    """Scale and bias (rows, 1) of a group (rows, columns), of the range that errs least.

    Args:
        importance: (columns,) what a squared error counts.
    """
    least, scale, bias = mx.array(mx.inf), mx.array(0), mx.array(0)
    lowest, highest = group.min(axis=1, keepdims=True), group.max(axis=1, keepdims=True)
    for clip in clips:
        narrowed = mx.clip(group, clip * lowest, clip * highest)
        _, s, b = mx.quantize(narrowed.astype(group.dtype), group.shape[1], bits)
        wide, s32, b32 = (array.astype(mx.float32) for array in (group, s, b))
        codes = mx.clip(mx.round((wide - b32) / s32), 0, 2**bits - 1)
        error = (mx.square(codes * s32 + b32 - wide) * importance).sum(axis=1, keepdims=True)
        better = error < least
        least, scale, bias = (
            mx.where(better, new, old)
            for new, old in zip((error, s, b), (least, scale, bias), strict=True)
        )
    return scale.astype(group.dtype), bias.astype(group.dtype)
