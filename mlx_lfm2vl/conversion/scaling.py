"""Scales of channels, moved between weights that stand one behind the other before rounding.

A channel with large inputs suffers most from rounding. Its column is made larger and what comes
before it smaller, which changes nothing in floating point. Lin et al. 2023, AWQ,
https://arxiv.org/abs/2306.00978
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, cast

import mlx.core as mx

from ..models.lfm2_vl import Lfm2VlForConditionalGeneration
from .budget import group_of
from .calibrate import module_at, rounded

STRENGTHS = (0.0, 0.25, 0.5, 0.75)  # powers of the size of the inputs


class Fold(NamedTuple):
    """Linear maps of one input, and the norm or the linear map that this input comes from."""

    source: str
    linears: tuple[str, ...]


def folds(model: Lfm2VlForConditionalGeneration) -> Iterator[Fold]:
    """Every place of the architecture where nothing but a multiplication stands between."""
    for number, layer in enumerate(model.language_model.layers):
        path = f"language_model.model.layers.{number}"
        mixer = f"{path}.self_attn" if layer.is_attention_layer else f"{path}.conv"
        names = ("q_proj", "k_proj", "v_proj") if layer.is_attention_layer else ("in_proj",)
        yield Fold(f"{path}.operator_norm", tuple(f"{mixer}.{name}" for name in names))
        forward = f"{path}.feed_forward"
        yield Fold(f"{path}.ffn_norm", (f"{forward}.w1", f"{forward}.w3"))
        yield Fold(f"{forward}.w3", (f"{forward}.w2",))  # silu(w1·x) times w3·x
    for number in range(len(model.vision_tower.encoder.layers)):
        path = f"vision_tower.encoder.layers.{number}"
        attention = tuple(f"{path}.self_attn.{name}_proj" for name in "qkv")
        yield Fold(f"{path}.layer_norm1", attention)
        yield Fold(f"{path}.layer_norm2", (f"{path}.mlp.fc1",))


def scale_channels(
    model: Lfm2VlForConditionalGeneration,
    ways: Mapping[str, Mapping[str, Any]],
    squares: Mapping[str, mx.array],
) -> None:
    """Scales the channels of all folds in a model of floats.

    Args:
        ways: how each module will be quantized; what is not here stays as it is.
        squares: sums of the squares of the inputs, (inputs,), by group.
    """
    for fold in folds(model):
        linears = [path for path in fold.linears if path in ways]
        if len(linears) < len(fold.linears):
            continue
        scaled = [(module_at(model, path).weight, ways[path]) for path in linears]
        apply_fold(model, fold, _best_scale(scaled, squares[group_of(linears[0])]))


def apply_fold(model: Lfm2VlForConditionalGeneration, fold: Fold, scale: mx.array) -> None:
    """Multiplies columns by a scale (inputs,), and divides what makes these inputs."""
    for path in fold.linears:
        linear = module_at(model, path)
        linear.weight = linear.weight * scale
    source = module_at(model, fold.source)
    is_norm = source.weight.ndim == 1
    source.weight = source.weight / (scale if is_norm else scale[:, None])
    if "bias" in source:
        source.bias = source.bias / scale


def _best_scale(linears: list[tuple[mx.array, Mapping[str, Any]]], sizes: mx.array) -> mx.array:
    """The power of the inputs' size that leaves the least error of the outputs."""
    least, best = math.inf, mx.ones_like(sizes)
    lengths = mx.sqrt(sizes / mx.maximum(sizes.mean(), 1e-12) + 1e-4)
    for strength in STRENGTHS:
        scale = lengths**strength
        scale = scale / mx.sqrt(scale.max() * scale.min())
        error = mx.array(0.0)
        for weight, way in linears:
            rounding = rounded(weight * scale, way) / scale - weight
            error = error + (mx.square(rounding) * sizes).sum()
        value = cast(float, error.item())
        if value < least:
            least, best = value, scale
    return best
