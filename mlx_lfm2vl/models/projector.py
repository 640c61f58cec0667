"""From patch features to image tokens: pixel unshuffle and a two-layer perceptron.

After `transformers`' `Lfm2VlMultiModalProjector`.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from .config import Lfm2VlConfig
from .layers import activation
from .siglip2 import group_views


class Lfm2VlMultiModalProjector(nn.Module):
    """Joins 2x2 patches into one image token of the language model's width."""

    def __init__(self, config: Lfm2VlConfig) -> None:
        super().__init__()
        self.factor = config.downsample_factor
        channels = config.vision_config.hidden_size * self.factor**2
        if config.projector_use_layernorm:
            self.layer_norm = nn.LayerNorm(channels)
        self.linear_1 = nn.Linear(channels, config.projector_hidden_size, config.projector_bias)
        self.act = activation(config.projector_hidden_act)
        self.linear_2 = nn.Linear(
            config.projector_hidden_size, config.text_config.hidden_size, config.projector_bias
        )

    def __call__(self, features: mx.array, spatial_shapes: Sequence[tuple[int, int]]) -> mx.array:
        """(patches of all views, vision hidden) -> (image tokens of all views, text hidden)."""
        x = self.pixel_unshuffle(features, spatial_shapes)
        if "layer_norm" in self:
            x = self.layer_norm(x)
        return self.linear_2(self.act(self.linear_1(x)))

    def pixel_unshuffle(
        self, features: mx.array, spatial_shapes: Sequence[tuple[int, int]]
    ) -> mx.array:
        """(patches, C) -> (patches / factor², factor²·C), within each view, row by row."""
        factor, channels = self.factor, features.shape[-1]
        parts, start = [], 0
        for views, (rows, cols) in group_views(spatial_shapes, max_patches=len(features)):
            stop = start + views * rows * cols
            grid = features[start:stop].reshape(
                views, rows // factor, factor, cols // factor, factor, channels
            )
            parts.append(grid.transpose(0, 1, 3, 2, 4, 5).reshape(-1, factor * factor * channels))
            start = stop
        return mx.concatenate(parts)
