"""Quantized folders, odd copies of weights, types: what loads, and what it computes."""

import json
import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_lfm2vl
from mlx_lfm2vl import WeightsError
from mlx_lfm2vl.checkpoints.loading import choose_dtype

from .helpers import TOLERANCE, shapes, stored

AFFINE_4 = {"group_size": 32, "bits": 4}


def quantize_folder(folder, settings, predicate):
    """Quantizes a folder in place; returns the float model that computes the same."""
    model, _ = mlx_lfm2vl.load(folder, dtype="float32")
    config = json.loads((folder / "config.json").read_text())
    nn.quantize(model, class_predicate=predicate)
    mx.save_safetensors(
        str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"}
    )
    config["quantization"] = config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))
    exact, _ = mlx_lfm2vl.load(folder.parents[0] / "original", dtype="float32")
    for name, module in model.named_modules():
        if "scales" in module:
            weight = mx.dequantize(
                module.weight,
                module.scales,
                module.get("biases"),
                module.group_size,
                module.bits,
                mode=module.mode,
                dtype=mx.float32,
            )
            exact.load_weights([(f"{name}.weight", weight)], strict=False)
    return exact


def fits(module, group_size):
    return (
        isinstance(module, (nn.Linear, nn.Embedding)) and module.weight.shape[1] % group_size == 0
    )


@pytest.fixture
def quantized(copied, tmp_path):
    def make(settings, own=None):
        (tmp_path / "original").symlink_to(copied("mlx"))
        folder = tmp_path / "quantized"
        shutil.copytree(tmp_path / "mlx", folder)
        own = own or {}

        def predicate(path, module):
            if not fits(module, settings["group_size"]) or path.startswith("vision_tower"):
                return False
            return own.get(path, settings)

        return folder, quantize_folder(folder, {**settings, **own}, predicate)

    return make


@pytest.mark.parametrize(
    ("settings", "own"),
    [
        (AFFINE_4, {}),
        ({"group_size": 32, "bits": 8}, {}),
        ({"group_size": 32, "bits": 3}, {}),
        (
            AFFINE_4,
            {"language_model.model.layers.1.self_attn.v_proj": {"group_size": 32, "bits": 8}},
        ),
        ({"group_size": 32, "bits": 4, "mode": "mxfp4"}, {}),
        ({"group_size": 32, "bits": 8, "mode": "mxfp8"}, {}),
        ({"group_size": 16, "bits": 4, "mode": "nvfp4"}, {}),
    ],
    ids=lambda value: (
        " ".join(map(str, value.values())) if "bits" in value else "mixed"[: len(value) * 9]
    ),
)
def test_quantized_folder_computes_what_its_integers_say(settings, own, quantized):
    folder, exact = quantized(settings, own)
    model, _ = mlx_lfm2vl.load(folder, dtype="float32")
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    assert kinds["language_model.model.embed_tokens"] == "QuantizedEmbedding"
    assert kinds["multi_modal_projector.linear_1"] == "QuantizedLinear"
    # its 40 inputs do not divide by the group size, so the folder left it alone
    assert kinds["multi_modal_projector.linear_2"] == "Linear"
    assert kinds["vision_tower.encoder.layers.0.mlp.fc1"] == "Linear"
    value = model.language_model.model.layers[1].self_attn.v_proj
    assert value.bits == (8 if own else settings["bits"])
    official = stored("mlx", "small")
    ids = mx.array(official["input_ids"])[None]
    ours = model(ids, official["pixel_values"], shapes(official)).logits
    theirs = exact(ids, official["pixel_values"], shapes(official)).logits
    error = (mx.abs(ours - theirs).max() / mx.abs(theirs).max()).item()
    assert error < TOLERANCE


def test_scales_need_a_quantization_entry(quantized):
    folder, _ = quantized(AFFINE_4)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization"], config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"scales is there, but config.json has no quantization"):
        mlx_lfm2vl.load(folder)


def test_a_copy_of_the_tied_head_changes_nothing(copied, loaded):
    folder = copied("v5")
    weights = dict(mx.load(str(folder / "model.safetensors")))
    weights["lm_head.weight"] = weights["model.language_model.embed_tokens.weight"]
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    model, _ = mlx_lfm2vl.load(folder, dtype="float32")
    ids = mx.array([[5, 200, 201]])
    assert mx.array_equal(model(ids).logits, loaded("v5")[0](ids).logits)


def test_only_the_stray_projector_norm_is_dropped(copied):
    folder = copied("mlx")
    weights = dict(mx.load(str(folder / "model.safetensors")))
    mx.eval(weights)
    assert "multi_modal_projector.layer_norm.weight" in weights
    weights["multi_modal_projector.other_norm.weight"] = mx.ones((4,))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    with pytest.raises(WeightsError, match="other_norm"):
        mlx_lfm2vl.load(folder)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_type_of_compute(dtype, fixtures):
    model, _ = mlx_lfm2vl.load(fixtures / "v5", dtype=dtype)
    types = {array.dtype for _, array in tree_flatten(model.parameters())}
    assert types == {getattr(mx, dtype)}
    official = stored("v5", "small")
    ids = mx.array(official["input_ids"])[None]
    out = model(ids, official["pixel_values"], shapes(official))
    assert out.logits.dtype == getattr(mx, dtype)
    logits = np.asarray(out.logits[0].astype(mx.float32))
    error = np.abs(logits - official["logits"]).max() / np.abs(official["logits"]).max()
    # half types carry 11 and 8 bits through four layers
    assert error < {"float32": 1e-5, "float16": 2e-2, "bfloat16": 1e-1}[dtype]


def test_on_a_cpu_the_default_type_is_float32():
    default = choose_dtype(None, "bfloat16")
    on_gpu = mx.default_device() != mx.Device(mx.cpu)
    assert default == (mx.bfloat16 if on_gpu else mx.float32)
    assert choose_dtype("float16", "bfloat16") == mx.float16


def test_load_reads_no_weights(fixtures):
    before = mx.get_active_memory()
    model, _ = mlx_lfm2vl.load(fixtures / "v5")
    assert mx.get_active_memory() - before < 10_000
    eager, _ = mlx_lfm2vl.load(fixtures / "v5", lazy=False)
    assert mx.get_active_memory() - before > sum(a.nbytes for _, a in tree_flatten(eager)) * 0.9
    del model
