"""The benchmark measures what it says; how long anything takes is not tested."""

import json
import os
from dataclasses import asdict, fields, replace

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from PIL import Image

from mlx_lfm2vl import ImageError, ImageOptions, PromptError, load
from mlx_lfm2vl.cli.benchmark import as_json, as_table, main
from mlx_lfm2vl.generation import engine
from mlx_lfm2vl.measuring.machine import Machine, measure_bandwidth
from mlx_lfm2vl.measuring.stages import (
    BenchmarkResult,
    ImageCosts,
    KnobCosts,
    benchmark,
    decode_weight_bytes,
    made_picture,
)
from mlx_lfm2vl.models.siglip2 import PATCHES_PER_GROUP, Siglip2VisionModel

from .checkpoints.pictures import picture

pytestmark = pytest.mark.usefixtures("small_matrix")
FAST = {"rounds": 2, "max_tokens": 3, "rows": 2}
STAGES = ("preprocess", "vision", "prefill", "first_question", "second_question", "decode")


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(picture(200, 130)).save(path)
    return path


@pytest.fixture(scope="module")
def result(fixtures, small_matrix) -> BenchmarkResult:
    return benchmark(fixtures / "v5", sizes=[(40, 30), (300, 200)], **FAST)


def test_each_image_has_every_stage(result, loaded):
    model, processor = loaded()
    assert [costs.name for costs in result.images] == ["40x30", "300x200"]
    for costs, size in zip(result.images, [(40, 30), (300, 200)], strict=True):
        prompt = processor("What is in this image?", made_picture(*size))
        assert costs.prompt_tokens == len(prompt.token_ids)
        assert costs.views == len(prompt.spatial_shapes)
        assert costs.image_tokens == prompt.token_ids.count(model.config.image_token_id)
        assert set(costs.rounds) == set(STAGES)
        assert all(len(times) == 2 and min(times) > 0 for times in costs.rounds.values())
        assert costs.decode_tps == pytest.approx(2 / sum(costs.rounds["decode"]))
        assert costs.bandwidth_share == pytest.approx(
            costs.bytes_per_token * costs.decode_tps / result.bandwidth
        )
        assert costs.peak_memory_bytes > result.weight_bytes
    assert result.load_s > 0
    assert result.batch_tps > 0


def test_read_per_token_is_weights_and_cache(result, loaded):
    model, _ = loaded()
    config = model.config.text_config
    head = config.hidden_size // config.num_attention_heads
    for costs in result.images:
        # the last token is not read
        positions = costs.prompt_tokens + FAST["max_tokens"] - 1
        attention = config.layer_types.count("full_attention")
        keys = 2 * attention * config.num_key_value_heads * head * positions
        conv = config.layer_types.count("conv") * (config.conv_L_cache - 1) * config.hidden_size
        weights = decode_weight_bytes(model.language_model)
        assert costs.bytes_per_token == weights + 4 * (keys + conv)


def test_embeddings_count_where_they_are_the_head(loaded, fixtures):
    tied = loaded()[0].language_model
    assert decode_weight_bytes(tied) > tied.model.embed_tokens.weight.nbytes
    model, _ = load(fixtures / "untied", dtype="float32")
    untied = model.language_model
    layers = sum(a.nbytes for _, a in tree_flatten(untied.parameters()))
    assert decode_weight_bytes(untied) == layers - untied.model.embed_tokens.weight.nbytes


def test_bandwidth_reads_the_matrix():
    assert measure_bandwidth(mx.float32, 2, 1 << 18) > 0
    assert measure_bandwidth(mx.bfloat16, 1, 1 << 16) > 0


def test_a_made_picture_is_the_same_jpeg_each_time():
    assert made_picture(64, 48) == made_picture(64, 48)
    assert made_picture(64, 48)[:2] == b"\xff\xd8"


def test_json_and_table_tell_the_same(result):
    data = json.loads(as_json(result))
    assert data == asdict(result)
    images = [ImageCosts(**costs) for costs in data["images"]]
    machine = Machine(**data["machine"])
    assert BenchmarkResult(**{**data, "images": images, "machine": machine}) == result
    table = as_table(result)
    for text in (machine.mlx, machine.python, machine.device_name, "40x30", "300x200", "float32"):
        assert text in table
    assert result.knobs == []
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1
    assert len({line.count("|") for line in lines}) == 1
    assert {f.name for f in fields(Machine)} == set(data["machine"])


def run(capsys, *arguments, code=0):
    with pytest.raises(SystemExit) as exit_info:
        main([*map(str, arguments)])
    captured = capsys.readouterr()
    assert exit_info.value.code == code, captured.err
    return captured


def test_command_line(capsys, fixtures, photo, tmp_path):
    short = ("--model", fixtures / "v5", "--rounds", 1, "-m", 2, "--batch-size", 2)
    out = run(capsys, *short, "--image", photo, "--json", tmp_path / "speed.json").out
    assert "photo.png" in out
    data = json.loads((tmp_path / "speed.json").read_text())
    assert data["images"][0]["views"] == 7
    options = ("--no-image-splitting", "--max-image-tokens", 2)
    out = run(capsys, *short, "--size", "50x40", "--json", *options).out
    data = json.loads(out)
    assert data["images"][0]["image_tokens"] <= 2
    assert data["batch_rows"] == 2


def test_which_sizes_are_best_here(capsys, fixtures, work, monkeypatch):
    """Each is really used, on the largest image, and the model is left as it was."""
    groups, steps, encode, read = set(), set(), Siglip2VisionModel._encode, engine.prefill

    def counting_encode(self, patches, *size):
        groups.add(self.patches_per_group)
        return encode(self, patches, *size)

    def counting_prefill(model, embeddings, cache, options, step):
        steps.add(step)
        return read(model, embeddings, cache, options, step)

    monkeypatch.setattr(Siglip2VisionModel, "_encode", counting_encode)
    monkeypatch.setattr(engine, "prefill", counting_prefill)
    sizes = ("--size", "40x30", "300x200", "--patches-per-group", 64, 512)
    short = ("--model", fixtures / "v5", "--rounds", 1, "-m", 2, "--batch-size", 1)
    out = run(capsys, *short, *sizes, "--prefill-step", 8, "--json").out
    found = {knob["name"]: knob for knob in json.loads(out)["knobs"]}
    assert [*found["patches per group"]["seconds"]] == ["64", "512"]
    assert [*found["prefill step"]["seconds"]] == ["8"]
    assert {knob["image"] for knob in found.values()} == {"300x200"}
    assert groups == {PATCHES_PER_GROUP, 64, 512}
    assert steps == {engine.PREFILL_STEP_SIZE, 8}
    assert 8 in work.passes


def test_the_best_size_is_told(result):
    knob = KnobCosts("prefill step", "40x30", {512: 0.5, 1024: 0.25, 2048: 1.5})
    last = as_table(replace(result, knobs=[knob])).splitlines()[-1]
    assert last == (
        "prefill step, 40x30: 512 in 500.0 ms, 1024 in 250.0 ms, 2048 in 1.50 s; best here is 1024"
    )


def test_image_options_hold_in_every_stage(fixtures):
    options = ImageOptions(do_image_splitting=False, max_image_tokens=2)
    result = benchmark(
        fixtures / "v5", [picture(90, 60)], image_options=options, rounds=1, max_tokens=2, rows=1
    )
    assert result.images[0].views == 1
    assert result.images[0].name == "image 1"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--image", "missing.jpg"), "missing.jpg does not exist"),
        (("--model", "missing/folder/here"), "missing/folder/here"),
        (("--size", "640"), "640 must be WIDTHxHEIGHT"),
        (("--size", "0x640"), "0x640 pixels"),
        (("--size", "70000x5"), "sides must be 1 to 16384"),
        (("--size", "1x16384"), "one at most 256 times the other"),
        (("--size", "16384x16384"), "89000000 pixels"),
        (("--size", "0x0"), "0x0 pixels"),
        (("--output", "missing/speed.json"), "missing/speed.json cannot be written"),
        (("--output", "x" * 300 + ".json"), "File name too long"),
        (("--adapter-path", "missing"), "missing has no adapter_config.json"),
        (("--rounds", "many"), "many is no whole number"),
        (("--rounds", "0"), "0 must be 1 or more"),
        (("--patches-per-group", "0"), "0 must be 1 or more"),
        (("--prefill-step", "1k"), "1k is no whole number"),
        (("--max-tokens", "1"), "max_tokens is 1; it must be 2 or more"),
        (("--json", "missing/speed.json"), "missing/speed.json cannot be written"),
        (("--json", "."), "cannot be written"),
    ],
)
def test_bad_input_is_told_in_one_line(arguments, told, capsys, fixtures, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    err = run(capsys, "--model", fixtures / "v5", *arguments, code=2).err
    last = err.splitlines()[-1]
    assert last.startswith("mlx-lfm2vl-benchmark: error: ")
    assert told in last


def test_bad_numbers_in_python(fixtures):
    with pytest.raises(PromptError, match="rows is 0; it must be 1 or more"):
        benchmark(fixtures / "v5", rows=0)
    with pytest.raises(PromptError, match="prefill_steps is 0; it must be 1 or more"):
        benchmark(fixtures / "v5", patches_per_group=[7], prefill_steps=[8, 0])
    with pytest.raises(ImageError, match="is empty"):
        benchmark(fixtures / "v5", [b""])


@pytest.fixture
def measured(monkeypatch, result):
    """Nothing is measured; returns what `benchmark` was called with."""
    calls = []

    def instead(model, images, sizes, **options):
        calls.append((model, images, sizes, options))
        return result

    monkeypatch.setattr("mlx_lfm2vl.measuring.stages.benchmark", instead)
    return calls


def test_output_besides_the_table(capsys, measured, tmp_path, result):
    file, link = tmp_path / "speed.json", tmp_path / "link.json"
    file.write_text("old")
    link.symlink_to(file)
    out = run(capsys, "--output", link).out
    assert out == as_table(result) + "\n"
    assert json.loads(file.read_text()) == asdict(result)
    assert sorted(tmp_path.iterdir()) == [link, file]
    out = run(capsys, "--output", file, "--json").out
    assert json.loads(out) == json.loads(file.read_text())
    assert as_table(result) in run(capsys, "--json", os.devnull).out
    assert not os.path.isfile(os.devnull), "the device was replaced"


def test_a_file_that_fails_late_loses_no_numbers(capsys, measured, tmp_path, result, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    captured = run(capsys, "--output", tmp_path / "speed.json", code=2)
    assert captured.out == as_table(result) + "\n"
    assert captured.err.endswith("speed.json cannot be written: No space left on device\n")
    assert list(tmp_path.iterdir()) == []


def test_flags_reach_the_measurement(capsys, measured, tmp_path):
    (tmp_path / "adapters.safetensors").touch()
    (tmp_path / "adapter_config.json").write_text('{"model": "somebody/tuned"}')
    run(capsys, "--adapter-path", tmp_path, "--images", "a.png", "--size", "64x48", "-m", 9)
    ((model, images, sizes, options),) = measured
    assert (model, images, sizes) == ("somebody/tuned", ["a.png"], [(64, 48)])
    assert options["adapter_path"] == str(tmp_path)
    assert options["max_tokens"] == 9
