"""Folder mode as its user sees it: killed, resumed, shared, with bad files among the good."""

import contextlib
import fcntl
import hashlib
import json
import os
import pty
import random
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
import zlib
from pathlib import Path

import pytest
from PIL import Image, ImageFile

from mlx_lfm2vl import ImageError, generate
from mlx_lfm2vl.cli import batch as folder_module
from mlx_lfm2vl.cli.batch import build_parser, main
from mlx_lfm2vl.prompts import image_source
from mlx_lfm2vl.prompts.image_source import load_image
from mlx_lfm2vl.serving.folder import LOOK_AHEAD, Lines, Task, find_images, look_ahead

from .checkpoints.pictures import picture

EXAMPLES = Path(__file__).parents[1] / "examples"
FIXTURES = Path(__file__).parent / "checkpoints"
FLAGS = ("--model", FIXTURES / "v5", "--prompt", "What?", "--temp", "0", "--max-tokens", "2")
MANY = 90


def make_images(folder, count):
    rng = random.Random(count)
    (folder / "deep" / "er").mkdir(parents=True)
    for number in range(count):
        place = folder / ("", "deep", "deep/er")[number % 3]
        image = Image.fromarray(picture(rng.randint(20, 60), rng.randint(20, 60), number))
        image.save(place / f"{number:03}.{('png', 'jpg', 'WEBP', 'gif')[number % 4]}")
    return folder


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("many") / "images", MANY)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("few") / "images", 7)


@pytest.fixture(scope="module")
def answers(many, tmp_path_factory):
    """What one process that nobody disturbs says about each image."""
    out = tmp_path_factory.mktemp("answers") / "out.jsonl"
    with pytest.raises(SystemExit, match="0"):
        main([str(part) for part in (*FLAGS, "--images", many, "--output", out)])
    return by_image(out)


@pytest.fixture
def run(capsys):
    """Runs folder mode in this process; returns (exit code, stderr)."""

    def call(*arguments, flags=FLAGS):
        with pytest.raises(SystemExit) as exit_info:
            main([str(part) for part in (*flags, *arguments)])
        captured = capsys.readouterr()
        assert captured.out == ""
        return exit_info.value.code, captured.err

    return call


def command(*arguments):
    return [sys.executable, "-m", "mlx_lfm2vl.batch", *map(str, (*FLAGS, *arguments))]


def entries(path):
    data = path.read_bytes()
    assert data == b"" or data.endswith(b"\n")
    return [json.loads(line) for line in data.splitlines()]


def by_image(path):
    found = entries(path)
    result = {entry["image"]: entry for entry in found}
    assert len(result) == len(found), "an image has two lines"
    return result


def lines_in(folder):
    count = 0
    for path in folder.iterdir():
        # a part may be gathered, and so vanish, at any moment
        with contextlib.suppress(FileNotFoundError):
            count += path.read_bytes().count(b"\n")
    return count


def kill_after(process, folder, lines):
    """Kills a run and all its processes as soon as it has written so many lines."""
    deadline = time.monotonic() + 60
    while lines_in(folder) < lines:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline, "it writes nothing"
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def start(arguments):
    return subprocess.Popen(
        arguments,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
    )


def test_killed_twice_and_resumed(many, answers, tmp_path):
    out = tmp_path / "out.jsonl"
    rng = random.Random(1)
    for more in (rng.randint(5, 20), rng.randint(25, 45)):
        process = start(command("--images", many, "--output", out))
        kill_after(process, tmp_path, more)
    # what a kill between two pages would leave
    with out.open("ab") as file:
        file.write(out.read_bytes().splitlines()[0][: rng.randint(1, 80)])
    arguments = command("--images", many, "--output", out)
    last = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert " were done before" in last.stderr
    assert by_image(out) == answers


def test_shards_together_are_the_whole(run, many, answers, tmp_path):
    found = {}
    for number in (1, 2, 3):
        out = tmp_path / f"{number}.jsonl"
        assert run("--images", many, "--output", out, "--shard", f"{number}/3")[0] == 0
        assert len(by_image(out)) == MANY / 3
        found |= by_image(out)
    assert found == answers
    joined = tmp_path / "joined.jsonl"
    joined.write_bytes(b"".join(sorted((tmp_path / f"{n}.jsonl").read_bytes() for n in (1, 2, 3))))
    code, err = run("--images", many, "--output", joined)
    assert (code, f"{MANY} were done before" in err) == (0, True)
    for wrong in ("0/2", "3/2", "1", "a/b"):
        with pytest.raises(SystemExit):
            build_parser().parse_args(["--images", "x", "-o", "y", "-p", "z", "--shard", wrong])


def test_rows_answer_together(many, tmp_path, run, work):
    """Counted: 24 pictures, eight at a time, take at most a third of the steps of one at a time."""
    images = sorted(str(path) for path in many.rglob("*.*"))[:24]
    steps = {}
    for size in (1, 8):
        work.clear()
        out = tmp_path / f"{size}.jsonl"
        flags = (*FLAGS[:-1], 12, "--batch-size", size)
        assert run("--images", *images, "--output", out, flags=flags)[0] == 0
        steps[size] = len(work.steps)
    assert by_image(tmp_path / "1.jsonl") == by_image(tmp_path / "8.jsonl")
    assert max(work.steps) == 8
    assert steps[8] <= steps[1] / 3


@pytest.mark.parametrize("torn", [b'{"im', b'{"image": "x', b"\0\0\0"])
def test_a_torn_line_is_cut_off(torn, run, few, tmp_path):
    out = tmp_path / "out.jsonl"
    assert run("--images", few, "--output", out)[0] == 0
    whole = out.read_bytes()
    out.write_bytes(whole + torn)
    assert run("--images", few, "--output", out)[0] == 0
    assert out.read_bytes() == whole


@pytest.mark.parametrize("text", ["My notes", "My notes\n", '{"a": 1}\n', "[]\n", "\n"])
def test_a_file_of_the_users_is_left_alone(text, run, few, tmp_path):
    out = tmp_path / "notes.txt"
    out.write_text(text)
    code, err = run("--images", few, "--output", out)
    assert code == 2
    assert f"{out}, line 1 is no entry of this program; pass another --output" in err
    assert out.read_text() == text


@pytest.mark.parametrize(
    "other",
    [
        ("--prompt", "Why?"),
        ("--system", "Be brief."),
        ("--max-tokens", 3),
        ("--temp", 0.5),
        ("--seed", 1),
        ("--dtype", "float16"),
        ("--revision", "main"),
        ("--no-thumbnail",),
        ("--max-image-tokens", 100),
    ],
)
def test_other_settings_are_refused(other, run, few, tmp_path):
    out = tmp_path / "out.jsonl"
    assert run("--images", few, "--output", out)[0] == 0
    whole = out.read_bytes()
    code, err = run("--images", few, "--output", out, *other)
    assert code == 2
    assert err.count("\n") == 1
    assert str(out) in err
    assert "pass another --output" in err
    assert out.read_bytes() == whole


def test_answers_are_those_of_generate(run, few, tmp_path, loaded):
    out = tmp_path / "out.jsonl"
    flags = ("--model", FIXTURES / "v5", "-p", "What?", "-m", 9, "--seed", 7, "--no-thumbnail")
    assert run("--images", few, "--output", out, flags=flags)[0] == 0
    options = build_parser().parse_args([*map(str, flags), "--images", "x", "-o", "y"])
    assert options.use_thumbnail is False
    assert len(entries(out)) == 7
    for entry in entries(out):
        path = Path(entry["image"])
        prompt = loaded()[1]("What?", path)
        assert entry["text"] == generate(*loaded(), "What?", path, max_tokens=9, seed=7)
        assert entry["digest"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert entry["prompt_tokens"] == len(prompt.token_ids)
        assert entry["image_tokens"] == prompt.images[0].image_tokens
        assert 1 <= entry["generation_tokens"] <= 9
        assert entry["finish_reason"] in ("stop", "length")


def test_system_message_and_image_switches_reach_the_model(run, tmp_path, loaded):
    photo = tmp_path / "photo.png"
    Image.fromarray(picture(200, 130)).save(photo)

    def tokens(*more):
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        assert run("--images", photo, "--output", out, *more)[0] == 0
        return entries(out)[0]["prompt_tokens"]

    assert tokens() == len(loaded()[1]("What?", photo).token_ids)
    assert tokens("--no-image-splitting") < tokens() < tokens("--system", "Be brief.")


def test_unreadable_files_are_recorded(run, few, tmp_path, monkeypatch):
    folder, out = tmp_path / "images", tmp_path / "out.jsonl"
    shutil.copytree(few, folder)
    good = (folder / "000.png").read_bytes()
    (folder / "cut.png").write_bytes(good[: len(good) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.tiff").write_text("no image at all")
    (folder / "lost.png").write_bytes(good)
    open_file = image_source._open_file

    def refuse(path):
        if Path(path).name == "lost.png":
            raise PermissionError(13, "Permission denied")
        return open_file(path)

    monkeypatch.setattr(image_source, "_open_file", refuse)
    os.mkfifo(folder / "pipe.png")
    (folder / "endless.png").symlink_to("/dev/zero")
    for _ in range(2):  # the second time there is nothing to do
        code, err = run("--images", folder / "*", "--output", out)
        assert code == 0
        found = by_image(out)
        assert len(found) == 13
    assert "13 were done before" in err
    bad = {Path(name).name: entry for name, entry in found.items() if "error" in entry}
    assert set(bad) == {
        *{"cut.png", "empty.jpg", "text.tiff", "lost.png"},
        *{"pipe.png", "endless.png"},
    }
    assert bad["lost.png"]["digest"] is None
    assert "Permission denied" in bad["lost.png"]["error"]
    assert all("\n" not in entry["error"] and "text" not in entry for entry in bad.values())
    monkeypatch.undo()
    code, err = run("--images", folder / "*", "--output", out)
    assert "1 images answered" in err, "a file that can be read now is read"


def test_damage_that_pillow_reports_in_its_own_ways_is_recorded(run, few, tmp_path, monkeypatch):
    load, raised = ImageFile.ImageFile.load, []

    def damaged(image):
        if len(raised) < 4:
            kind = (IndexError, zlib.error, ZeroDivisionError, struct.error)[len(raised)]
            raised.append(kind)
            raise kind("of\nsome kind")
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", damaged)
    out = tmp_path / "out.jsonl"
    assert run("--images", few, "--output", out)[0] == 0
    errors = [entry["error"] for entry in entries(out) if "error" in entry]
    assert errors == ["image is damaged: of some kind"] * 4
    assert len(by_image(out)) == 7


def test_a_photo_is_turned_upright_once(run, tmp_path, loaded):
    image = Image.fromarray(picture(60, 25))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    image.rotate(-90, expand=True).save(tmp_path / "upright.png")
    out = tmp_path / "out.jsonl"
    assert run("--images", tmp_path, "--output", out, "--max-tokens", 9)[0] == 0
    for entry in entries(out):
        assert entry["text"] == generate(
            *loaded(), "What?", entry["image"], temperature=0, max_tokens=9
        )
    tall = loaded()[1]("What?", tmp_path / "upright.png").spatial_shapes
    assert loaded()[1]("What?", load_image(tmp_path / "turned.jpg")).spatial_shapes == tall


def test_a_changed_file_is_a_new_entry(run, few, tmp_path):
    folder, out = tmp_path / "images", tmp_path / "out.jsonl"
    shutil.copytree(few, folder)
    shutil.copy(folder / "000.png", folder / "copy.png")
    assert run("--images", folder, "--output", out)[0] == 0
    before = entries(out)
    assert len(before) == 8, "two files with one content are two entries"
    Image.new("RGB", (40, 30), "red").save(folder / "000.png")
    assert run("--images", folder, "--output", out)[0] == 0
    after = entries(out)
    assert after[:8] == before
    assert [entry["image"] for entry in after[8:]] == [str(folder / "000.png")]
    assert (
        after[8]["digest"] != next(e for e in before if e["image"] == after[8]["image"])["digest"]
    )


def test_heic(run, tmp_path):
    heif = pytest.importorskip("pillow_heif", reason="needs the extra heic")
    out = tmp_path / "out.jsonl"
    for number in range(4):
        image = Image.fromarray(picture(64, 48, number))
        heif.from_pillow(image).save(tmp_path / f"{number}.HEIC", quality=-1)
    assert run("--images", tmp_path, "--output", out)[0] == 0
    assert [sorted(entry) for entry in entries(out)] == [sorted(entries(out)[0])] * 4
    assert "text" in entries(out)[0]


def test_names_in_any_script(run, few, tmp_path):
    names = [
        "Größe 1.png",
        "写真.png",
        'quo"te\n.png',
        b"caf\xe9.png".decode(errors="surrogateescape"),
    ]
    made = []
    for name in names:
        try:
            shutil.copy(few / "000.png", tmp_path / name)
        except OSError:  # a disk that takes only UTF-8
            continue
        made.append(str(tmp_path / name))
    out = tmp_path / "out.jsonl"
    assert run("--images", tmp_path, "--output", out)[0] == 0
    assert run("--images", tmp_path, "--output", out)[0] == 0
    assert set(by_image(out)) == set(made)
    assert len(made) >= 3


def test_what_counts_as_an_image(few, tmp_path, monkeypatch):
    monkeypatch.chdir(few)
    Path(tmp_path / "noname").write_bytes(b"")
    everything = find_images(["."])
    assert len(everything) == 7
    assert everything == sorted(everything)
    assert find_images([".", "./deep", "000.png"]) == everything
    assert find_images(["*.png"]) == ["000.png"]
    assert find_images(["**/*.png"]) == ["000.png", "deep/004.png"]
    assert find_images(["dee*"]) == [name for name in everything if name.startswith("deep")]
    assert find_images([str(tmp_path / "noname")]) == [str(tmp_path / "noname")]
    hidden = tmp_path / "hidden"
    (hidden / ".cache").mkdir(parents=True)
    for name in ("._a.jpg", ".cache/b.jpg", "notes.txt"):
        (hidden / name).write_bytes(b"x")
    for given in (str(hidden), "none*.jpg", "gone.jpg", str(hidden / "notes*")):
        with pytest.raises(ImageError, match=r"holds no image|does not exist"):
            find_images([given])


def test_bad_input_is_one_line(run, few, tmp_path):
    out = tmp_path / "out.jsonl"
    (tmp_path / "empty").mkdir()
    for arguments, words in (
        (("--images", tmp_path / "empty", "-o", out), "holds no image"),
        (("--images", "gone.jpg", "-o", out), "gone.jpg does not exist"),
        (("--images", few, "-o", tmp_path / "no" / "out.jsonl"), "No such file or directory"),
        (("--images", few, "-o", tmp_path), "Is a directory"),
        (("--images", few, "-o", out, "--prompt", " "), "the prompt is empty"),
        (("--images", few, "-o", out, "--temp", "-1"), "temperature is -1.0"),
        (("--images", few, "-o", out, "--min-image-tokens", 999), "max_image_tokens is"),
        (("--images", few, "-o", out, "--model", tmp_path / "gone"), "does not exist"),
    ):
        code, err = run(*arguments)
        assert code == 2
        assert err.startswith("mlx-lfm2vl-batch: error: ")
        assert err.count("\n") == 1
        assert words in err


def test_two_runs_do_not_write_one_file(run, few, tmp_path):
    out = tmp_path / "out.jsonl"
    with Lines(out):
        code, err = run("--images", few, "--output", out)
    assert code == 2
    assert "is being written by another run" in err


def test_ctrl_c_leaves_whole_lines(many, tmp_path):
    out = tmp_path / "out.jsonl"
    arguments = command("--images", many, "--output", out)
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE)
    while lines_in(tmp_path) < 5:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.strip() == b""
    assert 5 <= len(by_image(out)) < MANY


def test_ctrl_c_that_python_lost_is_raised_again():
    with folder_module._ctrl_c() as check:
        check()
        with contextlib.suppress(KeyboardInterrupt):  # as a finalizer would
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            check()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_terminal_sees_a_bar_and_a_pipe_one_line(few, tmp_path):
    arguments = command("--images", few, "--output", tmp_path / "out.jsonl")
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    with subprocess.Popen(arguments, stderr=writer) as process:
        os.close(writer)
        shown = b""
        while True:
            try:
                piece = os.read(reader, 4096)
            except OSError:  # Linux, when the other side has gone
                break
            if not piece:
                break
            shown += piece
    os.close(reader)
    assert process.returncode == 0
    assert b"7/7" in shown
    assert b"image/s" in shown
    again = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert again.stdout == ""
    assert again.stderr.startswith("0 images answered")
    assert again.stderr.count("\n") == 1


def test_threads_prepare_a_few_images_ahead_without_mlx(few, loaded, monkeypatch):
    import mlx.core as mx

    processor = loaded()[1]
    taken, threads = [], set()
    call = type(processor).__call__

    def watch(self, messages, images, **options):
        threads.add(threading.current_thread().name)
        taken.append(1)
        return call(self, messages, images, **options)

    def refuse(*_, **__):
        raise AssertionError("MLX was called in a thread")

    monkeypatch.setattr(type(processor), "__call__", watch)
    for name in ("array", "eval", "zeros", "concatenate"):
        monkeypatch.setattr(mx, name, refuse)
    options = build_parser().parse_args(["--images", "x", "-o", "y", "-p", "What?"])
    from mlx_lfm2vl.cli.batch import _task

    task = _task(options)
    assert isinstance(task, Task)
    images = find_images([str(few)]) * 5
    prepared = look_ahead(task, processor, images, set(), LOOK_AHEAD)
    next(prepared)
    time.sleep(0.3)
    assert len(taken) == LOOK_AHEAD + 1, "bounded"
    assert [image.path for image in prepared] == images[1:]
    assert all(name.startswith("prepare") for name in threads)


def test_preparing_imports_no_mlx():
    code = "import sys, mlx_lfm2vl.prompts.processor; assert 'mlx.core' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_says_what_it_must():
    text = " ".join(build_parser().format_help().split())
    for part in ("--images", "--output", "changed file", "old line stays", ".heic", "--shard"):
        assert part in text


def test_example(few, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    shutil.copy(few / "000.png", folder)
    (folder / "notes.txt").write_text("no image")
    arguments = ["--model", FIXTURES / "v5", "--max-tokens", "3"]
    run = subprocess.run(
        [sys.executable, EXAMPLES / "caption_folder.py", folder, *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.startswith("000.png: ")
    assert "notes.txt is not an image of a known format" in run.stdout
