"""Stage by stage against the official implementation, for small checkpoints of every layout.

What follows the pixels is fed the official ones, since Pillow and torchvision may differ by one
grey level.
"""

import mlx.core as mx
import numpy as np
import pytest

from mlx_lfm2vl.generation.generate import generate_step
from mlx_lfm2vl.models.layers import gelu_tanh, swiglu

from .checkpoints.pictures import CASES, messages
from .helpers import cases_of, close, shapes, stored

LAYOUTS = ["first", "v5", "mlx", "noprefix", "head72", "untied", "text396"]


ALL = [
    (name, path.stem)
    for name in LAYOUTS
    for path in sorted(cases_of(name).glob("*.npz"))
    if path.stem != "text_model"
]
every_case = pytest.mark.parametrize(("name", "case"), ALL, ids=["-".join(pair) for pair in ALL])
WHOLE = [(name, case) for name, case in ALL if "hidden_0" in stored(name, case)]
whole_cases = pytest.mark.parametrize(
    ("name", "case"), WHOLE, ids=["-".join(pair) for pair in WHOLE]
)


def forward(model, arrays, **options):
    images = {}
    if "pixel_values" in arrays:
        images = {"pixel_values": arrays["pixel_values"], "spatial_shapes": shapes(arrays)}
    return model(mx.array(arrays["input_ids"])[None], **images, **options)


def test_every_layout_and_case_is_here():
    assert {name for name, _ in ALL} == set(LAYOUTS)
    assert {case for name, case in ALL if name == "v5"} == set(CASES)
    assert {case for name, case in WHOLE if name == "v5"} == {"small", "interleaved", "text"}


@every_case
def test_prompt(name, case, loaded):
    official = stored(name, case)
    prompt = loaded(name)[1](messages(case))
    assert prompt.token_ids == official["input_ids"].tolist()
    assert list(prompt.spatial_shapes) == shapes(official)
    if "pixel_values" not in official:
        assert prompt.pixel_values is None
        return
    difference = np.abs(prompt.pixel_values.astype(int) - official["pixel_values"].astype(int))
    # torchvision's bicubic keeps its weights in 16 bits, which can cost one level in each direction
    bicubic = loaded(name)[1].image_processor.config.resample == 3
    assert difference.max() <= (2 if bicubic else 1)
    assert (difference > 1).mean() < 1e-3
    image_id = loaded(name)[0].config.image_token_id
    for span in prompt.images:
        assert prompt.token_ids[span.start : span.stop].count(image_id) == span.image_tokens


@every_case
def test_features_logits_loss_and_greedy_tokens(name, case, loaded):
    model, official = loaded(name)[0], stored(name, case)
    ids = official["input_ids"]
    labels = np.where(np.arange(len(ids)) % 3 == 0, -100, ids)
    out = forward(model, official, labels=mx.array(labels)[None])
    close(out.logits[0, -len(official["logits"]) :], official["logits"])
    close(out.loss, official["loss"])
    if "features" in official:
        close(out.image_hidden_states, official["features"])
    embeddings = model.embed(ids.tolist(), out.image_hidden_states)[0]
    steps = generate_step(ids.tolist(), model, max_tokens=12, input_embeddings=embeddings)
    assert [token for token, _ in steps] == official["greedy"].tolist()


@whole_cases
def test_every_hidden_state_and_attention(name, case, loaded):
    model, official = loaded(name)[0], stored(name, case)
    out = forward(model, official, output_hidden_states=True, output_attentions=True)
    layers = model.config.text_config.layer_types
    assert len(out.hidden_states) == len(layers) + 1
    for i, hidden in enumerate(out.hidden_states):
        close(hidden[0], official[f"hidden_{i}"])
    close(out.last_hidden_state[0], official[f"hidden_{len(layers)}"])
    assert len(out.attentions) == layers.count("full_attention")
    for i, weights in enumerate(out.attentions):
        close(weights[0], official[f"attention_{i}"])


@whole_cases
def test_every_vision_layer(name, case, loaded):
    model, official = loaded(name)[0], stored(name, case)
    if "pixel_values" not in official:
        assert case == "text"
        return
    pixels = model.normalize(mx.array(official["pixel_values"]))
    out = model.vision_tower(pixels, shapes(official), output_hidden_states=True)
    close(out.last_hidden_state, official["vision_last"])
    kept = model.config.vision_config.num_hidden_layers
    assert len(out.hidden_states) == kept + 1
    # the official tuple of hidden states begins with the embeddings
    for i, hidden in enumerate(out.hidden_states):
        close(hidden, official[f"vision_{i}"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side(side, loaded):
    model, official = loaded("v5")[0], stored("v5", "text_model")
    mask = official[f"{side}_mask"]
    labels = np.where(mask == 1, official["input_ids"], -100)
    out = model(
        mx.array(official[f"{side}_ids"]),
        attention_mask=mx.array(mask),
        labels=mx.array(labels),
    )
    real = mask.astype(bool)
    assert not real.all(), "nothing is padded"
    close(np.asarray(out.logits)[real], official[f"{side}_logits"][real])
    # a label behind left padding is predicted from padding, whose state is anyone's guess
    if side == "right":
        close(out.loss, official[f"{side}_loss"])


def test_padding_with_a_cache(loaded):
    """A padded prompt, then tokens one by one, gives what the whole gave at once."""
    model, official = loaded("v5")[0], stored("v5", "text_model")
    ids, mask = mx.array(official["left_ids"]), mx.array(official["left_mask"])
    cache = model.make_cache()
    parts = [
        model(ids[:, a:b], attention_mask=mask[:, :b], cache=cache).logits
        for a, b in ((0, 7), (7, 10), (10, 11), (11, 12))
    ]
    real = official["left_mask"].astype(bool)
    logits = np.asarray(mx.concatenate(parts, axis=1))
    close(logits[real], official["left_logits"][real])


def test_own_positions_embeddings_and_few_logits(loaded):
    model, official = loaded("v5")[0], stored("v5", "text_model")
    ids = mx.array(official["input_ids"])
    close(model(ids).logits, official["logits"])
    positions = mx.array(official["position_ids"])
    close(model(ids, position_ids=positions).logits, official["position_logits"])
    counting = mx.broadcast_to(mx.arange(12), (2, 12))
    close(model(ids, position_ids=counting).logits, official["logits"])
    embeddings = mx.array(official["inputs_embeds"])
    close(model(inputs_embeds=embeddings).logits, official["embeds_logits"])
    close(model(ids, logits_to_keep=3).logits, official["last_3_logits"])
    close(model(ids, logits_to_keep=1).logits, official["last_3_logits"][:, -1:])


def test_a_batch_of_prompts_with_images(loaded):
    """Images of several rows fill their places in order."""
    model, official = loaded("v5")[0], stored("v5", "small")
    ids = mx.array(official["input_ids"])[None]
    pixels = np.concatenate([official["pixel_values"]] * 2)
    out = model(mx.concatenate([ids, ids]), pixels, shapes(official) * 2)
    close(out.logits[0], official["logits"])
    close(out.logits[1], official["logits"])


def test_image_features_can_be_kept(loaded):
    model, official = loaded("v5")[0], stored("v5", "small")
    features = model.encode_images(official["pixel_values"], shapes(official))
    close(features, official["features"])
    ids = mx.array(official["input_ids"])[None]
    close(model(ids, image_features=features).logits[0], official["logits"])


def silu(x):
    return x / 2 * (1 + np.tanh(x / 2))


def gelu(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(gelu_tanh, gelu), (lambda x: swiglu(x, mx.ones_like(x)), silu)],
    ids=["gelu_tanh", "swiglu"],
)
def test_activations_and_their_gradients(ours, theirs):
    """Far out, too, where an exponential has no number any more."""
    x = np.array([-1e4, -200, -90, -20, -5, -1, -1e-3, 0, 1e-3, 1, 5, 20, 90, 200, 1e4])
    gradient = mx.grad(lambda values: ours(values).sum())(mx.array(x, mx.float32))
    slope = (theirs(x + 1e-5) - theirs(x - 1e-5)) / 2e-5
    # float32 has 24 bits; the official values are of float64
    assert np.allclose(np.asarray(ours(mx.array(x, mx.float32))), theirs(x), rtol=1e-6, atol=1e-7)
    assert np.allclose(np.asarray(gradient), slope, rtol=1e-5, atol=1e-6)
