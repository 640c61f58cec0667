"""The official processor's own output goes into the model as it is, and comes out as it should.

20 conversations in 15 batches: text alone, one image, tiles, several images, several turns, rows
padded on either side. `checkpoints/make_official_inputs.py` keeps them.
"""

from functools import cache

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_lfm2vl import Lfm2VlModel, Lfm2VlModelOutput, PromptError

from .helpers import FIXTURES, close

VISION_STEP = 7  # as in the script


@cache
def batches() -> dict[str, dict[str, np.ndarray]]:
    found: dict[str, dict[str, np.ndarray]] = {}
    with np.load(FIXTURES / "official_inputs.npz") as arrays:
        for path in arrays:
            name, key = path.split("/")
            found.setdefault(name, {})[key] = arrays[path]
    return found


NAMES = sorted(batches())
WITH_IMAGES = [name for name in NAMES if "pixel_values" in batches()[name]]
every_batch = pytest.mark.parametrize("name", NAMES)
image_batches = pytest.mark.parametrize("name", WITH_IMAGES)


def official_inputs(name: str) -> dict[str, np.ndarray]:
    """What the official processor returned, its pixels normalised as it had them."""
    official = batches()[name]
    inputs = {key: official[key] for key in ("input_ids", "attention_mask")}
    if "pixel_values" in official:
        mask = official["pixel_attention_mask"]
        pixels = (official["pixel_values"] - np.float32(127.5)) / np.float32(127.5)
        inputs["pixel_values"] = np.where(mask[..., None] == 1, pixels, np.float32(0))
        inputs |= {"pixel_attention_mask": mask, "spatial_shapes": official["spatial_shapes"]}
    return inputs


def load_case(name, loaded):
    """(model, the official processor's output, the official model's)."""
    checkpoint = name.split()[0]
    known = checkpoint in ("head72", "untied", "text396")
    return loaded(checkpoint if known else "v5")[0], official_inputs(name), batches()[name]


@pytest.fixture
def case(name, loaded):
    return load_case(name, loaded)


def check(out, official) -> None:
    rows = np.arange(len(official["places"]))
    places = official["places"]
    hidden = np.asarray(out.hidden_states[-1])
    assert np.array_equal(hidden, np.asarray(out.last_hidden_state))
    for ours, theirs in zip(out.hidden_states, official["hidden_states"], strict=True):
        close(np.asarray(ours)[rows[:, None], places], theirs)
    if "image_hidden_states" in official:
        close(out.image_hidden_states, official["image_hidden_states"])
    else:
        assert out.image_hidden_states is None


def test_the_fixture_holds_what_it_says():
    assert len(NAMES) == 15
    assert sum(len(batch["input_ids"]) for batch in batches().values()) == 20
    assert len(WITH_IMAGES) == 13
    padded = [name for name in NAMES if not batches()[name]["attention_mask"].all()]
    assert padded == ["padded left", "padded right", "untied batch"]
    masks = [batches()[name]["pixel_attention_mask"] for name in WITH_IMAGES]
    assert sum(not mask.all() for mask in masks) > 10, "views with padding"
    assert max(len(mask) for mask in masks) > 10


@every_batch
def test_hidden_states_and_logits(name, loaded):
    model, inputs, official = load_case(name, loaded)
    out = model(**inputs, output_hidden_states=True)
    check(out, official)
    last = official["places"][:, -1]
    close(np.asarray(out.logits)[np.arange(len(last)), last], official["logits"])
    # the same positions, chosen before the vocabulary
    chosen = model(**inputs, logits_to_keep=np.unique(last)).logits
    assert chosen.shape[1] == len(np.unique(last))
    found = np.searchsorted(np.unique(last), last)
    close(np.asarray(chosen)[np.arange(len(last)), found], official["logits"])


@every_batch
def test_without_the_head(name, case, work):
    model, inputs, official = case
    assert isinstance(model, Lfm2VlModel)
    for call in (model.base_model, lambda **given: Lfm2VlModel.__call__(model, **given)):
        out = call(**inputs, output_hidden_states=True)
        assert type(out) is Lfm2VlModelOutput
        check(out, official)
    assert work.projected == []
    assert len(work.passes) == 2


@image_batches
def test_image_features(name, case):
    model, inputs, official = case
    names = ("pixel_values", "spatial_shapes", "pixel_attention_mask")
    out = model.get_image_features(**{key: inputs[key] for key in names})
    sizes = [rows * cols // 4 for rows, cols in inputs["spatial_shapes"]]
    assert [len(tokens) for tokens in out.pooler_output] == sizes
    close(mx.concatenate(list(out.pooler_output)), official["image_hidden_states"])
    close(out.last_hidden_state[::VISION_STEP], official["vision_hidden_state"])


FORMS = {
    "mlx": lambda given: {key: mx.array(value) for key, value in given.items()},
    "no mask": lambda given: {k: v for k, v in given.items() if k != "pixel_attention_mask"},
    "mask of booleans": lambda given: {
        **given,
        "pixel_attention_mask": given["pixel_attention_mask"].astype(bool),
    },
    "lists of shapes": lambda given: {
        **given,
        "spatial_shapes": given["spatial_shapes"].tolist(),
    },
    "wide numbers": lambda given: {
        key: value.astype(np.float64 if value.dtype == np.float32 else np.int64)
        for key, value in given.items()
    },
    "more padding": lambda given: {
        **given,
        "pixel_values": np.pad(given["pixel_values"], ((0, 0), (0, 5), (0, 0))),
        "pixel_attention_mask": np.pad(given["pixel_attention_mask"], ((0, 0), (0, 5))),
    },
    "values in the padding": lambda given: {
        **given,
        "pixel_values": given["pixel_values"] - 9 * (1 - given["pixel_attention_mask"][..., None]),
    },
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["mixed", "padded left"])
def test_other_forms_of_the_same_inputs(name, form, case):
    model, inputs, official = case
    check(model(**FORMS[form](inputs), output_hidden_states=True), official)


@pytest.mark.parametrize("name", ["mixed", "tiled"])
def test_packed_pixels_are_the_same_pixels(name, case, work):
    model, inputs, official = case
    packed = official["pixel_values"][official["pixel_attention_mask"] == 1]
    shapes = inputs["spatial_shapes"]
    padded = model.encode_images(inputs["pixel_values"], shapes, inputs["pixel_attention_mask"])
    groups = list(work.views)
    work.clear()
    assert np.allclose(padded, model.encode_images(packed, shapes), rtol=1e-6, atol=1e-6)
    assert work.views == groups
    assert len(groups) < len(shapes), "neighbours of one shape go together"
    with pytest.raises(PromptError, match="no pixel_attention_mask"):
        model.encode_images(packed, shapes, inputs["pixel_attention_mask"])


@pytest.mark.parametrize("name", ["mixed"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixel_values": lambda x: x[0, 0]}, r"pixel_values of shape \(768,\)"),
        ({"pixel_values": lambda x: x[None]}, r"pixel_values of shape \(1, 13, 16, 768\)"),
        ({"pixel_values": lambda x: x[..., :-1]}, r"16, 767\).* \(views, patches, 768\)"),
        ({"pixel_values": lambda x: x.astype(np.uint8)}, r"shape \(13, 16, 768\) and type uint8"),
        ({"pixel_values": lambda x: x.reshape(-1, 768)}, r"shape \(208, 768\) and type float32"),
        ({"pixel_values": lambda x: x[:-1]}, "do not fit pixel_values of 12 views"),
        ({"pixel_values": lambda x: x[:, :-1]}, "13 views with 15 patches each"),
        ({"spatial_shapes": lambda x: x[:-1]}, "do not fit pixel_values of 13 views"),
        ({"spatial_shapes": lambda x: x[:, :1]}, r"must be \(rows, columns\) in patches"),
        ({"spatial_shapes": lambda x: x[:0]}, r"must be \(rows, columns\) in patches"),
        ({"spatial_shapes": lambda x: x.tolist()[0]}, r"must be \(rows, columns\) in patches"),
        ({"spatial_shapes": lambda x: x * 0}, "both multiples of 2"),
        ({"spatial_shapes": lambda x: x - [1, 0]}, "both multiples of 2"),
        ({"spatial_shapes": lambda x: x - [0, 1]}, "both multiples of 2"),
        ({"spatial_shapes": lambda x: None}, "need spatial_shapes"),
        ({"pixel_attention_mask": lambda x: x * 0 + 1}, "does not mark the first"),
        ({"pixel_attention_mask": lambda x: x[:, ::-1]}, "does not mark the first"),
        ({"pixel_attention_mask": lambda x: x[:-1]}, "does not mark the first"),
        ({"pixel_attention_mask": lambda x: x[:, :-1]}, "does not mark the first"),
        ({"pixel_attention_mask": lambda x: x[0]}, "does not mark the first"),
        ({"input_ids": lambda x: x * 0 + 999}, "token id 999 is not in the vocabulary"),
        ({"input_ids": lambda x: x[:, :10]}, "image features were given"),
        ({"input_ids": lambda x: None}, "exactly one of input_ids and inputs_embeds"),
    ],
)  # fmt: skip
def test_inputs_that_do_not_fit(name, case, changes, message):
    model, inputs, _ = case
    wrong = {key: changes.get(key, lambda x: x)(value) for key, value in inputs.items()}
    with pytest.raises(PromptError, match=message) as caught:
        model(**wrong)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["v5", "untied"])
def test_weights_of_the_model_without_its_head(name, loaded):
    model, _ = loaded(name)
    whole = dict(tree_flatten(model.parameters()))
    head = {"language_model.lm_head.weight"} if name == "untied" else set()
    for base in (model.base_model, Lfm2VlModel(model.config, model.image_config)):
        assert type(base) is Lfm2VlModel
        assert {k: v.shape for k, v in tree_flatten(base.parameters())} == {
            k: v.shape for k, v in whole.items() if k not in head
        }
    base = model.base_model
    assert all(whole[key] is array for key, array in tree_flatten(base.parameters()))
