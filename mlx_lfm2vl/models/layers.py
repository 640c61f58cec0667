"""Activations and gradient checkpointing, shared by vision and text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from ..errors import ConfigError


def times_sigmoid(x: mx.array, y: mx.array) -> mx.array:
    """x · sigmoid(y) of float32 values, for the inside of a compiled kernel.

    A power of two costs a third of what MLX's exp does on a CPU. Bounded, since the gradient of an
    infinite one would be nan.
    """
    return x / (1 + mx.power(2, mx.minimum(-math.log2(math.e) * y, 100)))


@partial(mx.compile, shapeless=True)
def gelu_tanh(x: mx.array) -> mx.array:
    """GELU in its tanh approximation, 0.5·x·(1 + tanh(y)), as x·sigmoid(2·y).

    In float32 inside, as PyTorch computes it. Paper: https://arxiv.org/abs/1606.08415
    """
    wide = x.astype(mx.float32)
    y = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide * wide * wide)
    return times_sigmoid(wide, 2 * y).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "gelu": nn.gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "quick_gelu": nn.gelu_fast_approx,
    "relu": nn.relu,
    "silu": nn.silu,
}


def activation(name: str) -> Callable[[mx.array], mx.array]:
    """The activation that a config names; a ConfigError if it is unknown."""
    if name not in ACTIVATIONS:
        raise ConfigError(f"activation {name!r} is unknown; it must be one of {list(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def checkpointed(layer: nn.Module) -> Callable[..., Any]:
    """The layer, computed again in the backward pass, with the same random numbers as before."""
    first: list[int] = []

    def call(*args: Any) -> Any:
        now = random_seed()
        if not first:
            first.append(now)
            return layer(*args)
        mx.random.seed(first[0])
        out = layer(*args)
        mx.random.seed(now)
        return out

    return nn.utils.checkpoint(layer, call)


def random_seed() -> int:
    """The seed that brings MLX's random numbers back to where they are."""
    [state] = cast("Iterable[mx.array]", mx.random.state)
    high, low = cast("list[int]", state.tolist())
    return high << 32 | low


@partial(mx.compile, shapeless=True)
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) · up, in one kernel; silu in float32, as PyTorch computes it."""
    wide = gate.astype(mx.float32)
    return times_sigmoid(wide, wide).astype(gate.dtype) * up
