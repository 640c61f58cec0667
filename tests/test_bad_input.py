"""Bad input: one line that names the thing and the cure, exit code 2, clear exceptions."""

import json
import re
import struct
import zlib

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

import mlx_lfm2vl
from mlx_lfm2vl import (
    ConfigError,
    ImageError,
    ImageOptions,
    ModelNotFoundError,
    PromptError,
    WeightsError,
)
from mlx_lfm2vl.cli.generate import main


@pytest.fixture
def fails(capsys, fixtures):
    """Runs the command line, expects failure, returns the one line on stderr."""

    def run(*arguments: str, model=None, prompt: str = "What is it?") -> str:
        folder = model if model is not None else fixtures / "v5"
        with pytest.raises(SystemExit) as exit_info:
            main(["--model", str(folder), "--prompt", prompt, "--max-tokens", "2", *arguments])
        captured = capsys.readouterr()
        assert exit_info.value.code == 2
        assert captured.out == ""
        lines = captured.err.strip().splitlines()
        assert "error: " in lines[-1]
        assert "Traceback" not in captured.err
        return lines[-1]

    return run


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")


def bad_images(folder):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(
        folder / "whole.jpg"
    )
    (folder / "truncated.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:1500])
    (folder / "text.png").write_text("no image at all")
    (folder / "empty.png").write_bytes(b"")
    (folder / "bomb.png").write_bytes(png_header(60_000, 60_000))
    (folder / "zero.png").write_bytes(png_header(0, 5))
    (folder / "folder.png").mkdir()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing.png", "does not exist"),
        ("truncated.jpg", "is damaged: .*truncated"),
        ("text.png", "is not an image"),
        ("empty.png", "0 bytes"),
        ("bomb.png", "too large"),
        ("zero.png", "zero.png"),
        ("folder.png", "cannot be read"),
    ],
)
def test_unusable_image(name, reason, fails, tmp_path, loaded):
    bad_images(tmp_path)
    line = fails("--image", str(tmp_path / name))
    assert name in line
    with pytest.raises(ImageError, match=reason):
        loaded()[1]("What is it?", images=str(tmp_path / name))


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ("data:image/png,abc", "data URL must look like"),
        ("data:image/png;base64,@@@", "not valid base64"),
        ("data:image/png;base64,é", "not valid base64"),
        (b"", "empty"),
        (b"abc", "not an image"),
        (42, "type int cannot be read"),
        (np.zeros((4, 4, 3), np.float32), "uint8"),
        (np.zeros((0, 4, 3), np.uint8), "empty"),
        (np.zeros((4, 4, 2), np.uint8), r"shape \(4, 4, 2\)"),
    ],
)
def test_unusable_image_in_python(image, reason, loaded):
    with pytest.raises(ImageError, match=reason):
        loaded()[1]("What is it?", images=[image])


def test_unreachable_url(fails):
    assert "http://127.0.0.1:9/x.png" in fails("--image", "http://127.0.0.1:9/x.png")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--max-tokens", "-3"], "max_tokens is -3"),
        (["--max-tokens", "0"], "max_tokens is 0"),
        (["--temp", "-1"], "temperature is -1"),
        (["--min-p", "2"], "min_p is 2"),
        (["--dtype", "int8"], "int8"),
        (["--stop", ""], "stop is ['']"),
        (["--max-kv-size", "6"], "more than half of max_kv_size 6"),
        (["--kv-bits", "5"], "kv_bits is 5"),
        (["--min-tiles", "4", "--max-tiles", "2", "--image", "x.png"], "max_tiles is 2"),
        (["--tile-size", "100", "--image", "x.png"], "tile_size is 100"),
        (["--max-image-tokens", "1", "--image", "x.png"], "max_image_tokens is 1"),
    ],
)
def test_impossible_arguments(arguments, named, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 40)).save("x.png")
    assert named in fails(*arguments)


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_empty_prompt(prompt, fails, loaded):
    assert "prompt is empty" in fails(prompt=prompt)
    with pytest.raises(PromptError, match="empty"):
        loaded()[1](prompt)


def test_standard_input_for_two_things(fails):
    assert "not both" in fails("--image", "-", prompt="-")


def test_more_and_fewer_images_than_places(loaded):
    processor = loaded()[1]
    image = Image.new("RGB", (40, 40))
    two = [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]
    messages = [{"role": "user", "content": two}]
    assert len(processor(messages, [image, image]).images) == 2
    with pytest.raises(PromptError, match="more image places than images"):
        processor(messages, [image])
    with pytest.raises(PromptError, match=r"3 images were given, .* only 2"):
        processor(messages, [image] * 3)
    with pytest.raises(PromptError, match="no role"):
        processor([{"content": "x"}])
    with pytest.raises(PromptError, match="empty"):
        processor([])


def test_features_that_do_not_fit_the_prompt(loaded):
    model, processor = loaded()
    prompt = processor("What?", images=Image.new("RGB", (40, 40)))
    features = model.encode_images(prompt.pixel_values, prompt.spatial_shapes)
    with pytest.raises(PromptError, match=r"\d+ image tokens stand in the prompt, but"):
        model.embed(prompt.token_ids, features[:-1])
    with pytest.raises(PromptError, match="cover"):
        model.encode_images(prompt.pixel_values[1:], prompt.spatial_shapes)
    with pytest.raises(PromptError, match="exactly one of input_ids"):
        model()


def rewrite(path, **changes):
    data = json.loads(path.read_text())
    data.update(changes)
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))


@pytest.mark.parametrize(
    ("file", "error"),
    [
        ("config.json", ModelNotFoundError),
        ("tokenizer.json", ModelNotFoundError),
        ("model.safetensors", ModelNotFoundError),
    ],
)
def test_folder_without_a_file(file, error, copied, fails):
    folder = copied()
    (folder / file).unlink()
    assert file in fails(model=folder)
    with pytest.raises(error):
        mlx_lfm2vl.load(folder)


def test_missing_shard(copied, fails):
    folder = copied("noprefix")
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    shard.unlink()
    assert shard.name in fails(model=folder)
    with pytest.raises(ModelNotFoundError, match="is missing"):
        mlx_lfm2vl.load(folder)


@pytest.mark.parametrize("keep", [4, 100, 3000, -1])
def test_truncated_weights(keep, copied, fails):
    folder = copied()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "damaged or cut short" in fails(model=folder)
    with pytest.raises(WeightsError):
        mlx_lfm2vl.load(folder)


def spoil_weights(folder, change):
    weights = dict(mx.load(str(folder / "model.safetensors")))
    mx.eval(weights)
    change(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda w: w.pop("model.language_model.embedding_norm.weight"), "embedding_norm.weight"),
        (lambda w: w.update({"model.surplus.weight": mx.zeros((2,))}), "surplus.weight"),
        (
            lambda w: w.update({"model.multi_modal_projector.linear_1.bias": mx.zeros((3,))}),
            r"linear_1.bias has shape (3,)",
        ),
        (
            lambda w: w.update({"model.multi_modal_projector.linear_1.scales": mx.zeros((3,))}),
            "quantization",
        ),
    ],
)
def test_weights_that_do_not_fit(change, named, copied, fails):
    folder = copied()
    spoil_weights(folder, change)
    assert named in fails(model=folder)
    with pytest.raises(WeightsError):
        mlx_lfm2vl.load(folder)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "qwen2_vl"}, "config.json: model_type is 'qwen2_vl'"),
        ({"image_token_id": 5, "image_token_index": 6}, "image_token_id is 5 but .* is 6"),
        ({"image_token_id": 5}, "image_token_id 5, the tokenizer has"),
        ({"projector_hidden_act": "tanhshrink"}, "activation 'tanhshrink' is unknown"),
        ({"projector_hidden_size": "wide"}, "projector_hidden_size is 'wide'"),
        ({"downsample_factor": 4}, "downsample_factor is 2 .* but 4 in config.json"),
        ({"vision_feature_layer": -9}, "vision_feature_layer is -9"),
        ({"text_config": None}, "text_config is missing"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method is 'awq'"),
        (
            {"quantization": {"bits": 4}, "quantization_config": {"bits": 8}},
            "quantization .* differ",
        ),
    ],
)
def test_configuration_that_cannot_be(changes, named, copied, fails):
    folder = copied()
    rewrite(folder / "config.json", **changes)
    assert re.search(named, fails(model=folder))
    with pytest.raises(ConfigError):
        mlx_lfm2vl.load(folder)


def test_unknown_dtype(fixtures):
    with pytest.raises(ConfigError, match="dtype is 'float64'; it must be one of float32"):
        mlx_lfm2vl.load(fixtures / "v5", dtype="float64")


def test_two_files_that_contradict_each_other(copied, fails):
    folder = copied("first")
    rewrite(folder / "processor_config.json", resample=3)
    line = fails(model=folder)
    assert "resample is 3 in processor_config.json and 2 in preprocessor_config.json" in line


def test_broken_json(copied, fails):
    folder = copied()
    (folder / "config.json").write_text("{")
    assert "config.json is not valid JSON" in fails(model=folder)
    (folder / "config.json").write_text("[]")
    assert "must be an object" in fails(model=folder)


def test_unknown_model(fails, tmp_path, monkeypatch):
    assert "does not exist" in fails(model=tmp_path / "nowhere")
    assert "is a file" in fails(model=__file__)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "nobody/nothing" in fails(model="nobody/nothing")
    with pytest.raises(ModelNotFoundError, match="nobody/nothing"):
        mlx_lfm2vl.load("nobody/nothing")


def test_unknown_options_in_python():
    with pytest.raises(TypeError):
        ImageOptions(tiles=3)
