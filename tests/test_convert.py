"""The converter: what is written is what was asked for, and nothing is ever half there."""

import json
import shutil
import subprocess
import sys

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

import mlx_lfm2vl
from mlx_lfm2vl import ConfigError, ConvertError, Quantization, convert, generate
from mlx_lfm2vl.checkpoints.names import hf_name, mlx_name
from mlx_lfm2vl.checkpoints.weights import PACKED, read_weights
from mlx_lfm2vl.cli.convert import main
from mlx_lfm2vl.conversion.plan import make_plan, write_plan
from mlx_lfm2vl.conversion.recipes import RECIPES
from mlx_lfm2vl.models.config import load_config

from .helpers import FIXTURES, NAMES, PUBLISHED, SMALL, inventory, shape, tensors

LAYOUTS = ["first", "v5", "mlx", "noprefix", "head72", "untied", "text396"]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


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


@pytest.mark.parametrize(
    ("name", "width"), [("first", 4), ("v5", 8), ("mlx", 3), ("untied", 4), ("head72", 8)]
)
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
    convert(FIXTURES / "wide", out, settings)
    model, _ = mlx_lfm2vl.load(out)
    assert model.language_model.model.embed_tokens.bits == 6
    assert model.vision_tower.encoder.layers[0].mlp.fc1.bits == 8
    assert model.language_model.model.layers[0].feed_forward.w1.bits == 4
    assert "scales" not in model.multi_modal_projector.linear_1


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


@pytest.mark.skipif(not PUBLISHED.exists(), reason="needs ../shared/checkpoints")
def test_names_of_the_published_files_return():
    for row in (row for name in NAMES for row in inventory(name)):
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


def test_quantized_again(sources, out):
    """-d -q makes the integers that the dequantized weights have."""
    for source in ("8 bits", "mxfp4"):
        settings = Quantization(bits=4, group_size=32, vision_bits=8)
        convert(sources / source, out / source, settings, dequantize=True)
        convert(sources / source, out / "plain", dequantize=True, force=True)
        convert(out / "plain", out / "direct", settings, force=True)
        one, other = tensors(out / source), tensors(out / "direct")
        assert config_of(out / source)["quantization"] == config_of(out / "direct")["quantization"]
        assert one.keys() == other.keys()
        assert all(bits(one[key]) == bits(other[key]) for key in one)
        model, _ = mlx_lfm2vl.load(out / source)
        assert model.language_model.model.embed_tokens.bits == 4


def test_float32_is_computed_in_float32(sources, out):
    """The product of integers and their scales, not that product rounded to bfloat16."""
    convert(sources / "8 bits", out, dequantize=True, dtype="float32")
    packed, written = tensors(sources / "8 bits"), tensors(out)
    paths = [key.removesuffix(".scales") for key in packed if key.endswith(".scales")]
    assert len(paths) > 15
    for path in paths:
        weight, scales, biases = (packed[f"{path}.{kind}"] for kind in PACKED)
        exact = mx.dequantize(weight, scales.astype(mx.float32), biases.astype(mx.float32), 32, 8)
        assert mx.array_equal(written[f"{path}.weight"], exact)


@pytest.mark.parametrize("source", ["8 bits", "mxfp4"])
@pytest.mark.parametrize("told", ["bfloat16", "float32"])
def test_the_size_that_is_told_is_that_of_the_file(source, told, sources, out, tmp_path, capsys):
    """The type is that of the weights, even if config.json names another."""
    shutil.copytree(sources / source, tmp_path / "source")
    config = {**config_of(tmp_path / "source"), "dtype": told}
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit):
        main(["--hf-path", str(tmp_path / "source"), "--mlx-path", str(out), "-d"])
    written = tensors(out).values()
    assert {tensor.dtype for tensor in written} == {mx.bfloat16}
    size = f"{sum(t.nbytes for t in written) / 1e6:.1f} MB, 16.00 bits per weight"
    assert size in capsys.readouterr().out
    assert size in (out / "README.md").read_text()


VISION = "vision_tower.encoder.layers"


def test_vision_towers_that_do_not_divide(out, capsys):
    """What cannot be divided stays in floating point, and is named; the patches, too."""
    options = ["--hf-path", str(FIXTURES / "first"), "--mlx-path", str(out), "-q"]
    with pytest.raises(SystemExit) as exit_info:
        main([*options, "--q-vision", "8", "--q-group-size", "32"])
    assert exit_info.value.code == 0
    told = capsys.readouterr().out
    # 48 wide, 96 in the middle
    for name in ("self_attn.q_proj", "mlp.fc1"):
        assert f"{VISION}.*.{name}: 48 inputs do not divide by the group size 32" in told
    assert "patch_embedding: mlx-vlm takes its compute type from it" in told
    assert f"{VISION}.*.mlp.fc2" not in told
    model, _ = mlx_lfm2vl.load(out)
    layer = model.vision_tower.encoder.layers[0]
    assert ("scales" in layer.mlp.fc1, "scales" in layer.mlp.fc2) == (False, True)
    assert "scales" not in model.vision_tower.embeddings.patch_embedding
    assert greedy(out)


@pytest.mark.parametrize(
    ("patterns", "vision_bits", "fc2", "fc1"),
    [
        ({"vision_tower.*": 8}, None, 8, 8),
        ({"vision_tower.*fc2": False}, 6, None, 6),
        ({"*fc2": 3}, 8, 3, 8),
        ({"*.mlp.*": 5, "*": 4}, None, 5, 5),
    ],
)
def test_patterns_reach_the_vision_tower(patterns, vision_bits, fc2, fc1, out, tmp_path):
    (tmp_path / "p.json").write_text(json.dumps(patterns))
    recipe = str(tmp_path / "p.json")
    settings = Quantization(group_size=32, vision_bits=vision_bits, recipe=recipe)
    convert(FIXTURES / "wide", out, settings)
    mlp = mlx_lfm2vl.load(out)[0].vision_tower.encoder.layers[1].mlp
    assert (getattr(mlp.fc1, "bits", None), getattr(mlp.fc2, "bits", None)) == (fc1, fc2)


@pytest.mark.parametrize("name", ["first", "v5", "mlx"])
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
    _, processor = mlx_lfm2vl.load(out)
    assert processor.generation_config.sampling_source == "generation_config.json"


SOURCES = {"float32": None, "bfloat16": None, "8 bits": 8, "mxfp4": None}
WISHES = {
    "plain": {},
    "4 bits": {"quantization": Quantization(bits=4, group_size=32, embeddings_bits=8)},
    "a mode": {"quantization": Quantization(mode="mxfp4", vision_bits=4)},
    "half": {"dtype": "float16"},
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """`wide` in several types, quantized or not."""
    folder = tmp_path_factory.mktemp("sources")
    convert(FIXTURES / "wide", folder / "float32")
    convert(FIXTURES / "wide", folder / "bfloat16", dtype="bfloat16")
    convert(folder / "bfloat16", folder / "8 bits", Quantization(bits=8, group_size=32))
    convert(folder / "bfloat16", folder / "mxfp4", Quantization(mode="mxfp4", vision_bits=4))
    return folder


@pytest.mark.parametrize("wish", WISHES)
@pytest.mark.parametrize("source", SOURCES)
def test_the_plan_knows_the_size(source, wish, sources, out):
    """One size everywhere: in the plan, its summary, the card, and of what is written."""
    undo = source in ("8 bits", "mxfp4")
    options = {"quantization": None, **WISHES[wish]}
    plan = make_plan(sources / source, dequantize=undo, **options)
    write_plan(plan, out)
    size = sum(array.nbytes for array in tensors(out).values())
    weights = tree_flatten(mlx_lfm2vl.load(FIXTURES / "wide")[0].parameters())
    parameters = sum(array.size for _, array in weights)
    told = f"{size / 1e6:.1f} MB, {8 * size / parameters:.2f} bits per weight"
    assert plan.nbytes == size
    assert plan.parameters == parameters
    assert plan.summary().endswith(told)
    assert told in (out / "README.md").read_text()
    if undo and wish == "plain":
        assert told.endswith("16.00 bits per weight")


def test_a_plan_stays_what_it_is(out, tmp_path):
    plan = make_plan(FIXTURES / "v5", Quantization(**SMALL))
    before = plan.summary(every_module=True)
    write_plan(plan, out)
    assert plan.summary(every_module=True) == before
    write_plan(plan, tmp_path / "again")
    one, other = tensors(out), tensors(tmp_path / "again")
    assert one.keys() == other.keys()
    assert all(bits(one[key]) == bits(other[key]) for key in one)


def test_tensors_are_let_go_one_after_the_other(sources, monkeypatch):
    """A walk over a plan holds one tensor at a time, whatever was done to it."""
    four = Quantization(bits=4, group_size=32)
    for options in ({}, {"quantization": four}, {"dtype": "float16"}, {"to_hf": True}):
        plan = make_plan(sources / "float32", **{"quantization": None, **options})
        largest = max(array.nbytes for array in tensors(sources / "float32").values())
        mx.clear_cache()
        before = mx.get_active_memory()
        for _, tensor in plan.tensors():
            mx.eval(tensor)
            assert mx.get_active_memory() - before <= 1.1 * largest + 10_000
        del tensor
        assert mx.get_active_memory() - before < 10_000


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
        (["-q", "--q-group-size", "128"], "nothing can be quantized like this: "),
        (["-q", "--quant-predicate", "mixed_9_9"], "mixed_9_9 is no recipe"),
        (["-q", "--quant-predicate", "lfm2_4bit", "--q-mode", "mxfp4"], "needs q-mode affine"),
        (["--q-bits", "4"], "--q-bits: quantization settings need -q"),
        (["--q-group-size", "32"], "need -q"),
        (["--q-mode", "affine"], "need -q"),
        (["--q-embeddings", "8"], "need -q"),
        (["--q-vision", "8"], "need -q"),
        (["--no-q-projector"], "need -q"),
        (["--quant-predicate", "mixed_4_8"], "need -q"),
        (["-q", "--q-bits", "8", "--quant-predicate", "lfm2_4bit"], "sets the bits"),
        (["--dry-run", "--report"], "--dry-run writes nothing"),
        (["--dry-run", "--upload-repo", "a/b"], "--dry-run writes nothing"),
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
    patterns.write_text('{"*": 4, "*w2": 8}')
    line = fails("--hf-path", FIXTURES / "v5", *arguments[:3], "--quant-predicate", patterns)
    assert "earlier patterns match all that '*w2' does" in line
    patterns.write_text('{"vision_tower.*": false}')
    flags = ("--q-vision", "8", "--quant-predicate", patterns)
    assert "--q-vision decides nothing" in fails("--hf-path", FIXTURES / "v5", *arguments, *flags)
    with pytest.raises(ConfigError):
        Quantization(bits=1)


def test_dry_run_tells_everything_and_writes_nothing(out, capsys):
    arguments = ["--hf-path", str(FIXTURES / "v5"), "--mlx-path", str(out), "--dry-run", "-q"]
    with pytest.raises(SystemExit) as exit_info:
        main([*arguments, "--q-group-size", "32", "--no-q-projector"])
    assert exit_info.value.code == 0
    told = capsys.readouterr().out
    assert "language_model.model.layers.1.self_attn.q_proj: 4 bits, groups of 32, affine" in told
    assert " MB" in told
    assert "left in floating point: multi_modal_projector" not in told
    assert not out.exists()


def test_the_source_is_never_modified(out, copied):
    folder = copied("first")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    convert(folder, out, Quantization(**SMALL))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


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
