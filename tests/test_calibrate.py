"""Calibrated quantization: integers, budgets, sensitivities, distillation; by direct ways."""

import functools
import json
import random
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_lfm2vl import ConfigError, ConvertError, Quantization, convert, load
from mlx_lfm2vl.cli.convert import main
from mlx_lfm2vl.conversion import calibrate as module
from mlx_lfm2vl.conversion.budget import Choice, assign, group_of
from mlx_lfm2vl.conversion.calibrate import log_softmax, module_at, rounded
from mlx_lfm2vl.conversion.calibrated import (
    Calibration,
    Calibrator,
    convert_calibrated,
    in_portions,
    possible_ways,
)
from mlx_lfm2vl.conversion.plan import make_plan
from mlx_lfm2vl.conversion.rounding import CLIPS, gptq, pack, plainly, unpack
from mlx_lfm2vl.conversion.scaling import apply_fold, folds
from mlx_lfm2vl.models.config import load_config
from mlx_lfm2vl.models.lfm2_vl import Lfm2VlForConditionalGeneration

from .helpers import WIDE, save_picture, tensors

BITS = (2, 3, 4, 5, 6, 8)
SETTINGS = Quantization(group_size=32)


def quiet(stage, done, total):
    pass


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Pictures, and a conversation with an answer."""
    folder = tmp_path_factory.mktemp("photos")
    for seed in range(2):
        save_picture(folder / f"{seed}.png", 60 + 10 * seed, 50, seed)
    (folder / "note.txt").write_text("The cat sits on the table.")
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A cup."},
    ]
    line = json.dumps({"messages": messages, "images": ["0.png"]})
    (folder / "talks.jsonl").write_text(line + "\n")
    return folder


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(module, "ANSWER_TOKENS", 6)


# integers


@pytest.mark.parametrize("bits", BITS)
def test_integers_are_packed_as_mlx_does_it(bits):
    weight = mx.random.normal((5, 128), key=mx.random.key(bits)).astype(mx.bfloat16)
    packed, scales, biases = mx.quantize(weight, 32, bits)
    assert mx.array_equal(pack(unpack(packed, bits), bits), packed)
    plain = plainly(weight, bits, 32)
    groups = plain.codes.reshape(5, 4, 32) * scales[..., None].astype(mx.float32)
    values = (groups + biases[..., None].astype(mx.float32)).reshape(5, 128)
    exact = mx.dequantize(packed, *(a.astype(mx.float32) for a in (scales, biases)), 32, bits)
    assert mx.allclose(values, exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_gptq_without_correlations_is_plain_rounding(bits):
    weight = mx.random.normal((16, 128), key=mx.random.key(bits))
    ours, plain = gptq(weight, 3 * mx.eye(128), bits, 32), plainly(weight, bits, 32)
    for one, other in zip(ours, plain, strict=True):
        assert np.array_equal(np.array(one), np.array(other))


def test_gptq_lowers_the_error_of_the_outputs():
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(400, 12)) @ rng.normal(size=(12, 128))
    inputs += 0.1 * rng.normal(size=inputs.shape)
    weight = mx.array(rng.normal(size=(32, 128)).astype(np.float32))

    def error(start):
        parts = start.parts()
        values = mx.dequantize(parts["weight"], parts["scales"], parts["biases"], 32, start.bits)
        return np.square(inputs @ np.array(values - weight).T).mean()

    moment = mx.array(inputs.T @ inputs, mx.float32)
    better, plain = gptq(weight, moment, 3, 32), plainly(weight, 3, 32)
    assert error(better) < 0.5 * error(plain)


def test_clipping_lowers_the_error_of_the_values():
    weight = mx.random.normal((32, 128), key=mx.random.key(0))
    importance = np.linspace(0.5, 2, 128)

    def error(start):
        parts = start.parts()
        values = mx.dequantize(parts["weight"], parts["scales"], parts["biases"], 32, 2)
        return (np.square(np.array(values - weight)) * importance).sum()

    clipped = gptq(weight, mx.array(np.diag(importance), mx.float32), 2, 32, CLIPS)
    assert error(clipped) < 0.9 * error(plainly(weight, 2, 32))


# bits


@pytest.mark.parametrize("seed", range(3))
def test_the_assignment_is_that_of_brute_force(seed):
    rng = random.Random(seed)
    choices = []
    for _ in range(6):
        size, harm = 64 * rng.randint(1, 9), rng.uniform(0.1, 3)
        choices.append(
            [Choice(b, size * (2 * b + 1), harm * rng.uniform(0.5, 2) / 4**b) for b in BITS[1:]]
            + [Choice(None, 33 * size, 0.0)]
        )
    # of all 6⁶ combinations
    sizes = functools.reduce(np.add.outer, [[c.nbytes for c in o] for o in choices])
    losses = functools.reduce(np.add.outer, [[c.loss for c in o] for o in choices])
    least, most = int(sizes.min()), int(sizes.max())
    for share in (0, 0.1, 0.37, 0.8, 1, 2):
        budget = least + int(share * (most - least))
        fitting = losses[sizes <= budget]
        found = assign(choices, budget)
        assert sum(c.nbytes for c in found) <= budget
        assert sum(c.loss for c in found) == pytest.approx(fitting.min(), abs=1e-12)


def test_what_is_computed_as_one_product_shares_its_bits():
    layer = "language_model.model.layers.3."
    together = [f"{layer}self_attn.{name}_proj" for name in "qkv"]
    assert len({group_of(path) for path in together}) == 1
    assert group_of(f"{layer}feed_forward.w1") == group_of(f"{layer}feed_forward.w3")
    apart = (f"{layer}feed_forward.w2", "vision_tower.encoder.layers.0.self_attn.q_proj")
    assert [group_of(path) for path in apart] == [*apart]


@pytest.fixture(scope="module")
def calibrator(photos, tmp_path_factory):
    made = Calibrator(WIDE, Calibration(photos, folder=tmp_path_factory.mktemp("kept")), quiet)
    made.read()
    return made


def test_sensitivities_are_those_of_rounding_one_group_alone(calibrator):
    """An estimate from one backward pass, against the divergence itself."""
    model = calibrator.model
    ways = possible_ways(model, SETTINGS)
    estimates = module.sensitivities(model, calibrator.batches, ways, quiet)
    right = [log_softmax(model.language_model.logits(h)) for h in calibrator.hidden]
    pairs = []
    for group in list(estimates)[::2]:
        paths = [path for path in ways if group_of(path) == group]
        weights = {path: module_at(model, path).weight for path in paths}
        for bits in (4,):
            for path in paths:
                module_at(model, path).weight = rounded(weights[path], ways[path][bits])
            exact = sum(
                module.divergence(model, batch, p).item()
                for batch, p in zip(calibrator.batches, right, strict=True)
            )
            pairs.append((estimates[group][bits], exact))
        for path in paths:
            module_at(model, path).weight = weights[path]
    estimated, exact = np.log(np.array(pairs)).T
    assert len(pairs) > 10
    assert np.corrcoef(estimated, exact)[0, 1] > 0.9
    assert abs(estimated - exact).mean() < np.log(2)
    shares = [batch.weight * len(batch.positions) for batch in calibrator.batches]
    assert sum(shares) == pytest.approx(1)


def wide_model(text, vision=None):
    """The checkpoint's model with other sizes, never computed."""
    config = load_config(WIDE)
    text_config = replace(config.text_config, **text)
    vision_config = replace(config.vision_config, **(vision or {}))
    return Lfm2VlForConditionalGeneration(
        replace(config, text_config=text_config, vision_config=vision_config)
    )


def test_gradients_are_let_go_one_by_one(monkeypatch):
    """Memory beside the weights, with activations that hardly count."""
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 64)
    model = wide_model({"hidden_size": 256, "feed_forward_size": 1024})
    weights = [array for _, array in tree_flatten(model.parameters())]
    mx.eval(weights)
    batch = module.Batch(np.arange(6)[None], mx.arange(5), 0.2, None, ())
    ways = possible_ways(model, SETTINGS)
    ways = {p: way for p, way in ways.items() if p.startswith("language_model")}
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    module.sensitivities(model, [batch], ways, quiet)
    gradients = sum(module_at(model, path).weight.nbytes for path in ways)
    assert mx.get_peak_memory() - before < gradients / 3


def test_the_moments_of_a_450m_are_held_in_portions():
    """All at once they would take 2 GB; each portion is one more reading of the set."""
    kinds = tuple("full_attention" if n in (2, 5, 8, 10, 12, 14) else "conv" for n in range(16))
    model = wide_model(
        {"hidden_size": 1024, "feed_forward_size": 4608, "vocab_size": 65536,
         "num_attention_heads": 16, "num_key_value_heads": 8, "num_hidden_layers": 16,
         "layer_types": kinds},
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12},
    )  # fmt: skip
    paths = possible_ways(model, Quantization())
    portions = in_portions(model, paths)
    assert sorted(path for portion in portions for path in portion) == sorted(paths)
    stages = [{path.split(".")[0] for path in portion} for portion in portions]
    assert {len(stage) for stage in stages} == {1}
    assert portions[-1][-1].endswith("embed_tokens")
    sizes = []
    for portion in portions:
        widths = {group_of(path): module_at(model, path).weight.shape[1] for path in portion}
        sizes.append(sum(4 * width**2 for width in widths.values()))
    assert max(sizes) <= 400e6
    assert len(portions) <= 9


def test_scales_of_channels_change_nothing_in_floats(calibrator):
    model, batch = load(WIDE, dtype="float32")[0], calibrator.batches[0]
    before = batch.logprobs(model)
    found = [*folds(model)]
    assert len(found) == 3 * len(model.language_model.layers) + 2 * len(
        model.vision_tower.encoder.layers
    )
    for number, fold in enumerate(found):
        width = module_at(model, fold.linears[0]).weight.shape[1]
        noise = mx.random.uniform(0.5, 2, (width,), key=mx.random.key(number))
        apply_fold(model, fold, noise)
    assert mx.abs(batch.logprobs(model) - before).max() < 1e-5
    module_at(model, found[0].source).weight *= 1.01
    assert mx.abs(batch.logprobs(model) - before).max() > 1e-5


# whole conversions


def calibration(photos, folder, **settings):
    return Calibration(photos, folder=folder / "kept", **{"epochs": 2, **settings})


def mean_kl(folder, calibrator):
    """From the source, on the calibration set."""
    model, _ = load(folder, dtype="float32")
    right = [log_softmax(calibrator.head(h)) for h in calibrator.hidden]
    pairs = zip(calibrator.batches, right, strict=True)
    return sum(module.divergence(model, batch, p).item() for batch, p in pairs)


@pytest.fixture(scope="module")
def fresh(photos, tmp_path_factory):
    """What is compared with: the source and its answers."""
    made = Calibrator(WIDE, Calibration(photos, folder=tmp_path_factory.mktemp("f")), quiet)
    made.read()
    return made


def test_a_target_is_met_and_distillation_helps(photos, tmp_path, fresh):
    settings = calibration(photos, tmp_path, target_bits=12.5, epochs=12, learning_rate=5e-3)
    convert_calibrated(WIDE, tmp_path / "calibrated", settings, SETTINGS)
    plan = make_plan(tmp_path / "calibrated", None)
    assert 12.4 < 8 * plan.nbytes / plan.parameters <= 12.5
    entry = json.loads((tmp_path / "calibrated" / "config.json").read_text())["quantization"]
    patterns = tmp_path / "plan.json"
    paths = possible_ways(load(WIDE)[0], SETTINGS)
    bits = {p: plan.before[p]["bits"] if p in plan.before else False for p in paths}
    assert len(set(bits.values())) > 2
    assert {p: e["bits"] for p, e in entry.items() if isinstance(e, dict)}.items() <= bits.items()
    patterns.write_text(json.dumps(bits))
    convert(WIDE, tmp_path / "plain", Quantization(group_size=32, recipe=str(patterns)))
    assert make_plan(tmp_path / "plain", None).before == plan.before
    assert make_plan(tmp_path / "plain", None).nbytes == plan.nbytes
    plain, calibrated = (mean_kl(tmp_path / name, fresh) for name in ("plain", "calibrated"))
    assert 0 < calibrated < 0.7 * plain


class Killed(Exception):
    pass


def test_killed_and_continued_gives_the_same_bits(photos, tmp_path, monkeypatch):
    settings = Quantization(bits=4, group_size=32)
    (tmp_path / "one").mkdir()
    methods = ("awq", "gptq", "clip", "distill")
    whole = calibration(photos, tmp_path / "one", methods=methods)
    convert_calibrated(WIDE, tmp_path / "whole", whole, settings)
    again = calibration(photos, tmp_path, methods=methods)
    done = []

    def kill(stage, step, total):
        done.append((stage, step))
        if stage == "distillation" and step > total // 2:
            raise Killed

    with pytest.raises(Killed):
        convert_calibrated(WIDE, tmp_path / "out", again, settings, tell=kill)
    assert not (tmp_path / "out").exists()
    done.clear()
    monkeypatch.setattr(module, "batch_generate", lambda *a, **k: [])  # answers are kept
    tell = lambda stage, step, total: done.append((stage, step, total))  # noqa: E731
    convert_calibrated(WIDE, tmp_path / "out", again, settings, tell=tell)
    steps = [(step, total) for stage, step, total in done if stage == "distillation"]
    assert steps[0] == (steps[0][1] // 2 + 1, steps[0][1])
    one, other = tensors(tmp_path / "whole"), tensors(tmp_path / "out")
    assert one.keys() == other.keys()
    assert all(mx.array_equal(one[name], other[name]) for name in one)


def run(*arguments):
    with pytest.raises(SystemExit) as info:
        main(["--hf-path", str(WIDE), *map(str, arguments)])
    return info.value.code


def test_command(photos, tmp_path, capsys):
    """A plan is shown, written and used again; what is not asked for is not done."""
    common = ("--q-group-size", "32", "--mlx-path", tmp_path / "out")
    saved = ("--dry-run", "--save-plan", tmp_path / "plan.json")
    assert run(*common, "--calibrate", photos, "--target-bits", "12", *saved) == 0
    told = capsys.readouterr()
    plan = json.loads((tmp_path / "plan.json").read_text())
    lines = {path: f"{path}: {bits} bits, groups of 32, affine" for path, bits in plan.items()}
    assert all(lines[path] in told.out for path, bits in plan.items() if bits)
    assert {"answers", "reading", "sensitivity"} <= {x.split(":")[0] for x in told.err.split("\n")}
    assert not (tmp_path / "out").exists()
    assert run(*common, "-q", "--quant-predicate", tmp_path / "plan.json") == 0
    made = make_plan(tmp_path / "out", None)
    assert run(*common, "--force", "--calibrate", photos, "--target-bits", "5") == 2
    assert "target-bits is 5.0; the least possible is 10.99" in capsys.readouterr().err
    assert {p: s["bits"] for p, s in made.before.items()} == {p: b for p, b in plan.items() if b}
    assert 11.9 < 8 * made.nbytes / made.parameters <= 12


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--target-bits", "4"], "--target-bits: these settings need --calibrate"),
        (["--calibrate", "x", "--target-bits", "4", "--q-bits", "4"], "leave --q-bits out"),
        (["--calibrate", "x", "--target-bits", "0.5"], "target-bits is 0.5; it must be above 1"),
        (
            ["--calibrate", "x", "--refine", "magic"],
            "magic is no method; it must be in awq, gptq, ",
        ),
        (["--calibrate", "x", "--refine", "none", "gptq"], "none is no method"),
        (["--calibrate", "x", "--epochs", "0"], "epochs is 0; it must be 1 or more"),
        (["--calibrate", "x", "-d"], "--calibrate quantizes, which -d and --to-hf exclude"),
        (["--calibrate", "x", "--q-mode", "mxfp4"], "calibration needs q-mode affine"),
        (["--calibrate", "nowhere"], "nowhere holds no image, no .txt file and no .jsonl file"),
    ],
)
def test_bad_flags(flags, message, tmp_path, capsys):
    assert run("--mlx-path", tmp_path / "out", *flags) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_sources_in_integers_are_refused(tmp_path):
    convert(WIDE, tmp_path / "four", SETTINGS)
    with pytest.raises(ConvertError, match="four is quantized; calibration starts from the origi"):
        Calibrator(tmp_path / "four", Calibration(folder=tmp_path / "kept"), quiet)
    with pytest.raises(ConfigError, match="target-bits"):
        Calibration(target_bits=-1)
