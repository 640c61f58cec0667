"""Adapters are mlx-lm's: the same numbers, the same files; fused ones answer like adapted ones."""

import json
import re
import shutil
import subprocess
import sys
import threading
from importlib import import_module

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters

from mlx_lfm2vl import Quantization, TrainError, WeightsError, convert, fuse, generate, load
from mlx_lfm2vl.checkpoints.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    PARTS,
    AdaptedLinear,
    Update,
    adapter_base_model,
    float_weight,
    read_adapters,
    trainable_linears,
)
from mlx_lfm2vl.cli.fuse import main as fuse_main
from mlx_lfm2vl.training.data import Batch
from mlx_lfm2vl.training.trainer import TrainingOptions, make_optimizer, prepare, step

from .helpers import (
    FIXTURES,
    make_adapters,
    modules_after,
    random_updates,
    run_module,
    shapes,
    stored,
)

SOURCE = FIXTURES / "wide"  # widths of 64 can be quantized
EVERYTHING = tuple(PARTS)
TEXT = mx.arange(120, 150)[None]
kinds = pytest.mark.parametrize("kind", ["lora", "dora"])


def logits_of(model):
    """Of a text and of an image."""
    case = stored("wide", "small")
    ids = mx.array(case["input_ids"])[None]
    image = model(ids, case["pixel_values"], shapes(case)).logits
    return np.concatenate([np.array(model(TEXT).logits[0]), np.array(image[0])])


def error(ours, expected):
    ours, expected = np.asarray(ours), np.asarray(expected)
    return np.abs(ours - expected).max() / np.abs(expected).max()


def converted(folder, **quantization):
    return convert(SOURCE, folder, Quantization(group_size=32, **quantization), dtype="float32")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """Gives a folder in which language model, projector and vision tower are quantized."""
    cache = {}

    def get(bits):
        if bits not in cache:
            folder = tmp_path_factory.mktemp("quantized") / f"{bits}bit"
            cache[bits] = converted(folder, bits=bits, vision_bits=bits)
        return cache[bits]

    return get


# one layer


BASES = {
    "plain": (False, None),
    "bias": (True, None),
    "4 bits": (False, {"bits": 4, "group_size": 32}),
    "4 bits with bias": (True, {"bits": 4, "group_size": 32}),
    "8 bits": (True, {"bits": 8, "group_size": 64}),
    "3 bits": (True, {"bits": 3, "group_size": 64}),
    "mxfp4": (True, {"bits": 4, "group_size": 32, "mode": "mxfp4"}),
}


@kinds
@pytest.mark.parametrize("base", BASES)
def test_a_layer_is_mlx_lms(kind, base):
    mx.random.seed(0)
    bias, quantization = BASES[base]
    if kind == "dora" and base in ("3 bits", "mxfp4"):
        return  # refused, see below
    linear = nn.Linear(64, 96, bias)
    if quantization is not None:
        linear = nn.QuantizedLinear.from_linear(linear, **quantization)
    theirs = (DoRALinear if kind == "dora" else LoRALinear).from_base(linear, r=4, scale=3.0)
    theirs.lora_b = 0.3 * mx.random.normal((4, 96))
    if kind == "dora":
        theirs.m = theirs.m * mx.random.uniform(0.5, 2.0, theirs.m.shape)
    magnitude = theirs.m if kind == "dora" else None
    ours = AdaptedLinear(linear, Update(theirs.lora_a, theirs.lora_b, magnitude), 3.0)
    x = mx.random.normal((5, 64))
    # float32 products of 64 numbers, of packed weights or unpacked ones
    assert error(ours(x), theirs(x)) < 1e-5
    assert error(ours(x), linear(x)) > 0.1
    half = ours(x.astype(mx.float16))
    assert half.dtype == linear(x.astype(mx.float16)).dtype


# whole models, in and out of mlx-lm


def mlx_lm_model(source):
    """mlx-lm's text part of LFM2-VL with the weights of a folder."""
    module = import_module("mlx_lm.models.lfm2-vl")
    folder = FIXTURES / "mlx_vlm" / "plain"  # spells its text_config as mlx-lm reads it
    config = json.loads((folder / "config.json").read_text())
    model = module.Model(module.ModelArgs("lfm2-vl", config["text_config"]))
    ours, _ = load(source, dtype="float32")
    weights = tree_flatten(ours.language_model.parameters())
    if any(name.endswith(".scales") for name, _ in weights):
        settings = json.loads((source / "config.json").read_text())["quantization"]
        packed = {name.removesuffix(".scales") for name, _ in weights if name.endswith("scales")}
        chosen = {key: settings[key] for key in ("group_size", "bits")}
        nn.quantize(
            model.language_model, **chosen, class_predicate=lambda path, module: path in packed
        )
    model.language_model.load_weights(weights)
    model.eval()
    return model


PAIRS = [("lora", None), ("lora", 4), ("dora", None), ("dora", 8)]
BITS = pytest.mark.parametrize(("kind", "bits"), PAIRS)


@BITS
def test_our_adapters_load_in_mlx_lm(kind, bits, quantized, tmp_path):
    source = SOURCE if bits is None else quantized(bits)
    trained = make_adapters(tmp_path / "adapters", kind, source, ("language",), num_layers=3)
    theirs = mlx_lm_model(source)
    plain = theirs(TEXT)
    load_adapters(theirs, tmp_path / "adapters")
    ours, _ = load(source, dtype="float32", adapter_path=tmp_path / "adapters")
    trained.eval()
    expected = trained(TEXT).logits
    assert error(ours(TEXT).logits, expected) < 1e-5
    assert error(theirs(TEXT), expected) < 1e-5
    assert error(plain, expected) > 0.1


@BITS
def test_adapters_of_mlx_lm_load_here(kind, bits, quantized, tmp_path):
    source = SOURCE if bits is None else quantized(bits)
    theirs = mlx_lm_model(source)
    theirs.freeze()
    parameters = {"rank": 4, "scale": 5.0, "dropout": 0.0}
    parameters["keys"] = ["self_attn.q_proj", "feed_forward.w1", "conv.in_proj"]
    linear_to_lora_layers(theirs, 2, parameters, use_dora=kind == "dora")
    random_updates(theirs)
    weights = dict(tree_flatten(theirs.trainable_parameters()))
    assert len(weights) >= 8
    mx.save_safetensors(str(tmp_path / ADAPTER_WEIGHTS), weights)
    config = {"fine_tune_type": kind, "num_layers": 2, "lora_parameters": parameters}
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(config))
    ours, _ = load(source, dtype="float32", adapter_path=tmp_path)
    plain, _ = load(source, dtype="float32")
    assert error(ours(TEXT).logits, theirs(TEXT)) < 1e-5
    assert error(plain(TEXT).logits, theirs(TEXT)) > 0.01


def test_whole_weights_of_mlx_lm_load_here(tmp_path):
    name = "language_model.model.layers.3.feed_forward.w1.weight"
    plain, _ = load(SOURCE, dtype="float32")
    weight = dict(tree_flatten(plain.parameters()))[name]
    mx.save_safetensors(str(tmp_path / ADAPTER_WEIGHTS), {name: 2 * weight})
    (tmp_path / ADAPTER_CONFIG).write_text('{"fine_tune_type": "full"}')
    ours, _ = load(SOURCE, dtype="float32", adapter_path=tmp_path)
    assert (dict(tree_flatten(ours.parameters()))[name] == 2 * weight).all()
    fused = fuse(SOURCE, tmp_path, tmp_path / "fused")
    assert error(load(fused, dtype="float32")[0](TEXT).logits, ours(TEXT).logits) < 1e-6
    mx.save_safetensors(str(tmp_path / ADAPTER_WEIGHTS), {name: weight[:3]})
    for use in (
        lambda: load(SOURCE, adapter_path=tmp_path),
        lambda: fuse(SOURCE, tmp_path, tmp_path / "other"),
    ):
        with pytest.raises(TrainError, match=r"w1\.weight of shape \(3, 64\) fits no weight"):
            use()


@kinds
def test_loaded_adapters_answer_like_the_trained_model(kind, tmp_path):
    trained = make_adapters(tmp_path / "adapters", kind)
    trained.eval()
    ours, _ = load(SOURCE, dtype="float32", adapter_path=tmp_path / "adapters")
    assert error(logits_of(ours), logits_of(trained)) < 1e-5
    assert error(logits_of(load(SOURCE, dtype="float32")[0]), logits_of(trained)) > 0.1


def test_adapters_are_applied_in_any_thread(tmp_path):
    make_adapters(tmp_path / "adapters", "dora")
    found = []

    def loading():
        found.append(load(SOURCE, dtype="float32", adapter_path=tmp_path / "adapters"))

    thread = threading.Thread(target=loading)
    thread.start()
    thread.join()
    [(model, processor)] = found
    assert np.isfinite(logits_of(model)).all()
    assert generate(model, processor, "What?", max_tokens=2, temperature=0.0)


def test_answering_with_adapters_imports_no_other_framework(tmp_path):
    make_adapters(tmp_path / "adapters", "dora")
    modules = modules_after(
        run_module("mlx_lfm2vl.generate"),
        *("--model", str(SOURCE), "--adapter-path", str(tmp_path / "adapters")),
        *("--prompt", "What is it?", "--max-tokens", "2"),
    )
    assert modules.isdisjoint({"transformers", "torch", "mlx_lm", "huggingface_hub"})
    assert "mlx" in modules, "the check sees nothing"


# training on quantized weights


@pytest.mark.parametrize(("kind", "bits"), [("lora", 4), ("dora", 8)])
def test_adapters_learn_on_a_quantized_base(kind, bits, quantized):
    model, _ = load(quantized(bits), dtype="float32")
    options = TrainingOptions(
        fine_tune_type=kind, train=EVERYTHING, learning_rate=1e-2, schedule="constant"
    )
    prepare(model, options)
    assert any(isinstance(module, nn.QuantizedLinear) for module in model.modules())
    before = {name: np.array(array) for name, array in tree_flatten(model.parameters())}
    case = stored("wide", "small")
    ids = case["input_ids"].astype(np.int32)[None]
    positions = np.arange(ids.size - 8, ids.size - 1, dtype=np.int32)
    targets = ids.reshape(-1)[positions + 1]
    pixels = case["pixel_values"]
    batch = Batch(ids, positions, targets, pixels, tuple(shapes(case)), ids.size)
    optimizer = make_optimizer(options)
    losses = [step(model, optimizer, [batch], 1.0)[0].item() for _ in range(8)]
    assert losses[-1] < 0.7 * losses[0]
    changed = {
        name
        for name, array in tree_flatten(model.parameters())
        if (np.array(array) != before[name]).any()
    }
    assert changed == {name for name, _ in tree_flatten(model.trainable_parameters())}
    assert {name.rpartition(".")[2] for name in changed} <= {"lora_a", "lora_b", "m"}


@pytest.mark.parametrize("part", EVERYTHING)
def test_quantized_parts_are_not_trained_whole(part, quantized):
    model, _ = load(quantized(4), dtype="float32")
    options = TrainingOptions(fine_tune_type="full", train=(part,))
    with pytest.raises(TrainError, match=f"^{part} is quantized; train adapters, or the original"):
        prepare(model, options)


@pytest.mark.parametrize("quantization", [{"bits": 3}, {"mode": "mxfp4"}])
def test_dora_needs_a_base_that_mlx_lm_unpacks(quantization, tmp_path):
    folder = converted(tmp_path / "base", **quantization)
    model, _ = load(folder, dtype="float32")
    with pytest.raises(TrainError, match="DoRA needs a base of 4 or 8 affine bits") as info:
        prepare(model, TrainingOptions(fine_tune_type="dora"))
    assert "\n" not in str(info.value)
    prepare(load(folder, dtype="float32")[0], TrainingOptions())


# fusing


@kinds
def test_fused_answers_like_adapted(kind, tmp_path):
    make_adapters(tmp_path / "adapters", kind)
    adapted, _ = load(SOURCE, dtype="float32", adapter_path=tmp_path / "adapters")
    expected = logits_of(adapted)
    target = fuse(SOURCE, tmp_path / "adapters", tmp_path / "fused")
    fused, processor = load(target, dtype="float32")
    assert error(logits_of(fused), expected) < 1e-5
    assert generate(fused, processor, "What?", max_tokens=2, temperature=0.0)
    assert not any("lora" in name for name, _ in tree_flatten(fused.parameters()))
    transformers = fuse(SOURCE, tmp_path / "adapters", tmp_path / "hf", to_hf=True)
    names = mx.load(str(transformers / "model.safetensors")).keys()
    assert any(name.startswith("model.language_model.layers.") for name in names)
    assert error(logits_of(load(transformers, dtype="float32")[0]), expected) < 1e-5


@pytest.mark.parametrize(("kind", "bits"), [("lora", 4), ("dora", 8)])
def test_a_quantized_base(kind, bits, quantized, tmp_path):
    """Dequantized by default, like the adapted model; rounded again if asked for."""
    source = quantized(bits)
    make_adapters(tmp_path / "adapters", kind, source)
    adapted, _ = load(source, dtype="float32", adapter_path=tmp_path / "adapters")
    expected = logits_of(adapted)
    whole = fuse(source, tmp_path / "adapters", tmp_path / "whole")
    model, _ = load(whole, dtype="float32")
    assert not any("scales" in module for module in model.modules())
    assert error(logits_of(model), expected) < 1e-4
    transformers = fuse(source, tmp_path / "adapters", tmp_path / "hf", dequantize=True, to_hf=True)
    assert error(logits_of(load(transformers, dtype="float32")[0]), expected) < 1e-4
    packed = fuse(source, tmp_path / "adapters", tmp_path / "packed", dequantize=False)
    model, _ = load(packed, dtype="float32")
    before = load(source, dtype="float32")[0]
    updated = read_adapters(tmp_path / "adapters").updates
    floats, fused = (dict(one.named_modules()) for one in (load(whole)[0], model))
    for name, module in before.named_modules():
        assert ("scales" in fused[name]) == ("scales" in module), name
        if "scales" not in module:
            continue
        assert (fused[name].bits, fused[name].group_size) == (module.bits, module.group_size)
        if isinstance(module, nn.QuantizedLinear):
            # rounded again: at most a step away, and mostly less than half of one
            steps = mx.repeat(mx.abs(fused[name].scales), module.group_size, axis=1)
            away = mx.abs(float_weight(fused[name]) - floats[name].weight) / steps
            assert away.max().item() < 1.01, name
            assert away.mean().item() < 0.3, name
            moved = mx.abs(float_weight(module) - floats[name].weight) / steps
            assert (moved.mean().item() > 0.3) == (name in updated), name
    assert error(logits_of(model), expected) < 0.9 * error(logits_of(before), expected)


def test_maps_without_an_update_stay_as_they_are(quantized, tmp_path):
    source = quantized(4)
    make_adapters(tmp_path / "adapters", "lora", source, ("projector",))
    target = fuse(source, tmp_path / "adapters", tmp_path / "fused", dequantize=False)
    before, after = (mx.load(str(path / "model.safetensors")) for path in (source, target))
    changed = {name.rpartition(".")[0] for name in before if (before[name] != after[name]).any()}
    assert changed == {f"multi_modal_projector.linear_{i}" for i in (1, 2)}


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_fusing_is_computed_in_float32(dtype, tmp_path):
    """Rounded once, at the end, to the type that was asked for."""
    base = convert(SOURCE, tmp_path / "bf16", dtype="bfloat16")
    source = convert(base, tmp_path / "8", Quantization(bits=8, group_size=32))
    make_adapters(tmp_path / "adapters", "lora", source, ("language",))
    fused = fuse(source, tmp_path / "adapters", tmp_path / "fused", dtype=dtype)
    written = mx.load(str(fused / "model.safetensors"))
    modules = dict(load(source)[0].named_modules())
    adapters = read_adapters(tmp_path / "adapters")
    packed = mx.load(str(source / "model.safetensors"))
    for name, update in adapters.updates.items():
        parts = {kind: packed[f"{name}.{kind}"].astype(mx.float32) for kind in ("scales", "biases")}
        weight = mx.dequantize(packed[f"{name}.weight"], **parts, group_size=32, bits=8)
        exact = weight + 2.0 * (update.lora_a @ update.lora_b).T
        assert modules[name].bits == 8
        assert mx.array_equal(
            written[f"{name}.weight"], exact.astype(getattr(mx, dtype or "bfloat16"))
        )


def test_what_rounding_takes_is_measured_and_told(tmp_path, capsys):
    """Against a direct computation; more bits take less."""
    losses = {}
    make_adapters(tmp_path / "adapters", "lora", SOURCE, ("language",))
    for bits in (3, 8):
        source = converted(tmp_path / f"{bits}", bits=bits)
        arguments = ["--model", source, "--adapter-path", tmp_path / "adapters", "--quantized"]
        arguments += ["--save-path", tmp_path / f"fused{bits}"]
        with pytest.raises(SystemExit) as info:
            fuse_main(list(map(str, arguments)))
        assert info.value.code == 0
        told = capsys.readouterr().out
        percent = int(re.search(r"is an error of (\d+) % of what the adapters change", told)[1])
        assert f"an error of {percent} %" in (tmp_path / f"fused{bits}" / "README.md").read_text()
        base, fused = (
            dict(load(f)[0].named_modules()) for f in (source, tmp_path / f"fused{bits}")
        )
        lost = changed = 0.0
        for name, update in read_adapters(tmp_path / "adapters").updates.items():
            delta = 2.0 * (update.lora_a @ update.lora_b).T
            wrong = float_weight(fused[name]) - float_weight(base[name]) - delta
            lost += mx.square(wrong).sum().item()
            changed += mx.square(delta).sum().item()
        assert percent == pytest.approx(100 * (lost / changed) ** 0.5, abs=0.6)
        losses[bits] = percent
    assert losses[3] > 5 * losses[8]


def test_fuse_from_the_command_line(tmp_path, capsys):
    make_adapters(tmp_path / "adapters")
    arguments = ["--model", str(SOURCE), "--adapter-path", str(tmp_path / "adapters")]
    arguments += ["--save-path", str(tmp_path / "fused"), "--dtype", "bfloat16"]

    def call(*more):
        with pytest.raises(SystemExit) as info:
            fuse_main([*arguments, *more])
        return info.value.code, capsys.readouterr()

    code, said = call()
    assert (code, said.out) == (0, f"wrote {tmp_path / 'fused'}\n")
    tensors = mx.load(str(tmp_path / "fused" / "model.safetensors"))
    assert {tensor.dtype for tensor in tensors.values()} == {mx.bfloat16}
    code, said = call()
    assert (code, said.err.count("\n")) == (2, 1)
    assert "is there already" in said.err
    assert call("--force", "--dequantize")[1].err.endswith("there is nothing to dequantize\n")
    assert call("--force")[0] == 0
    assert call("--dequantize", "--quantized")[0] == 2


def test_the_base_is_the_one_that_adapters_name(tmp_path, capsys):
    folder = tmp_path / "adapters"
    make_adapters(folder, train=("projector",))
    assert adapter_base_model(folder) == str(SOURCE)
    expected = logits_of(load(SOURCE, dtype="float32", adapter_path=folder)[0])
    assert error(logits_of(load(None, dtype="float32", adapter_path=folder)[0]), expected) == 0
    with pytest.raises(SystemExit) as info:
        fuse_main(["--adapter-path", str(folder), "--save-path", str(tmp_path / "fused")])
    assert info.value.code == 0
    assert error(logits_of(load(tmp_path / "fused", dtype="float32")[0]), expected) < 1e-5
    capsys.readouterr()

    def names(model):
        config = json.loads((folder / ADAPTER_CONFIG).read_text())
        (folder / ADAPTER_CONFIG).write_text(json.dumps({**config, "model": model}))

    cache = "/there/hub/models--LiquidAI--LFM2.5-VL-450M/snapshots/abc"
    for named, meant in (
        ("demo", "demo"),
        ("LiquidAI/LFM2-VL-3B", "LiquidAI/LFM2-VL-3B"),
        (cache, "LiquidAI/LFM2.5-VL-450M"),
        (None, None),
    ):
        names(named)
        assert adapter_base_model(folder) == meant
    for named, message in (
        (str(tmp_path / "gone"), "names the model .*gone, which is not there; give the model"),
        (["x"], r"model is \['x'\]; it must be a text"),
        ("a\0b", "which is not there"),
        (None, "names no model; give the model"),
    ):
        names(named)
        for use in (
            lambda: load(None, adapter_path=folder),
            lambda: fuse(None, folder, tmp_path / "other"),
        ):
            with pytest.raises(TrainError, match=message):
                use()
    with pytest.raises(TrainError, match=f"has no {ADAPTER_CONFIG}"):
        adapter_base_model(tmp_path / "none")
    with pytest.raises(TrainError, match="give the model"):
        load(None)
    assert not (tmp_path / "other").exists()


# what does not fit


def spoil(folder, name=ADAPTER_WEIGHTS, **changes):
    """Replaces tensors of a folder of adapters; None removes one."""
    tensors = {**mx.load(str(folder / ADAPTER_WEIGHTS)), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    mx.eval(kept)
    mx.save_safetensors(str(folder / ADAPTER_WEIGHTS), kept)


MAP = "language_model.model.layers.0.conv.in_proj"
SPOILED = {
    "no folder": (lambda folder: shutil.rmtree(folder), f"has no {ADAPTER_CONFIG}"),
    "no config": (lambda folder: (folder / ADAPTER_CONFIG).unlink(), f"has no {ADAPTER_CONFIG}"),
    "no weights": (lambda folder: (folder / ADAPTER_WEIGHTS).unlink(), f"no {ADAPTER_WEIGHTS}"),
    "an odd scale": (
        lambda folder: (folder / ADAPTER_CONFIG).write_text(
            f'{{"lora_parameters": {{"scale": {10**400}}}}}'
        ),
        "a scale, a number; it is 1000",
    ),
    "odd parameters": (
        lambda folder: (folder / ADAPTER_CONFIG).write_text('{"lora_parameters": [1]}'),
        "has no lora_parameters with a scale",
    ),
    "no scale": (
        lambda folder: (folder / ADAPTER_CONFIG).write_text('{"lora_parameters": {"rank": 8}}'),
        "has no lora_parameters with a scale",
    ),
    "unknown kind": (
        lambda folder: (folder / ADAPTER_CONFIG).write_text('{"fine_tune_type": "ia3"}'),
        "fine_tune_type 'ia3' is unknown",
    ),
    "half a pair": (
        lambda folder: spoil(folder, **{f"{MAP}.lora_b": None}),
        f"{MAP} lacks lora_a or lora_b",
    ),
    "other inputs": (
        lambda folder: spoil(folder, **{f"{MAP}.lora_a": mx.zeros((32, 4))}),
        rf"{MAP}\.lora_a has shape \(32, 4\); a map of 64 inputs and 192 outputs needs \(64, 4\)",
    ),
    "other outputs": (
        lambda folder: spoil(folder, **{f"{MAP}.lora_b": mx.zeros((4, 64))}),
        rf"{MAP}\.lora_b has shape \(4, 64\); .* needs \(4, 192\)",
    ),
    "two ranks": (
        lambda folder: spoil(folder, **{f"{MAP}.lora_b": mx.zeros((8, 192))}),
        r"lora_b has shape \(8, 192\); .* needs \(4, 192\)",
    ),
    "other magnitudes": (
        lambda folder: spoil(folder, **{f"{MAP}.m": mx.zeros(64)}),
        r"m has shape \(64,\); .* needs \(192,\)",
    ),
    "unknown module": (
        lambda folder: spoil(
            folder,
            **{"model.none.lora_a": mx.zeros((64, 4)), "model.none.lora_b": mx.zeros((4, 9))},
        ),
        r"model\.none is no linear map of this model",
    ),
    "no linear map": (
        lambda folder: spoil(
            folder,
            **{
                "language_model.model.embed_tokens.lora_a": mx.zeros((448, 4)),
                "language_model.model.embed_tokens.lora_b": mx.zeros((4, 64)),
            },
        ),
        "embed_tokens is no linear map of this model",
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_adapters_that_do_not_fit(name, tmp_path):
    folder = tmp_path / "adapters"
    make_adapters(folder, train=("language",))
    change, message = SPOILED[name]
    change(folder)
    for use in (
        lambda: load(SOURCE, adapter_path=folder),
        lambda: fuse(SOURCE, folder, tmp_path / "fused"),
    ):
        with pytest.raises(TrainError, match=message) as info:
            use()
        assert "\n" not in str(info.value)
    assert not (tmp_path / "fused").exists()


def test_damaged_adapters(tmp_path):
    folder = tmp_path / "adapters"
    make_adapters(folder, train=("projector",))
    (folder / ADAPTER_WEIGHTS).write_bytes((folder / ADAPTER_WEIGHTS).read_bytes()[:-9])
    with pytest.raises(WeightsError, match="damaged or cut short"):
        load(SOURCE, adapter_path=folder)


def test_the_command_line_says_what_is_wrong_in_one_line(tmp_path):
    arguments = ["--model", SOURCE, "--adapter-path", tmp_path / "none", "--prompt", "What?"]
    run = subprocess.run(
        [sys.executable, "-m", "mlx_lfm2vl.generate", *map(str, arguments)],
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1)
    assert f"has no {ADAPTER_CONFIG}; adapters are folders with" in run.stderr


def test_what_is_written_down(tmp_path):
    make_adapters(tmp_path / "adapters", "dora", num_layers=1, dropout=0.1)
    config = json.loads((tmp_path / "adapters" / ADAPTER_CONFIG).read_text())
    assert config["fine_tune_type"] == "dora"
    assert config["num_layers"] == 1
    assert config["train"] == list(EVERYTHING)
    assert config["model"] == str(SOURCE)
    parameters = config["lora_parameters"]
    assert {key: parameters[key] for key in ("rank", "scale", "dropout")} == {
        "rank": 4,
        "scale": 2.0,
        "dropout": 0.1,
    }
    adapters = read_adapters(tmp_path / "adapters")
    # whole paths: mlx-vlm wraps these modules and no others, mlx-lm finds them in its own model
    assert parameters["keys"] == sorted(adapters.updates)
    model, _ = load(SOURCE)
    assert set(adapters.updates) == {name for name, _ in trainable_linears(model, EVERYTHING, 1)}
    assert adapters.scale == 2.0
