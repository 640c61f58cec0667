"""Trains what a quantized model keeps in floating point until it answers as the source does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from ..checkpoints.weights import read_arrays
from ..checkpoints.writing import complete_file, save_arrays
from ..models.lfm2_vl import Lfm2VlForConditionalGeneration
from .calibrate import Batch, Tell, divergence, module_at
from .rounding import Rounded

Tree = dict[str, Any]  # parameters, nested as the modules are
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
        """(rows, columns) of all rows, or of some."""
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


def put_rounded(model: Lfm2VlForConditionalGeneration, path: str, start: Rounded) -> None:
    """Replaces a matrix of a model by its integers."""
    before = module_at(model, path)
    is_table = isinstance(before, nn.Embedding)
    kind = RoundedEmbedding(start) if is_table else RoundedLinear(start, before.get("bias"))
    model.update_modules(tree_unflatten([(path, kind)]))


def distill(
    model: Lfm2VlForConditionalGeneration,
    batches: Sequence[Batch],
    right: Callable[[int], mx.array],
    types: Mapping[str, mx.Dtype],
    *,
    epochs: int,
    rate: float,
    kept: Path,
    key: str,
    tell: Tell,
) -> None:
    """Trains the ranges of all integers, and whatever is not in integers.

    The loss is the divergence of the answers from the source's. Everything is rounded to the type
    in which it will be stored before it is used, so that nothing is lost at the end.

    Args:
        right: the source's log-probabilities (targets, vocab) of a batch, by its number.
        types: of the parameters that are stored themselves.
        kept: a file for the state after each epoch; one of the same key is continued.
    """
    trained = model.trainable_parameters()
    total = epochs * len(batches)
    optimizer = optim.Adam(_schedule(rate, total), bias_correction=True)
    optimizer.init(trained)

    def put(parameters: Tree) -> None:
        stored = [
            (name, array.astype(types.get(name, array.dtype)).astype(array.dtype))
            for name, array in tree_flatten(parameters)
        ]
        model.update(tree_unflatten(stored))

    def loss(parameters: Tree, number: int) -> mx.array:
        put(parameters)
        return divergence(model, batches[number], right(number)) * len(batches)

    gradient = mx.value_and_grad(loss)
    trained, begin = _resumed(kept, key, trained, optimizer)
    for epoch in range(begin, epochs):
        order = np.random.default_rng(epoch).permutation(len(batches)).tolist()
        for step, number in enumerate(order):
            _, slopes = gradient(trained, number)
            trained = optimizer.apply_gradients(slopes, trained)
            mx.eval(trained, optimizer.state)
            tell("distillation", epoch * len(batches) + step + 1, total)
        _keep(kept, key, epoch + 1, trained, optimizer)
    put(trained)


def _schedule(rate: float, steps: int) -> Callable[[mx.array], mx.array]:
    """A short linear rise, and a cosine down to nothing."""
    warmup = max(steps // 20, 1)
    rise = optim.linear_schedule(rate / warmup, rate, warmup)
    return optim.join_schedules([rise, optim.cosine_decay(rate, steps)], [warmup])


def _keep(kept: Path, key: str, epoch: int, trained: Tree, optimizer: optim.Optimizer) -> None:
    state = {"trained": trained, "optimizer": optimizer.state}
    with complete_file(kept) as new:
        save_arrays(new, dict(tree_flatten(state)), {"key": key, "epoch": str(epoch)})


def _resumed(kept: Path, key: str, trained: Tree, optimizer: optim.Optimizer) -> tuple[Tree, int]:
    """What is trained, and the epochs that were done; those of another key count for nothing."""
    from safetensors import safe_open

    if not kept.exists():
        return trained, 0
    arrays = read_arrays(kept)
    with safe_open(str(kept), framework="mlx") as file:
        metadata = file.metadata() or {}
    if metadata.get("key") != key:
        return trained, 0
    state = tree_unflatten(list(arrays.items()))
    optimizer.state = state["optimizer"]
    return state["trained"], int(metadata["epoch"])
