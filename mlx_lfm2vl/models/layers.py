"""Activations, joint projections and gradient checkpointing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from functools import partial
from itertools import accumulate
from typing import Any, ClassVar, cast

import mlx.core as mx
import mlx.nn as nn

from ..errors import ConfigError


def backend() -> str:
    """What computes: "cpu", "metal" or "cuda". Whatever depends on it asks here."""
    if mx.default_device() == mx.Device(mx.cpu):
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def times_sigmoid(x: mx.array, y: mx.array) -> mx.array:
    """x · sigmoid(y) of float32 values, for a CPU.

    A power of two costs a third of what MLX's exp does there. Bounded, since the gradient of an
    infinite one would be nan.
    """
    return x / (1 + mx.power(2, mx.minimum(-math.log2(math.e) * y, 100)))


def gelu_tanh(x: mx.array) -> mx.array:
    """GELU in its tanh approximation, 0.5·x·(1 + tanh(y)), as x·sigmoid(2·y).

    In float32 inside, as PyTorch computes it. Paper: https://arxiv.org/abs/1606.08415
    """
    return gelu_tanh_kernel(x, backend())


@partial(mx.compile, shapeless=True)
def gelu_tanh_kernel(x: mx.array, on: str) -> mx.array:
    """`gelu_tanh` on a backend: on a GPU in so few steps that they make one kernel."""
    wide = x.astype(mx.float32)
    if on == "cpu":
        y = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide * wide * wide)
        return times_sigmoid(wide, 2 * y).astype(x.dtype)
    slope = 2 * math.sqrt(2 / math.pi)
    y = wide * (slope * 0.044715 * mx.square(wide) + slope)
    return (wide * mx.sigmoid(y)).astype(x.dtype)


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) · up; silu in float32, as PyTorch computes it."""
    return swiglu_kernel(gate, up, backend())


@partial(mx.compile, shapeless=True)
def swiglu_kernel(gate: mx.array, up: mx.array, on: str) -> mx.array:
    """`swiglu` on a backend."""
    wide = gate.astype(mx.float32)
    silu = times_sigmoid(wide, wide) if on == "cpu" else wide * mx.sigmoid(wide)
    return silu.astype(gate.dtype) * up


@partial(mx.compile, shapeless=True)
def gated_sum(
    gate: mx.array, inputs: list[mx.array], weights: list[mx.array], bias: mx.array | None
) -> mx.array:
    """gate · (inputs[0] · weights[0] + inputs[1] · weights[1] + … + bias), in one kernel."""
    out = sum(map(mx.multiply, inputs[1:], weights[1:]), inputs[0] * weights[0])
    return gate * (out if bias is None else out + bias)


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


class JointLinear:
    """Linear maps of one input as one product.

    Their parameters become slices of the joint ones, so that they keep names and values, and
    memory is taken once.

    Attributes:
        linear: the map to all their outputs, one behind the other.
        parts: the parameters that each of them has now.
        ends: where the outputs of each but the last end.
    """

    def __init__(self, linears: Sequence[nn.Module]) -> None:
        self.linear = copy(linears[0])
        self.ends = list(accumulate(len(linear.weight) for linear in linears))[:-1]
        for key in self.linear:
            self.linear[key] = mx.concatenate([linear[key] for linear in linears])
            for linear, part in zip(linears, mx.split(self.linear[key], self.ends), strict=True):
                linear[key] = part
        self.parts = [dict(linear) for linear in linears]
        mx.async_eval(self.linear, self.parts)

    def holds(self, linears: Sequence[nn.Module]) -> bool:
        """Whether the parameters are still those that were joined."""
        return all(
            linear.keys() == part.keys() and all(linear[key] is part[key] for key in part)
            for linear, part in zip(linears, self.parts, strict=True)
        )


class JointProjections(nn.Module):
    """A module some of whose linear maps have one input; one product can do for a single token."""

    TOGETHER: ClassVar[tuple[str, ...]]

    def __init__(self) -> None:
        super().__init__()
        self.joint: JointLinear | None = None

    def project(self, x: mx.array) -> list[mx.array]:
        """(batch, tokens, hidden) -> (batch·tokens, outputs) for each of the maps."""
        linears = [self[name] for name in self.TOGETHER]
        if self.joint is not None and not self.joint.holds(linears):
            self.joint = None
        # two axes: with three, MLX joins and parts them again around each of the maps
        flat = x.reshape(-1, x.shape[-1])
        if self.joint is None or x.shape[1] > 1:
            return [linear(flat) for linear in linears]
        return [*mx.split(self.joint.linear(flat), self.joint.ends, axis=-1)]

    def join(self) -> None:
        """Makes the joint map, if there is none of the present parameters and it can be made."""
        linears = [self[name] for name in self.TOGETHER]
        if self.joint is None or not self.joint.holds(linears) or self.training:
            alike = all(_kind(linear) == _kind(linears[0]) for linear in linears)
            can = alike and type(linears[0]) in (nn.Linear, nn.QuantizedLinear)
            self.joint = JointLinear(linears) if can and not self.training else None


def _kind(linear: nn.Module) -> list[Any]:
    """Equal for linear maps whose rows one product can hold."""
    numbers = [getattr(linear, name, None) for name in ("group_size", "bits", "mode")]
    arrays = [(k, a.dtype, a.shape[1:]) for k, a in linear.items() if isinstance(a, mx.array)]
    return [type(linear), numbers, arrays]
