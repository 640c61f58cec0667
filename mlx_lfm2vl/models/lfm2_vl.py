"""The whole model: images are encoded, put where their tokens stand, and read with the text.

After `transformers`' `Lfm2VlModel` and `Lfm2VlForConditionalGeneration`.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from ..errors import PromptError
from ..options import CacheOptions, ImageProcessorConfig
from ..prompts.processor import Prompt, PromptImage, pack_pixels
from .cache import Cache
from .config import Lfm2VlConfig
from .lfm2 import Lfm2ForCausalLM, check_token_ids
from .projector import Lfm2VlMultiModalProjector
from .siglip2 import Array, Siglip2VisionModel, check_shapes, group_views, pack_views

SpatialShapes = Sequence[tuple[int, int]] | Array
IGNORE_INDEX = -100  # label of a position that does not count


@dataclass(frozen=True, kw_only=True)
class Lfm2VlImageOutput:
    """What the vision tower and the projector give for some views.

    Attributes:
        last_hidden_state: (patches of all views, vision hidden), packed, without padding.
        pooler_output: (image tokens, text hidden) of each view.
    """

    last_hidden_state: mx.array
    pooler_output: tuple[mx.array, ...]


@dataclass(frozen=True, kw_only=True)
class Lfm2VlModelOutput:
    """What a forward pass without the vocabulary head gives.

    Attributes:
        last_hidden_state: (batch, tokens, hidden), after the final norm.
        hidden_states: embeddings and each layer's output, (batch, tokens, hidden); the last one
            after the final norm.
        attentions: (batch, heads, tokens, positions) of each attention layer.
        image_hidden_states: (image tokens, text hidden), if images were given.
    """

    last_hidden_state: mx.array
    hidden_states: tuple[mx.array, ...] | None = None
    attentions: tuple[mx.array, ...] | None = None
    image_hidden_states: mx.array | None = None


@dataclass(frozen=True, kw_only=True)
class Lfm2VlOutput(Lfm2VlModelOutput):
    """What a whole forward pass gives.

    Attributes:
        logits: (batch, kept positions, vocab).
        loss: a scalar, if labels were given.
    """

    logits: mx.array
    loss: mx.array | None = None


class Lfm2VlModel(nn.Module):
    """LFM2-VL without its vocabulary head: vision tower, projector and language model.

    `Lfm2VlForConditionalGeneration` is one, too: `Lfm2VlModel.__call__(model, ...)` is its forward
    pass without the head, and `model.base_model` an `Lfm2VlModel` of the same weights.
    """

    def __init__(
        self, config: Lfm2VlConfig, image_config: ImageProcessorConfig | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.image_config = image_config if image_config is not None else ImageProcessorConfig()
        self.vision_tower = Siglip2VisionModel(config.vision_config)
        self.multi_modal_projector = Lfm2VlMultiModalProjector(config)
        # tied to the embeddings, a head has no weights
        self.language_model = Lfm2ForCausalLM(replace(config.text_config, tie_word_embeddings=True))

    def __call__(
        self,
        input_ids: Array | None = None,
        pixel_values: Array | None = None,
        spatial_shapes: SpatialShapes | None = None,
        pixel_attention_mask: Array | None = None,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        cache: Sequence[Cache] | None = None,
        inputs_embeds: Array | None = None,
        *,
        image_features: mx.array | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> Lfm2VlModelOutput:
        """One forward pass, as the official `forward`. Arrays are MLX's or NumPy's.

        Args:
            input_ids: (batch, tokens), or `inputs_embeds` (batch, tokens, hidden) instead.
            pixel_values, spatial_shapes, pixel_attention_mask: see `encode_images`.
            attention_mask: (batch, positions), 1 on tokens and 0 on padding on either side.
            position_ids: (batch, tokens); by default they count up from the cache.
            cache: from `make_cache`, filled in place.
            image_features: what `encode_images` gave, instead of `pixel_values`.

        Raises:
            PromptError: arguments that contradict each other, an id that the vocabulary does not
                have (in NumPy's arrays), or a number of image features other than that of image
                tokens.
        """
        if pixel_values is not None:
            if image_features is not None or spatial_shapes is None:
                raise PromptError("pixel_values need spatial_shapes and exclude image_features")
            image_features = self.encode_images(pixel_values, spatial_shapes, pixel_attention_mask)
        out = self.language_model.model(
            self._embeddings(input_ids, inputs_embeds, image_features),
            cache,
            _on_device(attention_mask),
            _on_device(position_ids),
            output_hidden_states,
            output_attentions,
        )
        return Lfm2VlModelOutput(
            last_hidden_state=out.last_hidden_state,
            hidden_states=None if out.hidden_states is None else tuple(out.hidden_states),
            attentions=None if out.attentions is None else tuple(out.attentions),
            image_hidden_states=image_features,
        )

    def _embeddings(
        self,
        input_ids: Array | None,
        inputs_embeds: Array | None,
        image_features: mx.array | None,
    ) -> mx.array:
        """(batch, tokens, hidden) from what a forward pass was given."""
        if (input_ids is None) == (inputs_embeds is None):
            raise PromptError("pass exactly one of input_ids and inputs_embeds")
        if input_ids is not None:
            return self.embed(input_ids, image_features)
        if image_features is not None:
            raise PromptError("images need input_ids, to know where they stand")
        return cast(mx.array, _on_device(inputs_embeds))

    def encode_images(
        self,
        pixel_values: Array,
        spatial_shapes: SpatialShapes,
        pixel_attention_mask: Array | None = None,
    ) -> mx.array:
        """Views to image tokens.

        Args:
            pixel_values: (patches of all views, 3·16²) uint8, as `Prompt` packs them; or
                (views, patches, 3·16²), padded and normalised already, as the official processor
                makes them.
            spatial_shapes: (rows, columns) in patches, one per view.
            pixel_attention_mask: (views, patches) of padded pixels, 1 on patches and 0 on padding.
                It says nothing that `spatial_shapes` does not say, so it may be left out.

        Returns:
            (image tokens of all views, text hidden), lazily.

        Raises:
            PromptError: pixels, shapes and mask do not fit together.
        """
        groups = self._encode(pixel_values, spatial_shapes, pixel_attention_mask)
        return mx.concatenate([tokens for _, _, tokens in groups])

    def get_image_features(
        self,
        pixel_values: Array,
        spatial_shapes: SpatialShapes,
        pixel_attention_mask: Array | None = None,
    ) -> Lfm2VlImageOutput:
        """Views to the vision tower's features and to image tokens, as the official method.

        Arguments and errors are those of `encode_images`.
        """
        groups = self._encode(pixel_values, spatial_shapes, pixel_attention_mask)
        return Lfm2VlImageOutput(
            last_hidden_state=mx.concatenate([features for _, features, _ in groups]),
            pooler_output=tuple(
                view for views, _, tokens in groups for view in mx.split(tokens, views)
            ),
        )

    def _encode(
        self, pixel_values: Array, spatial_shapes: SpatialShapes, mask: Array | None
    ) -> list[tuple[int, mx.array, mx.array]]:
        """Group by group: views, (patches, vision hidden), and (image tokens, text hidden)."""
        shapes = check_shapes(spatial_shapes, self.config.downsample_factor)
        vision = self.config.vision_config
        padded = pixel_values.ndim == 3
        pixel_values = pack_views(
            pixel_values, shapes, mask, vision.num_channels * vision.patch_size**2
        )
        groups: list[tuple[int, mx.array, mx.array]] = []
        start = 0
        for views, (rows, cols) in group_views(shapes, self.vision_tower.patches_per_group):
            stop = start + views * rows * cols
            group = mx.array(pixel_values[start:stop])
            if groups:
                # one group after the other: what they need is never alive together
                group = mx.depends(group, groups[-1][2])
            same = [(rows, cols)] * views
            pixels = self._as_computed(group) if padded else self.normalize(group)
            features = self.vision_tower(pixels, same).last_hidden_state
            groups.append((views, features, self.multi_modal_projector(features, same)))
            start = stop
        return groups

    def normalize(self, pixel_values: mx.array) -> mx.array:
        """uint8 (patches, 3·16²) -> (x · rescale_factor - mean) / std, in the compute type."""
        config = self.image_config
        pixels = config.encoder_patch_size**2
        # one fused step, in float32, as the official processor does it
        mean, std = (
            mx.array([value / config.rescale_factor for value in values] * pixels)
            for values in (config.image_mean, config.image_std)
        )
        return self._as_computed((pixel_values - mean) / std)

    def _as_computed(self, pixel_values: mx.array) -> mx.array:
        return pixel_values.astype(self.vision_tower.post_layernorm.weight.dtype)

    def embed(
        self, input_ids: Array | Sequence[int], image_features: mx.array | None = None
    ) -> mx.array:
        """Token embeddings with image features in the rows of the image tokens, in order.

        Args:
            input_ids: (batch, tokens), or a list of ids for a batch of one. NumPy's arrays and
                lists cost no read from the device, and their ids are checked.
            image_features: (image tokens, text hidden).

        Returns:
            (batch, tokens, text hidden)

        Raises:
            PromptError: an id that the vocabulary does not have, or a number of image features
                other than that of image tokens.
        """
        if isinstance(input_ids, mx.array):
            ids = input_ids
        else:
            tokens = check_token_ids(_flat(input_ids), self.config.text_config.vocab_size)
            shape = (1, len(tokens)) if isinstance(input_ids, Sequence) else input_ids.shape
            ids = mx.array(tokens, mx.int32).reshape(shape)
        embeddings = self.language_model.embed(ids)
        if image_features is None:
            return embeddings
        if ids is input_ids:
            tokens = _flat(ids)
        self._check_features(tokens, image_features)
        # row i of the result is row rows[i] of the table: embeddings first, then features
        rows, feature = list(range(len(tokens))), len(tokens)
        for place, token in enumerate(tokens):
            if token == self.config.image_token_id:
                rows[place], feature = feature, feature + 1
        flat = embeddings.reshape(len(tokens), -1)
        table = mx.concatenate([flat, image_features.astype(flat.dtype)])
        return table[mx.array(rows)].reshape(embeddings.shape)

    def embed_prompt(
        self,
        prompt: Prompt,
        start: int = 0,
        stop: int | None = None,
        features: MutableMapping[str, mx.array] | None = None,
        image_features: mx.array | None = None,
    ) -> mx.array:
        """Embeddings of a part of a prompt, its images encoded and put in their places.

        Args:
            start, stop: the part, by default all; it may not cut through an image.
            features: image digest -> (image tokens, text hidden). Images found in it are not
                encoded again; those that are encoded now are added.
            image_features: (image tokens of the whole prompt, text hidden), what `encode_images`
                gave for all its images; then nothing is encoded.

        Returns:
            (stop - start, text hidden), lazily.

        Raises:
            PromptError: no such part, an id that the vocabulary does not have, or a number of
                image features other than that of image tokens.
        """
        stop = len(prompt.token_ids) if stop is None else stop
        inside = _images_inside(prompt, start, stop)
        token_ids = prompt.token_ids[start:stop]
        check_token_ids(token_ids, self.config.text_config.vocab_size)
        if image_features is not None:
            self._check_features(prompt.token_ids, image_features)
            before = prompt.token_ids[:start].count(self.config.image_token_id)
            count = token_ids.count(self.config.image_token_id)
            image_features = image_features[before : before + count]
        elif inside:
            image_features = self._encode_prompt_images(inside, features)
        return self.embed(token_ids, image_features)[0]

    def _encode_prompt_images(
        self, images: Sequence[PromptImage], known: MutableMapping[str, mx.array] | None
    ) -> mx.array:
        """(image tokens of all the images, text hidden); what is not known, in one call."""
        if known is None:
            shapes = [shape for placed in images for shape in placed.image.spatial_shapes]
            return self.encode_images(pack_pixels(images), shapes)
        found = {p.digest: known[p.digest] for p in images if p.digest in known}
        missing = list({p.digest: p for p in images if p.digest not in found}.values())
        if missing:
            encoded, start = self._encode_prompt_images(missing, None), 0
            for placed in missing:
                stop = start + placed.image_tokens
                # gathered, not sliced: a slice would keep the features of all of them alive
                rows = encoded if len(missing) == 1 else encoded[mx.arange(start, stop)]
                found[placed.digest] = known[placed.digest] = rows
                start = stop
        return mx.concatenate([found[placed.digest] for placed in images])

    def _check_features(self, token_ids: Sequence[int], image_features: mx.array) -> None:
        places = token_ids.count(self.config.image_token_id)
        if places != image_features.shape[0]:
            raise PromptError(
                f"{places} image tokens stand in the prompt, but {image_features.shape[0]} "
                "image features were given"
            )

    def make_cache(self, options: CacheOptions | None = None, first_turn: int = 0) -> list[Cache]:
        """An empty cache; see `Lfm2ForCausalLM.make_cache`."""
        return self.language_model.make_cache(options, first_turn)

    def gradient_checkpointing_enable(self) -> None:
        """Computes each layer's activations again in the backward pass instead of keeping them."""
        self.language_model.model.gradient_checkpointing = True
        self.vision_tower.encoder.gradient_checkpointing = True

    @property
    def layers(self) -> list[Any]:
        return self.language_model.layers


class Lfm2VlForConditionalGeneration(Lfm2VlModel):
    """LFM2-VL with its vocabulary head, tied to the embeddings or not."""

    def __init__(
        self, config: Lfm2VlConfig, image_config: ImageProcessorConfig | None = None
    ) -> None:
        super().__init__(config, image_config)
        self.learner: Any = None  # told of each answer; see `generation.speeds.Learner`
        if not config.text_config.tie_word_embeddings:
            self.language_model = Lfm2ForCausalLM(config.text_config)

    def __call__(
        self,
        input_ids: Array | None = None,
        pixel_values: Array | None = None,
        spatial_shapes: SpatialShapes | None = None,
        pixel_attention_mask: Array | None = None,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        cache: Sequence[Cache] | None = None,
        inputs_embeds: Array | None = None,
        labels: Array | None = None,
        logits_to_keep: int | Array = 0,
        *,
        image_features: mx.array | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> Lfm2VlOutput:
        """One forward pass, as the official `forward`; arguments and errors of `Lfm2VlModel`, and

        Args:
            labels: (batch, tokens), -100 if ignored; needs all logits.
            logits_to_keep: project only so many last positions, 0 for all; or these positions.
        """
        out = super().__call__(
            input_ids,
            pixel_values,
            spatial_shapes,
            pixel_attention_mask,
            attention_mask,
            position_ids,
            cache,
            inputs_embeds,
            image_features=image_features,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        if isinstance(logits_to_keep, int):
            hidden = out.last_hidden_state[:, -logits_to_keep:]
        else:
            hidden = out.last_hidden_state[:, _on_device(logits_to_keep)]
        logits = self.language_model.logits(hidden)
        loss = None if labels is None else causal_lm_loss(logits, _on_device(labels))
        return Lfm2VlOutput(logits=logits, loss=loss, **vars(out))

    @property
    def base_model(self) -> Lfm2VlModel:
        """This model without its vocabulary head; both have the same weights."""
        base = Lfm2VlModel(self.config, self.image_config)
        base.vision_tower = self.vision_tower
        base.multi_modal_projector = self.multi_modal_projector
        base.language_model.model = self.language_model.model
        return base


def _on_device(array: Array | None) -> Any:
    return array if array is None or isinstance(array, mx.array) else mx.array(array)


def _flat(ids: Array | Sequence[int]) -> list[int]:
    """All ids, row after row."""
    return list(ids) if isinstance(ids, Sequence) else cast("list[int]", ids.flatten().tolist())


def _images_inside(prompt: Prompt, start: int, stop: int) -> list[PromptImage]:
    """The images in a part of a prompt."""
    length = len(prompt.token_ids)
    if not 0 <= start <= stop <= length:
        raise PromptError(f"positions {start} to {stop} are no part of a prompt of {length} tokens")
    touched = [p for p in prompt.images if p.start < stop and start < p.stop]
    for placed in touched:
        if placed.start < start or stop < placed.stop:
            raise PromptError(
                f"positions {start} to {stop} cut through the image at {placed.start} to "
                f"{placed.stop}; a part of a prompt holds an image as a whole or not at all"
            )
    return touched


def causal_lm_loss(logits: mx.array, labels: mx.array) -> mx.array:
    """Mean cross entropy of each next token; positions labelled -100 do not count.

    Args:
        logits: (batch, tokens, vocab).
        labels: (batch, tokens), not shifted.
    """
    if logits.shape[:2] != labels.shape:
        raise PromptError(
            f"labels of shape {labels.shape} need logits of all positions, got {logits.shape[:2]}"
        )
    targets = labels[:, 1:]
    counted = targets != IGNORE_INDEX
    losses = nn.losses.cross_entropy(
        logits[:, :-1].astype(mx.float32), mx.where(counted, targets, 0)
    )
    return (losses * counted).sum() / counted.sum()
