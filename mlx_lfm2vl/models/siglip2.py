"""The vision tower: SigLIP2 NaFlex without padding.

The official code pads every view to one length and masks; here views of one shape form a batch,
nothing is padded, and no mask exists. After `transformers`' `modeling_siglip2.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple, Union

import mlx.core as mx
import mlx.nn as nn

from ..errors import PromptError
from .config import Siglip2VisionConfig
from .layers import activation, checkpointed

if TYPE_CHECKING:
    import numpy as np

Array = Union[mx.array, "np.ndarray[Any, Any]"]

# one tile of 512x512; a large GPU may like more at once, which `benchmark` can find out
PATCHES_PER_GROUP = 1024


class Siglip2VisionOutput(NamedTuple):
    """Features of all patches, packed view after view: (patches, hidden).

    `hidden_states` holds the embeddings and each layer's output, if asked for.
    """

    last_hidden_state: mx.array
    hidden_states: list[mx.array] | None = None


class Siglip2VisionEmbeddings(nn.Module):
    """Patches to vectors, plus positions resized from a learned square table."""

    def __init__(self, config: Siglip2VisionConfig) -> None:
        super().__init__()
        self.side = round(config.num_patches**0.5)
        patch_values = config.num_channels * config.patch_size**2
        self.patch_embedding = nn.Linear(patch_values, config.hidden_size)
        self.position_embedding = nn.Embedding(config.num_patches, config.hidden_size)

    def __call__(self, pixel_values: mx.array, rows: int, cols: int) -> mx.array:
        # (views, rows·cols, 3·16²) -> (views, rows·cols, hidden)
        return self.patch_embedding(pixel_values) + self.position_embeddings(rows, cols)

    def position_embeddings(self, rows: int, cols: int) -> mx.array:
        """The table resized to (rows·cols, hidden), bilinear with antialias."""
        table = self.position_embedding.weight  # (side·side, hidden)
        hidden = table.shape[-1]
        down = mx.array(resize_matrix(self.side, rows))  # (rows, side)
        across = mx.array(resize_matrix(self.side, cols))  # (cols, side)
        grid = table.astype(mx.float32).reshape(self.side, self.side * hidden)
        grid = (down @ grid).reshape(rows, self.side, hidden)
        grid = across @ grid  # (rows, cols, hidden)
        return grid.reshape(rows * cols, hidden).astype(table.dtype)


def resize_matrix(source: int, target: int) -> list[list[float]]:
    """Weights (target, source) of a one-dimensional antialiased bilinear resize.

    As `torch.nn.functional.interpolate(mode="bilinear", antialias=True, align_corners=False)`:
    a triangle filter that widens with the scale, cut at the borders and normalised.
    """
    scale = source / target
    width = max(scale, 1.0)
    matrix = []
    for i in range(target):
        center = scale * (i + 0.5)
        start = max(int(center - width + 0.5), 0)
        stop = min(int(center + width + 0.5), source)
        row = [0.0] * source
        for j in range(start, stop):
            row[j] = max(0.0, 1.0 - abs(j + 0.5 - center) / width)
        total = sum(row)
        matrix.append([weight / total for weight in row])
    return matrix


class Siglip2Attention(nn.Module):
    """Full attention among the patches of a view."""

    def __init__(self, config: Siglip2VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.scale = (config.hidden_size // config.num_attention_heads) ** -0.5
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        views, patches, _ = x.shape
        shape = (views, patches, self.num_heads, -1)
        # (views, patches, hidden) -> (views, heads, patches, head dim)
        queries = self.q_proj(x).reshape(shape).transpose(0, 2, 1, 3)
        keys = self.k_proj(x).reshape(shape).transpose(0, 2, 1, 3)
        values = self.v_proj(x).reshape(shape).transpose(0, 2, 1, 3)
        out = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=self.scale)
        return self.out_proj(out.transpose(0, 2, 1, 3).reshape(x.shape))


class Siglip2MLP(nn.Module):
    """Two linear maps and an activation."""

    def __init__(self, config: Siglip2VisionConfig) -> None:
        super().__init__()
        self.activation_fn = activation(config.hidden_act)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(self.activation_fn(self.fc1(x)))


class Siglip2EncoderLayer(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual."""

    def __init__(self, config: Siglip2VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Siglip2Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = Siglip2MLP(config)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Siglip2Encoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: Siglip2VisionConfig) -> None:
        super().__init__()
        self.layers = [Siglip2EncoderLayer(config) for _ in range(config.num_hidden_layers)]
        self.gradient_checkpointing = False

    def __call__(self, x: mx.array) -> Iterator[mx.array]:
        """Yields each layer's output, (views, patches, hidden)."""
        for layer in self.layers:
            again = self.gradient_checkpointing and self.training
            x = checkpointed(layer)(x) if again else layer(x)
            yield x


class Siglip2VisionModel(nn.Module):
    """Packed patches of many views to packed features.

    Attributes:
        patches_per_group: views go through the encoder in groups of at most so many patches, so
            that memory does not grow with their number.
    """

    def __init__(self, config: Siglip2VisionConfig) -> None:
        super().__init__()
        self.embeddings = Siglip2VisionEmbeddings(config)
        self.encoder = Siglip2Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.patches_per_group = PATCHES_PER_GROUP

    def __call__(
        self,
        pixel_values: mx.array,
        spatial_shapes: Sequence[tuple[int, int]],
        output_hidden_states: bool = False,
    ) -> Siglip2VisionOutput:
        """Encodes views.

        Args:
            pixel_values: (patches of all views, 3·16²), normalised.
            spatial_shapes: (rows, columns) in patches, one per view, in the order of the patches.
        """
        features: list[mx.array] = []
        hidden_states: list[list[mx.array]] = []
        start = 0
        for views, (rows, cols) in group_views(spatial_shapes, self.patches_per_group):
            stop = start + views * rows * cols
            group = pixel_values[start:stop]
            outputs = self._encode(group.reshape(views, rows * cols, -1), rows, cols)
            features.append(self.post_layernorm(outputs[-1]).reshape(stop - start, -1))
            if output_hidden_states:
                hidden_states.append([x.reshape(stop - start, -1) for x in outputs])
            start = stop
        return Siglip2VisionOutput(
            mx.concatenate(features),
            [mx.concatenate(list(groups)) for groups in zip(*hidden_states, strict=True)]
            if output_hidden_states
            else None,
        )

    def _encode(self, pixel_values: mx.array, rows: int, cols: int) -> list[mx.array]:
        embeddings = self.embeddings(pixel_values, rows, cols)
        return [embeddings, *self.encoder(embeddings)]


def group_views(
    spatial_shapes: Sequence[tuple[int, int]], max_patches: int
) -> Iterator[tuple[int, tuple[int, int]]]:
    """Yields (number of views, shape) for neighbouring views of one shape, in bounded groups."""
    for (rows, cols), same in groupby(spatial_shapes):
        left = sum(1 for _ in same)
        at_most = max(1, max_patches // (rows * cols))
        while left > 0:
            yield min(left, at_most), (rows, cols)
            left -= at_most


def check_shapes(spatial_shapes: Sequence[Any] | Array, factor: int) -> list[tuple[int, int]]:
    """(rows, columns) of each view as ints, from lists or an array (views, 2).

    Raises:
        PromptError: something else, or sides that are no multiples of `factor`.
    """
    given: Any = spatial_shapes
    if not isinstance(given, Sequence):
        given = given.tolist()
    try:
        shapes = [(int(rows), int(cols)) for rows, cols in given]
    except (TypeError, ValueError):
        shapes = []
    if not shapes or any(min(s) < 1 or s[0] % factor or s[1] % factor for s in shapes):
        raise PromptError(
            f"spatial_shapes is {given}; it must be (rows, columns) in patches of each "
            f"view, both multiples of {factor}"
        )
    return shapes


def pack_views(
    pixel_values: Array, shapes: Sequence[tuple[int, int]], mask: Array | None, values: int
) -> Array:
    """(patches of all views, values), from that or from (views, patches, values) with padding.

    Args:
        shapes: (rows, columns) of each view.
        mask: (views, patches) of padded pixels, 1 on patches and 0 on padding.
        values: of one patch.

    Raises:
        PromptError: they do not fit together.
    """
    # "float32", "mlx.core.bfloat16": two libraries, one way to name a type
    kind = (pixel_values.ndim, "float" in str(pixel_values.dtype))
    if kind not in ((2, False), (3, True)) or pixel_values.shape[-1] != values:
        raise PromptError(
            f"pixel_values of shape {tuple(pixel_values.shape)} and type {pixel_values.dtype}; "
            f"they must be (patches of all views, {values}) uint8, or padded and normalised: "
            f"(views, patches, {values}) floats"
        )
    if pixel_values.ndim == 3:
        return unpad_views(pixel_values, shapes, mask)
    if mask is not None:
        raise PromptError("packed pixel_values have no padding, so no pixel_attention_mask either")
    patches = sum(rows * cols for rows, cols in shapes)
    if patches != pixel_values.shape[0]:
        raise PromptError(
            f"spatial_shapes {list(shapes)} cover {patches} patches; "
            f"pixel_values has {pixel_values.shape[0]}"
        )
    return pixel_values


def unpad_views(
    pixel_values: Array, shapes: Sequence[tuple[int, int]], mask: Array | None
) -> Array:
    """(views, patches, values), padded at the ends -> (patches of all views, values)."""
    counts = [rows * cols for rows, cols in shapes]
    views, length = pixel_values.shape[:2]
    if views != len(shapes) or max(counts) > length:
        raise PromptError(
            f"spatial_shapes {list(shapes)} do not fit pixel_values of {views} views with "
            f"{length} patches each"
        )
    if mask is not None:
        expected = [[place < count for place in range(length)] for count in counts]
        if mask.tolist() != expected:
            raise PromptError(
                f"pixel_attention_mask does not mark the first {counts} patches of the views, "
                "which spatial_shapes has"
            )
    if isinstance(pixel_values, mx.array):
        return mx.concatenate([pixel_values[i, :count] for i, count in enumerate(counts)])
    import numpy as np

    return np.concatenate([pixel_values[i, :count] for i, count in enumerate(counts)])
