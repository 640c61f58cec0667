"""The whole model: images are encoded, put where their tokens stand, and read with the text.

After `transformers`' `Lfm2VlForConditionalGeneration`.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
import mlx.nn as nn

from ..errors import PromptError
from ..options import CacheOptions, ImageProcessorConfig
from ..prompts.processor import Prompt, PromptImage, pack_pixels
from .cache import Cache
from .config import Lfm2VlConfig
from .lfm2 import Lfm2ForCausalLM
from .projector import Lfm2VlMultiModalProjector
from .siglip2 import Siglip2VisionModel, group_views

if TYPE_CHECKING:
    import numpy as np


IGNORE_INDEX = -100  # label of a position that does not count


@dataclass(frozen=True)
class Lfm2VlOutput:
    """What a forward pass gives.

    Attributes:
        logits: (batch, kept positions, vocab).
        last_hidden_state: (batch, tokens, hidden), after the final norm.
        loss: a scalar, where labels were given.
        hidden_states: embeddings and each layer's output, (batch, tokens, hidden); the last one
            after the final norm.
        attentions: (batch, heads, tokens, positions) of each attention layer.
        image_hidden_states: (image tokens, text hidden), where images were given.
    """

    logits: mx.array
    last_hidden_state: mx.array
    loss: mx.array | None = None
    hidden_states: tuple[mx.array, ...] | None = None
    attentions: tuple[mx.array, ...] | None = None
    image_hidden_states: mx.array | None = None


class Lfm2VlForConditionalGeneration(nn.Module):
    """LFM2-VL: vision tower, projector and language model."""

    def __init__(
        self, config: Lfm2VlConfig, image_config: ImageProcessorConfig | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.image_config = image_config if image_config is not None else ImageProcessorConfig()
        self.vision_tower = Siglip2VisionModel(config.vision_config)
        self.multi_modal_projector = Lfm2VlMultiModalProjector(config)
        self.language_model = Lfm2ForCausalLM(config.text_config)

    def __call__(
        self,
        input_ids: mx.array | None = None,
        pixel_values: mx.array | np.ndarray[Any, Any] | None = None,
        spatial_shapes: Sequence[tuple[int, int]] | None = None,
        image_features: mx.array | None = None,
        inputs_embeds: mx.array | None = None,
        attention_mask: mx.array | None = None,
        position_ids: mx.array | None = None,
        cache: Sequence[Cache] | None = None,
        labels: mx.array | None = None,
        logits_to_keep: int = 0,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> Lfm2VlOutput:
        """One forward pass, as the official `forward`.

        Args:
            input_ids: (batch, tokens), or `inputs_embeds` (batch, tokens, hidden) instead.
            pixel_values: (patches of all views, 3·16²) uint8, as the processor packs them.
            spatial_shapes: (rows, columns) in patches, one per view.
            image_features: what `encode_images` gave, instead of `pixel_values`.
            attention_mask: (batch, positions), 1 on tokens and 0 on padding on either side.
            position_ids: (batch, tokens); by default they count up from the cache.
            cache: from `make_cache`, filled in place.
            labels: (batch, tokens), -100 where ignored; needs all logits.
            logits_to_keep: project only so many last positions; 0 for all.

        Raises:
            PromptError: arguments that contradict each other, or a number of image features
                other than that of image tokens.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise PromptError("pass exactly one of input_ids and inputs_embeds")
        if pixel_values is not None:
            if image_features is not None or spatial_shapes is None:
                raise PromptError("pixel_values need spatial_shapes and exclude image_features")
            image_features = self.encode_images(pixel_values, spatial_shapes)
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embed(input_ids, image_features)
        elif image_features is not None:
            raise PromptError("images need input_ids, to know where they stand")
        out = self.language_model.model(
            inputs_embeds,
            cache,
            attention_mask,
            position_ids,
            output_hidden_states,
            output_attentions,
        )
        hidden = out.last_hidden_state
        logits = self.language_model.logits(hidden[:, -logits_to_keep:])
        return Lfm2VlOutput(
            logits,
            hidden,
            None if labels is None else causal_lm_loss(logits, labels),
            None if out.hidden_states is None else tuple(out.hidden_states),
            None if out.attentions is None else tuple(out.attentions),
            image_features,
        )

    def encode_images(
        self,
        pixel_values: mx.array | np.ndarray[Any, Any],
        spatial_shapes: Sequence[tuple[int, int]],
    ) -> mx.array:
        """Views to image tokens.

        Args:
            pixel_values: (patches of all views, 3·16²) uint8.
            spatial_shapes: (rows, columns) in patches, one per view.

        Returns:
            (image tokens of all views, text hidden), lazily.
        """
        patches = sum(rows * cols for rows, cols in spatial_shapes)
        if patches != pixel_values.shape[0]:
            raise PromptError(
                f"spatial_shapes {list(spatial_shapes)} cover {patches} patches; "
                f"pixel_values has {pixel_values.shape[0]}"
            )
        features: list[mx.array] = []
        start = 0
        for views, (rows, cols) in group_views(spatial_shapes):
            stop = start + views * rows * cols
            group = mx.array(pixel_values[start:stop])
            if features:
                # one group after the other: what they need is never alive together
                group = mx.depends(group, features[-1])
            shapes = [(rows, cols)] * views
            x = self.vision_tower(self.normalize(group), shapes).last_hidden_state
            features.append(self.multi_modal_projector(x, shapes))
            start = stop
        return mx.concatenate(features)

    def normalize(self, pixel_values: mx.array) -> mx.array:
        """uint8 (patches, 3·16²) -> (x · rescale_factor - mean) / std, in the compute type."""
        config = self.image_config
        pixels = config.encoder_patch_size**2
        # one fused step, in float32, as the official processor does it
        mean = mx.array(config.image_mean * pixels) / config.rescale_factor
        std = mx.array(config.image_std * pixels) / config.rescale_factor
        return ((pixel_values - mean) / std).astype(self.vision_tower.post_layernorm.weight.dtype)

    def embed(
        self, input_ids: mx.array | Sequence[int], image_features: mx.array | None = None
    ) -> mx.array:
        """Token embeddings with image features in the rows of the image tokens, in order.

        Args:
            input_ids: (batch, tokens), or a list of ids for a batch of one. A list costs no read
                from the device, and its ids are checked.
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
            input_ids = list(input_ids)
            self._check_ids(input_ids)
            ids = mx.array(input_ids, mx.int32)[None]
        embeddings = self.language_model.embed(ids)
        if image_features is None:
            return embeddings
        tokens = input_ids
        if isinstance(tokens, mx.array):
            tokens = cast("list[int]", tokens.flatten().tolist())
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
        self._check_ids(token_ids)
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

    def _check_ids(self, token_ids: Sequence[int]) -> None:
        size = self.config.text_config.vocab_size
        if len(token_ids) > 0 and not 0 <= min(token_ids) <= max(token_ids) < size:
            wrong = next(token for token in token_ids if not 0 <= token < size)
            raise PromptError(
                f"token id {wrong} is not in the vocabulary of {size} tokens, 0 to {size - 1}"
            )

    def _check_features(self, token_ids: Sequence[int], image_features: mx.array) -> None:
        places = token_ids.count(self.config.image_token_id)
        if places != image_features.shape[0]:
            raise PromptError(
                f"{places} image tokens stand in the prompt, but {image_features.shape[0]} "
                "image features were given"
            )

    def make_cache(
        self, options: CacheOptions | None = None, prompt_length: int = 0
    ) -> list[Cache]:
        """An empty cache; see `Lfm2ForCausalLM.make_cache`."""
        return self.language_model.make_cache(options, prompt_length)

    def gradient_checkpointing_enable(self) -> None:
        """Computes each layer's activations again in the backward pass instead of keeping them."""
        self.language_model.model.gradient_checkpointing = True
        self.vision_tower.encoder.gradient_checkpointing = True

    @property
    def layers(self) -> list[Any]:
        return self.language_model.layers


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
