"""Tests of the tests: each classic mistake, made on purpose, must be noticed."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_lfm2vl.models import lfm2 as language
from mlx_lfm2vl.models import lfm2_vl as model
from mlx_lfm2vl.models import siglip2 as vision
from mlx_lfm2vl.models.cache import ConvCache
from mlx_lfm2vl.prompts import image_processor

from . import test_official_inputs as inputs
from . import test_parity as parity


@pytest.fixture
def noticed(loaded):
    """Asserts that a parity test fails now, and that it does because of a comparison."""

    def check(test, *arguments):
        with pytest.raises(AssertionError):
            test(*arguments, loaded)

    return check


def test_nothing_is_noticed_where_nothing_is_broken(loaded):
    parity.test_prompt("v5", "tiled", loaded)
    parity.test_features_logits_loss_and_greedy_tokens("v5", "tiled", loaded)
    parity.test_padding_on_either_side("left", loaded)
    inputs.test_hidden_states_and_logits("tiled", loaded)


def test_conv_state_dropped(noticed, monkeypatch):
    def forget(self, value):
        vars(self)["kept"] = [mx.zeros_like(array) for array in value]

    forgets = property(lambda self: vars(self)["kept"], forget)
    monkeypatch.setattr(ConvCache, "arrays", forgets, raising=False)
    noticed(parity.test_features_logits_loss_and_greedy_tokens, "v5", "small")
    noticed(parity.test_padding_with_a_cache)


def test_position_filter_without_antialias(noticed, monkeypatch):
    def without_antialias(source, target):
        matrix = np.zeros((target, source))
        for i in range(target):
            center = source / target * (i + 0.5)
            for j in range(source):
                matrix[i, j] = max(0.0, 1 - abs(j + 0.5 - center))
        return (matrix / matrix.sum(axis=1, keepdims=True)).tolist()

    monkeypatch.setattr(vision, "resize_matrix", without_antialias)
    noticed(parity.test_features_logits_loss_and_greedy_tokens, "v5", "small")
    noticed(parity.test_every_vision_layer, "v5", "small")


def test_tiles_column_first(noticed, monkeypatch):
    right = image_processor._patches

    def column_first(pixels, rows, cols, patch):
        tiles = right(pixels, rows, cols, patch)
        tiles = tiles.reshape(rows, cols, -1, tiles.shape[-1])
        return tiles.swapaxes(0, 1).reshape(-1, tiles.shape[-1])

    monkeypatch.setattr(image_processor, "_patches", column_first)
    noticed(parity.test_prompt, "v5", "tiled")


def test_thumbnail_first(noticed, monkeypatch):
    right = image_processor.Lfm2VlImageProcessor.__call__

    def thumbnail_first(self, *arguments):
        image = right(self, *arguments)
        if image.layout.rows == 0:
            return image
        rows, cols = image.spatial_shapes[-1]
        return replace(
            image,
            pixel_values=np.roll(image.pixel_values, rows * cols, axis=0),
            spatial_shapes=(image.spatial_shapes[-1], *image.spatial_shapes[:-1]),
        )

    monkeypatch.setattr(image_processor.Lfm2VlImageProcessor, "__call__", thumbnail_first)
    noticed(parity.test_prompt, "v5", "tiled")


def test_mask_of_padded_text_ignored(noticed, monkeypatch):
    right = language.Lfm2Model._masks

    def ignoring(self, length, cache, attention_mask):
        return right(self, length, cache, None)

    monkeypatch.setattr(language.Lfm2Model, "_masks", ignoring)
    # nothing real comes after padding on the right, so only the left side can show it
    noticed(parity.test_padding_on_either_side, "left")
    noticed(parity.test_padding_with_a_cache)
    noticed(inputs.test_hidden_states_and_logits, "padded left")


@pytest.mark.parametrize("part", ["attention", "padding"])
def test_half_of_the_mask_ignored(part, noticed, monkeypatch):
    right = language.Lfm2Model._masks

    def half(self, length, cache, attention_mask):
        ignored = right(self, length, cache, None)._asdict()[part]
        return right(self, length, cache, attention_mask)._replace(**{part: ignored})

    monkeypatch.setattr(language.Lfm2Model, "_masks", half)
    noticed(parity.test_padding_on_either_side, "left")


def test_wrong_row_in_the_merge(noticed, monkeypatch):
    right = model.Lfm2VlForConditionalGeneration.embed

    def off_by_one(self, input_ids, image_features=None):
        if image_features is not None:
            image_features = mx.roll(image_features, 1, axis=0)
        return right(self, input_ids, image_features)

    monkeypatch.setattr(model.Lfm2VlForConditionalGeneration, "embed", off_by_one)
    noticed(parity.test_features_logits_loss_and_greedy_tokens, "v5", "small")


def test_rotary_base(noticed, loaded, monkeypatch):
    for layer in loaded("v5")[0].layers:
        if layer.is_attention_layer:
            monkeypatch.setattr(layer.self_attn, "rope_theta", 1e6)
    noticed(parity.test_features_logits_loss_and_greedy_tokens, "v5", "text")
    noticed(parity.test_every_hidden_state_and_attention, "v5", "text")


@pytest.mark.parametrize("norm", ["q_layernorm", "k_layernorm"])
def test_query_or_key_norm_skipped(norm, noticed, loaded, monkeypatch):
    for layer in loaded("v5")[0].layers:
        if layer.is_attention_layer:
            monkeypatch.setitem(layer.self_attn, norm, lambda x: x)
    noticed(parity.test_features_logits_loss_and_greedy_tokens, "v5", "text")
    noticed(parity.test_every_hidden_state_and_attention, "v5", "text")


def test_post_norm_of_the_vision_tower_skipped(noticed, loaded, monkeypatch):
    monkeypatch.setitem(loaded("head72")[0].vision_tower, "post_layernorm", lambda x: x)
    # its weight tells the compute type, too
    monkeypatch.setattr(
        model.Lfm2VlForConditionalGeneration,
        "normalize",
        lambda self, pixels: (pixels.astype(mx.float32) / 255 - 0.5) / 0.5,
    )
    noticed(parity.test_features_logits_loss_and_greedy_tokens, "head72", "small")


def test_padded_pixels_normalised_again(noticed, monkeypatch):
    monkeypatch.setattr(model.Lfm2VlModel, "_as_computed", lambda _, pixels: (pixels - 0.5) / 0.5)
    noticed(inputs.test_hidden_states_and_logits, "small")


def test_padding_taken_for_patches(noticed, monkeypatch):
    def last_ones(pixel_values, shapes, mask):
        counts = [rows * cols for rows, cols in shapes]
        return np.concatenate([pixel_values[i, -count:] for i, count in enumerate(counts)])

    monkeypatch.setattr(vision, "unpad_views", last_ones)
    noticed(inputs.test_hidden_states_and_logits, "tiled")


def test_padded_views_in_another_order(noticed, monkeypatch):
    right = vision.unpad_views

    def first_ones_swapped(pixel_values, shapes, mask):
        swapped = pixel_values[[1, 0, *range(2, len(shapes))]]
        return right(swapped, shapes, mask)

    monkeypatch.setattr(vision, "unpad_views", first_ones_swapped)
    noticed(inputs.test_hidden_states_and_logits, "tiled")
