"""The command line as its user sees it."""

import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest
from PIL import Image

from mlx_lfm2vl import generate
from mlx_lfm2vl.cli.generate import build_parser, is_photograph, main

from .checkpoints.pictures import picture


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(picture(200, 130)).save(path)
    return path


@pytest.fixture
def run(capsys, fixtures):
    """Runs the command line in this process; returns (stdout, stderr)."""

    def call(*arguments, model="v5"):
        with pytest.raises(SystemExit) as exit_info:
            main(
                [
                    "--model",
                    str(model if model == "demo" else fixtures / model),
                    *map(str, arguments),
                ]
            )
        captured = capsys.readouterr()
        assert exit_info.value.code == 0, captured.err
        return captured.out, captured.err

    return call


def command(fixtures, *arguments):
    start = [sys.executable, "-m", "mlx_lfm2vl.generate", "--model", str(fixtures / "v5")]
    return [*start, *map(str, arguments)]


def test_output_is_only_the_text(run, photo, loaded):
    out, err = run("--image", photo, "--prompt", "What?", "--temp", 0, "--max-tokens", 9)
    text = generate(*loaded(), "What?", photo, temperature=0, max_tokens=9)
    assert out == text + "\n"
    assert err == ""


def test_json_is_one_object(run, photo, loaded):
    out, err = run("--image", photo, "-p", "What?", "--temp", 0, "--max-tokens", 9, "--json")
    answer = json.loads(out)
    assert out.count("\n") == 1
    assert err == ""
    prompt = loaded()[1]("What?", photo)
    assert answer["text"] == generate(*loaded(), prompt, temperature=0, max_tokens=9)
    assert loaded()[1].decode(answer["tokens"], True) == answer["text"]
    assert answer["prompt_tokens"] == len(prompt.token_ids)
    assert answer["image_tokens"] == [image.image_tokens for image in prompt.images]
    assert answer["image_views"] == [len(prompt.spatial_shapes)]
    assert answer["finish_reason"] == "length"
    assert answer["sampling"]["temperature"] == 0
    assert answer["timings"]["vision_s"] > 0


def test_several_images_and_a_system_message(run, photo, loaded):
    arguments = ("--image", photo, photo, "--image", photo, "--system", "Be brief.")
    out, _ = run(*arguments, "-p", "What?", "--temp", 0, "-m", 4, "--json")
    answer = json.loads(out)
    assert len(answer["image_tokens"]) == 3
    content = [*[{"type": "image", "image": photo}] * 3, {"type": "text", "text": "What?"}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]
    assert answer["prompt_tokens"] == len(loaded()[1](messages).token_ids)


def test_verbose_tells_sources_and_statistics(run, photo):
    _, err = run("--image", photo, photo, "-p", "What?", "-m", 3, "-v", "--min-p", 0.3)
    assert "temperature 0.1 (model card)" in err
    assert "min_p 0.3 (flag)" in err
    assert "repetition_penalty 1.05 (model card)" in err
    assert "top_k 0 (default)" in err
    for part in ("images: tokens ", "vision ", " tok/s", "first token after", "peak memory"):
        assert part in err
    _, err = run("-p", "What?", "-m", 3, "-v")
    assert "images: tokens none\n" in err


def test_sampling_of_generation_config_is_named(run, copied):
    folder = copied()
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 4, "do_sample": True, "temperature": 0.2, "top_k": 50})
    )
    _, err = run("-p", "Hi", "-m", 2, "-v", model=folder)
    assert "temperature 0.2 (generation_config.json)" in err
    assert "top_k 50 (generation_config.json)" in err
    assert "min_p 0 (default)" in err


@pytest.mark.parametrize(
    ("flags", "fewer"),
    [
        (["--no-image-splitting"], True),
        (["--no-thumbnail"], True),
        (["--no-image-special-tokens"], True),
        (["--max-tiles", "2"], True),
        (["--max-pixels-tolerance", "50"], True),
        (["--max-image-tokens", "64", "--max-pixels-tolerance", "0.05"], False),
        (["--tile-size", "128"], False),
        (["--min-tiles", "9"], False),
    ],
)
def test_image_switches_reach_the_processor(flags, fewer, run, photo):
    def length(*more):
        out, _ = run("--image", photo, "-p", "What?", "-m", 1, "--json", *more)
        return json.loads(out)["prompt_tokens"]

    assert (length(*flags) < length()) if fewer else (length(*flags) > length())


def test_memory_flags_reach_the_cache(run, loaded):
    from mlx_lfm2vl.options import CacheOptions

    size = 2 * len(loaded()[1]("Count").token_ids)
    flags = ("-p", "Count", "--temp", 0, "-m", 90)
    out, _ = run(*flags, "--max-kv-size", size)
    options = CacheOptions(size)
    assert out.rstrip("\n") == generate(
        *loaded(), "Count", temperature=0, max_tokens=90, cache_options=options
    ).rstrip("\n")
    assert out != run(*flags)[0], "the window changed nothing"
    kept, _ = run(*flags, "--max-kv-size", size, "--keep", 2)
    assert kept != out


def test_odd_images_are_answered(run, tmp_path):
    rgb = Image.fromarray(picture(60, 40))
    rgb.convert("CMYK").save(tmp_path / "cmyk.jpg")
    rgb.convert("L").save(tmp_path / "grey.png")
    rgb.quantize(8).save(tmp_path / "palette.png", transparency=1)
    rgb.convert("RGBA").save(tmp_path / "alpha.webp")
    rgb.save(tmp_path / "animated.gif", save_all=True, append_images=[rgb.rotate(90)])
    Image.fromarray(picture(60, 40)[..., 0].astype("uint16") * 257).save(tmp_path / "deep.png")
    Image.new("RGB", (12_000, 40)).save(tmp_path / "thin.png")
    images = sorted(tmp_path.iterdir())
    out, _ = run("--image", *images, "-p", "What?", "-m", 2, "--json")
    assert len(json.loads(out)["image_tokens"]) == len(images) == 7


def test_prompt_and_image_from_standard_input(run, photo, monkeypatch):
    arguments = ("--temp", 0, "-m", 5)
    flags, _ = run("--image", photo, "-p", "What?", *arguments)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"What?")))
    prompt, _ = run("--image", photo, "-p", "-", *arguments)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(photo.read_bytes())))
    image, _ = run("--image", "-", "-p", "What?", *arguments)
    assert flags == prompt == image
    assert len(flags) > 1


def test_a_terminal_sees_the_answer_grow(fixtures):
    """On a terminal pieces arrive one by one."""
    reader, writer = pty.openpty()
    process = subprocess.Popen(
        command(fixtures, "-p", "Count", "--temp", 0, "-m", 4000), stdout=writer
    )
    os.close(writer)
    pieces = 0
    try:
        while pieces < 5:
            assert os.read(reader, 64)
            pieces += 1
        assert process.poll() is None, "the answer came at its end"
    finally:
        process.kill()
        process.wait()
        os.close(reader)


def test_a_pipe_sees_the_answer_grow(fixtures):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        command(fixtures, "-p", "Count", "--temp", 0, "-m", 100000),
        stdout=subprocess.PIPE,
        env=environment,
    )
    try:
        for _ in range(5):
            assert 0 < len(os.read(process.stdout.fileno(), 1 << 16)) < 4000
        assert process.poll() is None, "the answer came at its end"
    finally:
        process.kill()
        process.communicate()


def test_ctrl_c_ends_quietly(fixtures):
    process = subprocess.Popen(
        command(fixtures, "-p", "Count", "--temp", 0, "-m", 100000),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    # a pipe is written in blocks, so the first block says that it is under way
    assert process.stdout.read(10)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.strip() == b""


def test_a_reader_that_leaves_is_no_error(fixtures):
    process = subprocess.Popen(
        command(fixtures, "-p", "Count", "--temp", 0, "-m", 20000),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.read(10)
    process.stdout.close()
    assert process.wait(timeout=60) == 1
    assert process.stderr.read() == b""
    process.stderr.close()


def test_help_names_every_argument_and_its_default():
    text = build_parser().format_help()
    for flag in ("--model", "--image", "--prompt", "--temp", "--min-image-tokens", "--json"):
        assert flag in text
    assert "LiquidAI/LFM2.5-VL-450M" in text
    assert "(default: 256)" in text


@pytest.fixture
def fails(capsys, fixtures):
    """Runs the command line, expects failure, returns the one line on stderr."""

    def call(*arguments):
        with pytest.raises(SystemExit) as exit_info:
            main(["--model", str(fixtures / "v5"), *map(str, arguments)])
        captured = capsys.readouterr()
        assert (exit_info.value.code, captured.out) == (2, "")
        (line,) = captured.err.splitlines()
        return line

    return call


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--image", "photo.png", "hi"], '"hi" stands after --image and was taken for an image'),
        (["--image", "photo.png", "What", "is", "it?"], '--prompt "What is it?"'),
        (["--image", "photo.png"], "--prompt is missing; ask something"),
        (["hi"], 'hi belongs to no flag; a question is --prompt "hi"'),
        (["-p", "Hi", "--temp", "inf"], "temperature is inf; it must be 0, or a number"),
        (["-p", "Hi", "--temp", "nan"], "temperature is nan"),
        (["-p", "Hi", "--temp", "hot"], "hot is no number"),
        (["-p", "Hi", "--top-k", "-1"], "top_k is -1"),
        (["-p", "Hi", "--seed", "-1"], "seed is -1"),
        (["-p", "Hi", "--seed", str(2**64)], f"it must be a whole number from 0 to {2**64 - 1}"),
        (["-p", "Hi", "-m", "9" * 5000], "9… is no whole number"),
        (["-p", "Hi", "-m", str(2**31)], "a whole number from 1 to 2147483647"),
        (["-p", "Hi", "--max-tiles", "0", "--image", "photo.png"], "max_tiles is 0"),
        (["-p", "caf\udce9"], r"caf\udce9 is not UTF-8"),
        (["-p", "Hi", "--image", "x" * 300], "File name too long"),
        (["-p", "Hi", "--image", "photo.png/x"], "photo.png/x"),
        (["-p", "Hi", "--image", "~nosuchuser/x.png"], "~nosuchuser/x.png does not exist"),
        (["-p", "Hi", "--model", "~nosuchuser/x"], "~nosuchuser/x does not exist"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, told, fails, photo, monkeypatch):
    monkeypatch.chdir(photo.parent)
    assert told in fails(*arguments)


def test_a_prompt_on_standard_input_must_be_text(fails, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), "utf-8"))
    assert "standard input is not UTF-8" in fails("-p", "-")


def test_flags_have_the_names_of_other_tools(run, photo):
    def tokens(*flags):
        return json.loads(run(*flags, "-p", "What?", "-m", 1, "--json")[0])["prompt_tokens"]

    assert tokens("--images", photo) == tokens("--image", photo)
    assert tokens("--system-prompt", "Be brief.") == tokens("--system", "Be brief.") > tokens()
    assert run("-p", "Hi", "--temperature", 0, "-m", 2)[0]


def test_an_image_whose_name_begins_with_a_tilde(run, photo, monkeypatch):
    monkeypatch.chdir(photo.parent)
    photo.rename("~x.png")
    assert run("--image", "~x.png", "-p", "What?", "-m", 2)[0]


def test_adapters_bring_their_base_model(capsys, loaded, fixtures, tmp_path):
    """Without --model; these adapters change nothing."""
    model, processor = loaded()
    name, linear = next(
        (name, module)
        for name, module in model.language_model.named_modules()
        if name.endswith("q_proj")
    )
    outputs, inputs = linear.weight.shape
    module = f"language_model.{name}"
    mx.save_safetensors(
        str(tmp_path / "adapters.safetensors"),
        {f"{module}.lora_a": mx.ones((inputs, 2)), f"{module}.lora_b": mx.zeros((2, outputs))},
    )
    config = {"lora_parameters": {"scale": 1.0}, "model": str(fixtures / "v5")}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as exit_info:
        main(["--adapter-path", str(tmp_path), "-p", "Hi", "--temp", "0", "-m", "5"])
    assert exit_info.value.code == 0
    expected = generate(model, processor, "Hi", temperature=0, max_tokens=5)
    assert capsys.readouterr().out == expected + "\n"


EXAMPLES = Path(__file__).parents[1] / "examples"
PHOTOS = sorted(EXAMPLES.glob("photos/*.*g"))
DRAWING = EXAMPLES / "demo" / "picture.png"


def test_photographs_and_drawings_are_told_apart():
    assert len(PHOTOS) == 3
    assert all(map(is_photograph, PHOTOS))
    assert not is_photograph(DRAWING)
    assert not is_photograph(Image.new("RGB", (1, 3000), "red"))


@pytest.mark.parametrize(("image", "lines"), [(PHOTOS[0], 1), (DRAWING, 0)])
def test_the_demo_model_warns_of_photographs(image, lines, run):
    out, err = run("--image", image, "-p", "What is in this image?", "-m", 5, model="demo")
    assert out
    assert err.count("\n") == lines
    assert ("looks like a photograph" in err) == bool(lines)


def test_other_models_know_photographs(run):
    assert run("--image", PHOTOS[0], "-p", "What?", "-m", 2)[1] == ""
