"""The converter: what is written is what was asked for, and nothing is ever half there."""

import json
import os
import signal
import subprocess
import sys
import time

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_lfm2vl
from mlx_lfm2vl import ConfigError, ConvertError, Quantization, convert, generate
from mlx_lfm2vl.checkpoints.names import hf_name, mlx_name
from mlx_lfm2vl.checkpoints.weights import read_weights
from mlx_lfm2vl.cli.convert import main
from mlx_lfm2vl.conversion.plan import make_plan, write_plan
from mlx_lfm2vl.conversion.recipes import RECIPES
from mlx_lfm2vl.models.config import load_config

from .conftest import FIXTURES
from .test_inventory import CHECKPOINTS, NAMES, inventory, shape

LAYOUTS = ["first", "v5", "mlx", "noprefix", "head72", "untied", "text396"]
# the small checkpoints are 32, 40 and 48 wide
SMALL = {"group_size": 32, "projector": False}


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def tensors(folder) -> dict[str, mx.array]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(mx.load(str(path)))
    return found


def config_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


def greedy(folder) -> str:
    return generate(*mlx_lfm2vl.load(folder), "Count!", temperature=0, max_tokens=12)


def bits(array: mx.array) -> bytes:
    """The bytes of an array, for equality bit by bit."""
    return bytes(memoryview(mx.contiguous(array).view(mx.uint8)))


@pytest.mark.parametrize("name", LAYOUTS)
def test_plain_conversion_keeps_every_value(name, out):
    convert(FIXTURES / name, out)
    written, source = tensors(out), read_weights(FIXTURES / name)
    assert set(written) == set(source) - {k for k in source if "projector.layer_norm" in k} | {
        k for k in written if "projector.layer_norm" in k
    }
    assert all(bits(written[key]) == bits(source[key]) for key in written)
    assert greedy(out) == greedy(FIXTURES / name)
    assert "quantization" not in config_of(out)


@pytest.mark.parametrize("name", ["first", "v5", "mlx", "head72", "untied", "text396"])
@pytest.mark.parametrize("width", [4, 8])
def test_integers_are_those_of_mx_quantize(name, width, out):
    convert(FIXTURES / name, out, Quantization(bits=width, **SMALL))
    written, source = tensors(out), read_weights(FIXTURES / name)
    quantized = [key.removesuffix(".scales") for key in written if key.endswith(".scales")]
    assert "language_model.model.embed_tokens" in quantized
    assert len(quantized) > 15
    assert all(key.startswith("language_model.") for key in quantized)
    for path in quantized:
        parts = mx.quantize(source[f"{path}.weight"], group_size=32, bits=width)
        for part, kind in zip(parts, ("weight", "scales", "biases"), strict=True):
            assert bits(written[f"{path}.{kind}"]) == bits(part)
    entry = {"group_size": 32, "bits": width, "mode": "affine"}
    assert config_of(out)["quantization"] == config_of(out)["quantization_config"] == entry
    model, _ = mlx_lfm2vl.load(out)
    assert type(model.language_model.model.embed_tokens).__name__ == "QuantizedEmbedding"


@pytest.mark.parametrize(("mode", "size"), [("mxfp4", 32), ("mxfp8", 32), ("nvfp4", 16)])
def test_small_floating_point_modes(mode, size, out):
    convert(FIXTURES / "v5", out, Quantization(mode=mode, projector=False))
    assert config_of(out)["quantization"]["group_size"] == size
    assert greedy(out)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_by_name(recipe, out):
    convert(FIXTURES / "v5", out, Quantization(recipe=recipe, **SMALL))
    low, high, _ = RECIPES[recipe]
    model, _ = mlx_lfm2vl.load(out)
    layers = model.language_model.model.layers
    assert model.language_model.model.embed_tokens.bits == high
    assert {layers[n].feed_forward.w2.bits for n in range(4)} <= {low, high}
    assert layers[-1].feed_forward.w2.bits == high
    assert layers[1].feed_forward.w1.bits == low
    everything = {m.bits for _, m in model.named_modules() if "scales" in m}
    assert everything == {low, high}
    entry = config_of(out)["quantization"]
    assert any(isinstance(value, dict) for value in entry.values())


def test_a_recipe_of_patterns(out, tmp_path):
    patterns = tmp_path / "mine.json"
    patterns.write_text(
        json.dumps({"*.layers.0.*": False, "*v_proj": 8, "language_model.model.embed*": 6})
    )
    convert(FIXTURES / "v5", out, Quantization(recipe=str(patterns), **SMALL))
    model, _ = mlx_lfm2vl.load(out)
    layers = model.language_model.model.layers
    assert type(layers[0].feed_forward.w1).__name__ == "Linear"
    assert layers[1].self_attn.v_proj.bits == 8
    assert layers[1].self_attn.q_proj.bits == 4
    assert model.language_model.model.embed_tokens.bits == 6


def test_parts_have_bits_of_their_own(out):
    settings = Quantization(
        bits=4, group_size=32, vision_bits=8, embeddings_bits=6, projector=False
    )
    source = FIXTURES / "first"
    # 48 wide, so its vision tower does not divide by 32
    with pytest.raises(ConvertError, match=r"vision_tower\..* has 48 inputs, .* group size 32"):
        convert(source, out, settings)
    assert not out.exists()
    convert(source, out, Quantization(group_size=32, embeddings_bits=8, projector=False))
    assert mlx_lfm2vl.load(out)[0].language_model.model.embed_tokens.bits == 8


@pytest.mark.parametrize("name", LAYOUTS)
def test_there_and_back_is_the_identity(name, out, tmp_path):
    convert(FIXTURES / name, out)
    convert(out, tmp_path / "back", to_hf=True)
    written, source = tensors(tmp_path / "back"), tensors(FIXTURES / name)
    if name == "mlx":
        source = tensors(FIXTURES / "v5")
        written = {k.replace(".vision_model.", "."): v for k, v in written.items()}
    if name == "noprefix":
        source = {f"model.{key}": value for key, value in source.items()}
        written = {k.replace(".vision_model.", "."): v for k, v in written.items()}
    assert written.keys() == source.keys()
    assert all(bits(written[key]) == bits(source[key]) for key in source)
    assert greedy(tmp_path / "back") == greedy(FIXTURES / name)


@pytest.mark.skipif(not CHECKPOINTS.exists(), reason="needs ../shared/checkpoints")
@pytest.mark.parametrize("name", NAMES)
def test_names_of_the_published_files_return(name):
    for row in inventory(name):
        assert hf_name(mlx_name(row[0]), "model.vision_tower.vision_model.") == row[0]
        if row[0].endswith("conv.conv.weight"):
            a, b, c = shape(row[2])
            assert shape(row[4]) == (a, c, b)


def test_dequantize(out, tmp_path):
    convert(FIXTURES / "v5", out, Quantization(bits=8, **SMALL))
    convert(out, tmp_path / "plain", dequantize=True)
    assert "quantization" not in config_of(tmp_path / "plain")
    written, integers = tensors(tmp_path / "plain"), tensors(out)
    assert not any(key.endswith(".scales") for key in written)
    path = "language_model.model.layers.1.self_attn.q_proj"
    parts = [integers[f"{path}.{kind}"] for kind in ("weight", "scales", "biases")]
    assert mx.array_equal(written[f"{path}.weight"], mx.dequantize(*parts, 32, 8))
    convert(out, tmp_path / "hf", dequantize=True, to_hf=True)
    assert "model.language_model.embed_tokens.weight" in tensors(tmp_path / "hf")
    convert(out, tmp_path / "again", Quantization(bits=4, **SMALL), dequantize=True)
    assert config_of(tmp_path / "again")["quantization"]["bits"] == 4


@pytest.mark.parametrize("name", LAYOUTS)
def test_config_for_transformers(name, out):
    convert(FIXTURES / name, out, to_hf=True)
    written = config_of(out)
    assert written["model_type"] == "lfm2_vl"
    assert written["vision_config"]["model_type"] == "siglip2_vision_model"
    assert written["vision_config"]["num_hidden_layers"] == 2
    assert isinstance(written["projector_use_layernorm"], bool)
    assert not {"auto_map", "image_token_index", "vision_feature_layer"} & written.keys()
    # and it says the same as before
    ours, source = (load_config(folder) for folder in (out, FIXTURES / name))
    assert ours == source


def test_type(out):
    convert(FIXTURES / "v5", out, dtype="bfloat16")
    assert {array.dtype for array in tensors(out).values()} == {mx.bfloat16}
    assert config_of(out)["dtype"] == "bfloat16"


def test_shards(out, monkeypatch):

    monkeypatch.setattr(sys.modules["mlx_lfm2vl.conversion.plan"], "MAX_SHARD_BYTES", 100_000)
    convert(FIXTURES / "v5", out)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 3
    assert set(index["weight_map"].values()) == {path.name for path in shards}
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in tensors(out).values())
    assert greedy(out) == greedy(FIXTURES / "v5")


def test_folder_holds_what_others_expect(out):
    convert(FIXTURES / "first", out, Quantization(**SMALL))
    names = {path.name for path in out.iterdir()}
    assert names >= {
        *("config.json", "generation_config.json", "model.safetensors", "README.md"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        *("processor_config.json", "preprocessor_config.json"),
    }
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["temperature"] == 0.1
    assert generation["min_p"] == 0.15
    card = (out / "README.md").read_text()
    assert "4 bits" in card
    assert "bits per weight" in card
    assert str(FIXTURES / "first") in card
    assert "base_model" not in card
    plan = make_plan(FIXTURES / "first", None, origin="LiquidAI/LFM2-VL-450M")
    weights = tree_flatten(mlx_lfm2vl.load(FIXTURES / "first")[0].parameters())
    assert plan.parameters == sum(array.size for _, array in weights)
    write_plan(plan, out.parent / "named")
    assert "base_model: LiquidAI/LFM2-VL-450M" in (out.parent / "named/README.md").read_text()
    _, processor = mlx_lfm2vl.load(out)
    assert processor.generation_config.sampling_source == "generation_config.json"


def test_the_plan_knows_the_size(out):
    for settings in (None, Quantization(**SMALL), Quantization(mode="mxfp4", projector=False)):
        plan = make_plan(FIXTURES / "v5", settings)
        expected = plan.nbytes
        convert(FIXTURES / "v5", out, settings, force=True)
        assert expected == sum(array.nbytes for array in tensors(out).values())


@pytest.fixture
def fails(capsys, out):
    def run(*arguments) -> str:
        with pytest.raises(SystemExit) as exit_info:
            main(["--mlx-path", str(out), *map(str, arguments)])
        captured = capsys.readouterr()
        assert exit_info.value.code == 2
        lines = captured.err.strip().splitlines()
        assert "error: " in lines[-1]
        assert not out.exists()
        return lines[-1]

    return run


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["-q", "--q-bits", "7"], "q-bits is 7"),
        (["-q", "--q-bits", "8", "--q-mode", "mxfp4"], "q-bits is 8; with mxfp4"),
        (["-q", "--q-mode", "int4"], "q-mode is int4"),
        (["-q", "--q-group-size", "48"], "q-group-size is 48"),
        (["-q"], "do not divide by the group size 64"),
        (["-q", "--quant-predicate", "mixed_9_9"], "mixed_9_9 is no recipe"),
        (["-q", "--quant-predicate", "lfm2_4bit", "--q-mode", "mxfp4"], "needs q-mode affine"),
        (["--q-bits", "4"], "need -q"),
        (["-d"], "not quantized"),
        (["--to-hf", "-q", "--q-group-size", "32", "--no-q-projector"], "exclude each other"),
        (["--dtype", "int8"], "dtype is 'int8'"),
    ],
)
def test_bad_arguments(arguments, named, fails):
    assert named in fails("--hf-path", FIXTURES / "v5", *arguments)


def test_bad_sources(fails, tmp_path, copied):
    assert "does not exist" in fails("--hf-path", tmp_path / "nowhere")
    folder = copied()
    (folder / "model.safetensors").unlink()
    assert "has no weights" in fails("--hf-path", folder)
    convert(FIXTURES / "v5", tmp_path / "q", Quantization(**SMALL))
    arguments = ("-q", "--q-group-size", "32", "--no-q-projector")
    assert "quantized already" in fails("--hf-path", tmp_path / "q", *arguments)
    assert "cannot read; add -d" in fails("--hf-path", tmp_path / "q", "--to-hf")
    patterns = tmp_path / "p.json"
    patterns.write_text('{"*.no_such_module": 4}')
    line = fails("--hf-path", FIXTURES / "v5", *arguments, "--quant-predicate", patterns)
    assert "'*.no_such_module' matches no module" in line
    patterns.write_text('{"*": 7}')
    line = fails("--hf-path", FIXTURES / "v5", *arguments, "--quant-predicate", patterns)
    assert "asks for 7" in line
    with pytest.raises(ConfigError):
        Quantization(bits=1)


def test_an_output_that_is_there(out):
    out.mkdir()
    (out / "precious").write_text("x")
    with pytest.raises(ConvertError, match="is there already"):
        convert(FIXTURES / "v5", out)
    assert (out / "precious").read_text() == "x"
    convert(FIXTURES / "v5", out, force=True)
    assert greedy(out)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_dry_run_tells_everything_and_writes_nothing(out, capsys):
    arguments = ["--hf-path", str(FIXTURES / "v5"), "--mlx-path", str(out), "--dry-run", "-q"]
    with pytest.raises(SystemExit) as exit_info:
        main([*arguments, "--q-group-size", "32", "--no-q-projector"])
    assert exit_info.value.code == 0
    told = capsys.readouterr().out
    assert "language_model.model.layers.1.self_attn.q_proj: 4 bits, groups of 32, affine" in told
    assert " MB" in told
    assert not out.exists()


def test_the_source_is_never_modified(out, copied):
    folder = copied("first")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    convert(folder, out, Quantization(**SMALL))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_killed_at_any_moment(tmp_path):
    """No output folder or a complete one, every time."""
    command = [sys.executable, "-m", "mlx_lfm2vl.convert", "--hf-path", str(FIXTURES / "v5")]
    pick = np.random.default_rng(3)
    whole = 0
    for n in range(20):
        out = tmp_path / f"out{n}"
        process = subprocess.Popen(
            [*command, "--mlx-path", str(out)], stdout=subprocess.DEVNULL, start_new_session=True
        )
        time.sleep(pick.uniform(0.05, 0.45))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if out.exists():
            whole += 1
            assert greedy(out)
    convert(FIXTURES / "v5", tmp_path / "last")
    assert whole < 20, "it was never killed in time"


def test_interrupted_leaves_nothing_behind(out, monkeypatch):
    def interrupt(done, count):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(FIXTURES / "v5", out, progress=interrupt)
    assert list(out.parent.iterdir()) == []


def test_a_full_disk(out, monkeypatch):
    import shutil

    usage = shutil.disk_usage(out.parent)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(ConvertError, match=r"needs .* MB, but only 0\.0 MB are free"):
            convert(FIXTURES / "v5", out)
    assert list(out.parent.iterdir()) == []


def test_a_disk_that_fills_up_on_the_way(out):
    """The system refuses to make the file longer, as on a full disk."""
    code = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from mlx_lfm2vl.cli.convert import main
main(["--hf-path", {str(FIXTURES / "v5")!r}, "--mlx-path", {str(out)!r}])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 2
    assert "could not be written to" in run.stderr
    assert "Traceback" not in run.stderr
    assert list(out.parent.iterdir()) == []


def test_report_of_equal_models_is_exactly_zero():
    from mlx_lfm2vl.conversion.report import report

    (result,) = report(FIXTURES / "v5", [FIXTURES / "mlx"])
    assert result.top1_agreement == 1
    assert result.mean_kl == result.p99_kl == 0
    assert result.image_cosine == pytest.approx(1, abs=1e-6)
    assert set(result.first_difference) == {None}
    assert result.bits_per_weight["language model"] == 32


def test_report_numbers_are_those_of_a_direct_computation(out, tmp_path, capsys):
    from mlx_lfm2vl.conversion.report import TEXTS, cosine, first_difference, kl_divergence, report

    eight = tmp_path / "eight"
    convert(FIXTURES / "v5", out, Quantization(bits=4, **SMALL))
    convert(FIXTURES / "v5", eight, Quantization(bits=8, **SMALL))
    worse, better = report(FIXTURES / "v5", [out, eight])
    assert worse.mean_kl > better.mean_kl > 0
    assert worse.top1_agreement < better.top1_agreement < 1
    assert worse.file_bytes == (out / "model.safetensors").stat().st_size
    right, processor = mlx_lfm2vl.load(FIXTURES / "v5", dtype="float32")
    other, _ = mlx_lfm2vl.load(out, dtype="float32")
    ids = mx.array([processor.tokenizer.encode(TEXTS[0], add_special_tokens=True)])
    p, q = (np.asarray(model(ids).logits[0], np.float64) for model in (right, other))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    direct = (np.exp(p) * (p - q)).sum(-1)
    ours = kl_divergence(mx.array(p.astype(np.float32)), mx.array(q.astype(np.float32)))
    assert np.allclose(np.asarray(ours), direct, atol=1e-5)
    assert cosine(mx.array([[3.0, 4.0]]), mx.array([[4.0, 3.0]])).item() == pytest.approx(0.96)
    assert first_difference([1, 2, 3], [1, 2, 4]) == 2
    assert first_difference([1], [1]) is None
    stored = sum(a.nbytes for k, a in tensors(out).items() if k.startswith("language_model."))
    weights = sum(
        a.size for k, a in tree_flatten(right.parameters()) if k.startswith("language_model.")
    )
    assert worse.bits_per_weight["language model"] == pytest.approx(8 * stored / weights)


def test_report_as_a_plot(out, tmp_path, monkeypatch):
    from PIL import Image

    from mlx_lfm2vl.conversion.report import plot, report

    convert(FIXTURES / "v5", out, Quantization(bits=8, **SMALL))
    results = report(FIXTURES / "v5", [FIXTURES / "v5", out])
    plot(results, tmp_path / "fidelity.png")
    with Image.open(tmp_path / "fidelity.png") as image:
        assert image.width > 800
        assert len(image.getcolors(1 << 24)) > 50
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConvertError, match="the plot needs matplotlib"):
        plot(results, tmp_path / "other.png")


def test_report_command(out, capsys, tmp_path):
    convert(FIXTURES / "v5", out, Quantization(bits=8, **SMALL))
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "a.txt").write_text("The cat sits on the table.")
    arguments = ["report", str(FIXTURES / "v5"), str(out), "--samples", str(tmp_path / "samples")]
    for more in ([], ["--json"]):
        with pytest.raises(SystemExit) as exit_info:
            main([*arguments, *more])
        assert exit_info.value.code == 0
        told = capsys.readouterr().out
        if more:
            assert json.loads(told)[0]["mean_kl"] > 0
        else:
            assert "| out |" in told
    with pytest.raises(SystemExit):
        main(["report", str(FIXTURES / "v5"), str(FIXTURES / "text396")])
    assert "another vocabulary" in capsys.readouterr().err
