"""What the model inside the package does with pictures that it has never seen.

The other tests compare numbers; these measure behaviour.
"""

import dataclasses
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_lfm2vl import (
    CacheOptions,
    Quantization,
    Sampling,
    Session,
    convert,
    generate,
    load,
)
from mlx_lfm2vl.generation.generate import generate_step

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples" / "demo"))
import evaluate  # noqa: E402
import world  # noqa: E402

README = (ROOT / "mlx_lfm2vl" / "demo" / "README.md").read_text(encoding="utf-8")
STATED = {task: float(value) for task, value in re.findall(r"^\| (\w+) \| ([\d.]+) ", README, re.M)}
PICTURES = 14  # per task


def margin(percent):
    """What so few pictures may be away from the stated 500: three standard errors."""
    share = min(percent / 100, 0.97)  # near 1 the errors are not normal: a single one is chance
    return 3 * (share * (1 - share) * (1 / PICTURES + 1 / 500)) ** 0.5


@pytest.fixture(scope="module")
def examples():
    """Pictures of the test split, by task."""
    return {
        task: [world.make_example("test", number, task) for number in range(PICTURES)]
        for task in world.TASKS
    }


@pytest.fixture(scope="module")
def demo():
    return load("demo", dtype="float32")


def scores(model, processor, examples):
    """Mean score by task."""
    result = {}
    for task, chosen in examples.items():
        answers = evaluate.ask_all(model, processor, chosen)
        values = [
            evaluate.score(example, answer) for answer, example in zip(answers, chosen, strict=True)
        ]
        result[task] = sum(values) / len(values)
    return result


@pytest.fixture(scope="module")
def float_scores(demo, examples):
    return scores(*demo, examples)


@pytest.mark.parametrize("task", world.TASKS)
def test_it_sees(task, float_scores):
    assert abs(float_scores[task] - STATED[task] / 100) <= margin(STATED[task])


@pytest.mark.parametrize(
    ("settings", "loss"),
    [(Quantization(bits=8), 0.005), (Quantization(recipe="lfm2_4bit"), 0.03)],
    ids=["8 bits", "4 bits"],
)
def test_it_still_sees_when_quantized(settings, loss, tmp_path, examples, float_scores):
    folder = convert("demo", tmp_path / "quantized", settings)
    quantized = scores(*load(folder, dtype="float32"), examples)
    mean = sum(quantized.values()) / len(quantized)
    # one or two answers of 98 more or less are chance
    assert mean >= sum(float_scores.values()) / len(float_scores) - loss - 0.02


def test_it_is_blind_without_pixels(demo, examples):
    """Grey pictures in place of the real ones: nothing but guesses is left.

    To compare, two guesses are left, which tells too little about so few pictures.
    """
    model, processor = demo
    chance = {"describe": 0.1, "count": 0.6, "colour": 0.35, "where": 0.3, "read": 0.1}
    chance |= {"detect": 0.25, "record": 0.5, "choice": 0.8, "call": 0.2}
    blank = {task: [grey(example) for example in examples[task]] for task in chance}
    found = scores(model, processor, blank)
    assert all(found[task] <= limit for task, limit in chance.items()), found


def grey(example):
    pictures = tuple(picture.point(lambda _: 128) for picture in example.pictures)
    return dataclasses.replace(example, pictures=pictures)


@pytest.mark.parametrize("pen", ["svg", "matplotlib"])
def test_it_sees_what_others_draw(pen, demo):
    """Pictures by means that training did not use."""
    least = {"colour": 0.9, "count": 0.9, "detect": 0.8}
    for task, score in least.items():
        found = evaluate.mean(evaluate.evaluate(*demo, task, PICTURES, pen=pen))
        assert found >= score - margin(100 * score), (task, found)


def test_pictures_lie_in_files_in_many_ways(demo, tmp_path):
    """Turned by EXIF, with a palette, transparent, as WebP: the answers stay the same."""
    from PIL import Image

    for number in range(3):
        example = world.make_example("test", number, "colour", large=number == 2)
        [picture], [(question, answer)] = example.pictures, example.turns
        exif = Image.Exif()
        exif[0x0112] = 6  # shown, it is turned by 90 degrees to the right
        picture.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
        picture.quantize(64).save(tmp_path / "palette.png")
        picture.convert("RGBA").save(tmp_path / "alpha.webp", lossless=True)
        for path in sorted(tmp_path.iterdir()):
            assert generate(*demo, question, path, temperature=0.0) == answer, path.name


def test_the_contact_sheet_shows_the_worst(examples):
    chosen = [examples[task][0] for task in ("detect", "compare", "record")]
    answers = ["[]", "the third", chosen[2].turns[0][1]]
    results = [
        evaluate.Result(example, answer, evaluate.score(example, answer))
        for example, answer in zip(chosen, answers, strict=True)
    ]
    assert [result.score for result in results[1:]] == [0.0, 1.0]
    sheet = evaluate.contact_sheet(results * 10)
    assert sheet.size == (6 * evaluate.CELL, 4 * (evaluate.CELL + 60))
    assert len(sheet.getcolors(2**20) or ()) > 20


def test_scores_are_what_they_say():
    asked = (world.make_example("test", number, "detect") for number in range(9))
    right = next(boxes for boxes in map(evaluate.true_boxes, asked) if boxes)
    assert evaluate.box_score(right, right) == 1
    assert evaluate.box_score([], right) == evaluate.box_score(right, []) == 0
    assert evaluate.box_score([*right, *right], right) == pytest.approx(0.5)
    wanted = '{"shapes": [{"kind": "ring", "color": "red", "place": "center"}], "text": ""}'
    assert evaluate.record_score(wanted, wanted) == 1
    assert evaluate.record_score(wanted.replace("red", "blue"), wanted) == 0.75
    assert evaluate.record_score("a red ring", wanted) == 0
    assert evaluate.record_score("[1]", wanted) == 0


def test_the_official_code_answers_the_same(demo, examples):
    """Exported with `--to-hf`, the weights give these answers in transformers."""
    stored = json.loads((ROOT / "tests" / "checkpoints" / "demo_answers.json").read_text())
    for task, answers in stored.items():
        assert evaluate.ask_all(*demo, examples[task][: len(answers)]) == answers, task


def some(examples, each=2):
    return [example for chosen in examples.values() for example in chosen[:each]]


def questions(examples):
    return [world.messages_of(example, example.pictures)[:1] for example in examples]


PLAIN = [task for task in world.TASKS if task != "call"]  # without tools


def test_ways_of_asking_agree(demo, examples):
    """Batches, sessions, chunked reading and a window as long as the prompt change no answer."""
    model, processor = demo
    chosen = some({task: examples[task] for task in PLAIN})
    alone = [
        generate(model, processor, question, temperature=0.0, max_tokens=100)
        for question in questions(chosen)
    ]
    assert evaluate.ask_all(model, processor, chosen, batch_size=5) == alone
    for question, answer in zip(questions(chosen), alone, strict=True):
        assert in_chunks(model, processor, question) == answer
        rotating = generate(
            model,
            processor,
            question,
            temperature=0.0,
            max_tokens=100,
            # room for the prompt, which stays, and for a window beside it
            cache_options=CacheOptions(max_kv_size=512),
        )
        assert rotating == answer


def in_chunks(model, processor, question, size=7):
    """The greedy answer where the prompt goes through the model a few positions at once."""
    prompt = processor(question)
    tokens = []
    for token, _ in generate_step(
        prompt.token_ids,
        model,
        max_tokens=100,
        prefill_step_size=size,
        input_embeddings=model.embed_prompt(prompt),
    ):
        if token == processor.tokenizer.eos_token_id:
            break
        tokens.append(token)
    return processor.decode(tokens, skip_special_tokens=True)


def test_a_session_answers_as_single_questions_do(demo, examples):
    model, processor = demo
    for example in [*examples["describe"][:3], *examples["detect"][:3]]:
        session = Session(model, processor)
        session.see(*example.pictures)
        for question in ("What is in this image?", "How many shapes are there?"):
            told = session.ask(question, sampling=Sampling(temperature=0.0), max_tokens=100)
            single = generate(
                model, processor, question, example.pictures, temperature=0.0, max_tokens=100
            )
            assert told == single


def hearts_told(adapter_path=None):
    """How many unseen pictures with a heart are described exactly."""
    model, processor = load("demo", dtype="float32", adapter_path=adapter_path)
    asked = [world.make_example("test", number, world.NEW_SHAPE) for number in range(40)]
    answers = evaluate.ask_all(model, processor, asked)
    return sum(
        answer == example.turns[0][1] for answer, example in zip(answers, asked, strict=True)
    )


@pytest.mark.slow
def test_a_short_lora_run_teaches_a_new_word(tmp_path):
    """The commands of the README as they stand."""
    assert hearts_told() == 0
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    readme = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    lines = [line for line in readme.splitlines() if line.startswith("python") and "heart" in line]
    assert len(lines) == 3
    for line in lines:
        run = subprocess.run(
            line.replace("python", sys.executable, 1),
            shell=True,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert run.returncode == 0, run.stderr
    assert "heart" in run.stdout
    assert hearts_told(tmp_path / "heart") >= 32


def test_the_folder_is_small_and_complete():
    folder = ROOT / "mlx_lfm2vl" / "demo"
    assert (folder / "model.safetensors").stat().st_size <= 8_000_000
    assert set(STATED) == set(world.TASKS)
    model, _ = load("demo")
    assert 1e6 <= sum(array.size for _, array in tree_flatten(model.parameters())) <= 3e6


def test_a_wheel_holds_the_model_and_needs_no_network(tmp_path):
    built = tmp_path / "source"
    shutil.copytree(
        ROOT, built, ignore=shutil.ignore_patterns(".git", ".venv", "tests", "*.egg-info", "build")
    )
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "."],
        cwd=built,
        check=True,
        capture_output=True,
    )
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "installed")
    package = tmp_path / "installed" / "mlx_lfm2vl"
    assert json.loads((package / "measuring" / "reference.json").read_text())["cases"]
    # no file of this repository, no proxy, no hub
    environment = {
        **os.environ,
        "PYTHONPATH": str(tmp_path / "installed"),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "nothing"),
    }
    run = subprocess.run(
        [
            *(sys.executable, "-m", "mlx_lfm2vl.generate", "--model", "demo"),
            *("--image", str(ROOT / "examples" / "demo" / "picture.png")),
            *("--prompt", "What is in this image?", "--json"),
        ],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["text"] == picture_answer()


def test_two_pictures_are_told_apart_in_training():
    begun = set()
    for number in range(40):
        example = world.make_example("train", number, "compare", turns=4)
        for question, answer in example.turns:
            for place, scene in zip(("first", "second"), example.scenes, strict=True):
                if question == f"What is in the {place} picture?":
                    assert answer == world.describe(scene)
                    begun.add(place)
    assert begun == {"first", "second"}


@pytest.mark.parametrize("options", ["--turns 0", "--turns -1"])
def test_examples_without_questions_are_refused(options, tmp_path, monkeypatch, capsys):
    output = tmp_path / "world"
    monkeypatch.setattr("sys.argv", ["world.py", *options.split(), "--output", str(output)])
    with pytest.raises(SystemExit):
        world.main()
    assert "must be 1 or more" in capsys.readouterr().err
    assert not output.exists()


def test_the_picture_is_of_the_world():
    from PIL import Image

    drawn = world.make_example("picture", PICTURE, "describe", large=True).pictures[0]
    stored = Image.open(ROOT / "examples" / "demo" / "picture.png")
    assert stored.tobytes() == drawn.tobytes()


def picture_answer():
    """What stands in examples/demo/picture.png."""
    return world.describe(world.make_example("picture", PICTURE, "describe", large=True).scenes[0])


PICTURE = 14441


def test_make_demo_in_a_fresh_clone(tmp_path):
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    # this environment in place of one that would have to be downloaded
    (clone / ".venv").mkdir()
    for name in ("bin", "lib", "pyvenv.cfg"):
        (clone / ".venv" / name).symlink_to(Path(sys.prefix) / name)
    for name in (f"python-{platform.python_version()}", "demo"):
        (clone / ".venv" / name).touch()
    run = subprocess.run(
        ["make", "demo", f"PYTHON={sys.executable}"],
        cwd=clone,
        env={**os.environ, "PYTHONPATH": str(clone)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert picture_answer() in run.stdout
    from PIL import Image

    boxes = Image.open(clone / "boxes.png")
    picture = Image.open(clone / "examples" / "demo" / "picture.png")
    zoom = boxes.width // picture.width
    assert boxes.size == (picture.width * zoom, picture.height * zoom)
    plain = picture.convert("RGB").resize(boxes.size)
    changed = np.any(np.asarray(boxes) != np.asarray(plain), axis=-1).mean()
    assert 0.005 < changed < 0.2
    mx.clear_cache()
