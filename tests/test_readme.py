"""Every block of the README runs as it stands, with a small checkpoint in place of the large."""

import importlib
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
from PIL import Image

from mlx_lfm2vl import Quantization, convert

from .checkpoints.pictures import picture
from .films import write_film
from .serving import serving, until

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (
        ROOT / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
        ROOT / "mlx_lfm2vl" / "demo" / "README.md",
    )
}
BLOCKS = {
    name: re.findall(r"^```(\w+)\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    for name, page in PAGES.items()
}
DEFAULT_MODEL = "LiquidAI/LFM2.5-VL-450M"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("photo.jpg", "before.jpg", "after.jpg"):
        Image.fromarray(picture(100, 60, len(name))).save(tmp_path / name)
    write_film(tmp_path / "film.mp4", images=9)
    (tmp_path / "photos").mkdir()
    shutil.copy(tmp_path / "photo.jpg", tmp_path / "photos" / "a.jpg")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "bin").mkdir()
    shutil.copy(shutil.which("true"), tmp_path / "bin" / "say")  # which macOS has
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", [name for name in PAGES if "```python" in PAGES[name]])
def test_python_blocks_run_in_order(page, folder, fixtures, capsys):
    names = {}
    with serving(fixtures / "v5") as served:
        for block in (block for kind, block in BLOCKS[page] if kind == "python"):
            code = block.replace(DEFAULT_MODEL, str(fixtures / "v5"))
            code = code.replace("http://127.0.0.1:8080", served.url)
            exec(compile(code, "README.md", "exec"), names)
    assert capsys.readouterr().out


def commands(page):
    return [
        line
        for kind, block in BLOCKS[page]
        if kind == "sh"
        for line in block.splitlines()
        if line.strip() and not line.startswith("#")
    ]


COMMANDS = list(dict.fromkeys(line for page in PAGES for line in commands(page)))


# run as they stand in test_demo.py and in test_doctor.py
ELSEWHERE = [line for line in COMMANDS if "heart" in line or "doctor" in line]
SERVE = [line for line in COMMANDS if "mlx_lfm2vl.serve" in line]
WATCH = [line for line in COMMANDS if "mlx_lfm2vl.watch" in line and "--dry-run" not in line]


@pytest.mark.parametrize("line", SERVE)
def test_servers_answer_until_they_are_told_to_end(line):
    words = line.replace("python -m", f"exec {sys.executable} -m")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "BROWSER": "true"}
    server = subprocess.Popen(
        f"{words} --model demo --port 0", shell=True, stderr=subprocess.PIPE, text=True,
        env=environment,
    )  # fmt: skip
    port = re.search(r":(\d+) ", server.stderr.readline())[1]
    until(lambda: httpx2.get(f"http://127.0.0.1:{port}/health").status_code == 200)
    server.terminate()
    assert server.wait(30) == 0
    server.stderr.close()


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs a line: in this process, or by a shell if it needs one."""

    def call(line):
        if set("|<>") & set(line):
            line = line.replace("python -m", f"{sys.executable} -m")
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            done = subprocess.run(line, shell=True, capture_output=True, text=True, env=environment)
            assert done.returncode == 0, done.stderr
            return done.stdout
        python, dash, module, *arguments = shlex.split(line)
        assert (python, dash) == ("python", "-m")
        monkeypatch.setattr("sys.stdin", io.StringIO("/quit\n"))
        command = importlib.import_module(module.replace("mlx_lfm2vl.", "mlx_lfm2vl.cli."))
        with pytest.raises(SystemExit) as exit_info:
            command.main(arguments)
        captured = capsys.readouterr()
        assert exit_info.value.code in (None, 0), captured.err
        return captured.out

    return call


@pytest.mark.usefixtures("small_matrix")
@pytest.mark.parametrize(
    "line",
    [line for line in COMMANDS if "python -m" in line and line not in (*ELSEWHERE, *SERVE, *WATCH)],
)
def test_commands_run(line, run, folder, fixtures):
    """As they stand, but for the model and the length of endless answers."""
    model, more = "", ""
    if "convert" in line:
        line = line.replace(DEFAULT_MODEL, str(fixtures / "wide"))
        # most of a small model stays in floating point
        line = line.replace("my-model", str(fixtures / "wide")).replace("4.5", "12")
        if "lfm2-hf" in line:
            convert(fixtures / "wide", "lfm2-4bit", Quantization())
    elif "train" in line or "fuse" in line or "adapter" in line:
        model = f" --model {fixtures / 'v5'}"
        prepare_training(line, run, folder, model)
        more = {"train": " --iters 2", "generate": " -m 20"}.get(line.split()[2].split(".")[1], "")
    elif "benchmark" in line:
        model, more = f" --model {fixtures / 'v5'}", " -m 3 --rounds 1"
    elif "--model demo" not in line:
        # the demo model ends its answers, but not those to questions that it does not know
        model, more = " --model demo", "" if "detect" in line else " -m 60"
    said = run(re.sub(r"(python -m \S+)", rf"\1{model}{more}", line))
    written = [*folder.glob("*.json"), *folder.glob("*.jsonl")]
    assert len(said) > 1 or any(file.stat().st_size > 1 for file in written)


@pytest.mark.parametrize("line", WATCH)
def test_commands_that_watch_give_an_answer(line, folder, fixtures, display):
    """As they stand, but for the model, and for the camera, which no machine of tests has."""
    more = "" if "--detect" in line else " -m 2"
    line = line.replace("--source camera", "--source lavfi:testsrc=duration=9 --realtime")
    line = line.replace("--model demo", "")
    command = f"exec {sys.executable} -m mlx_lfm2vl.watch --model {fixtures / 'v5'}{more}"
    process = subprocess.Popen(
        line.replace("python -m mlx_lfm2vl.watch", command), shell=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    said = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert ", 100.0% changed, " in said, told
    assert process.returncode in (0, 130), told
    assert re.search(r"\d+ frames?, \d+ questions?, \d+ dropped$", told), told


def prepare_training(line, run, folder, model):
    """The samples that the README shows, and adapters where a command reads some."""
    sample = next(block for kind, block in BLOCKS["README.md"] if kind == "json")
    (folder / "samples.jsonl").write_text(sample * 4)
    train = next(command for command in COMMANDS if "mlx_lfm2vl.train" in command)
    if line != train:
        run(re.sub(r"(python -m \S+)", rf"\1{model} --iters 1", train))


def test_other_commands_are_those_that_ci_runs():
    others = [line for line in commands("README.md") if "python -m" not in line]
    assert others[-1] == "make test"
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert all(line.startswith(("pip install ", "make demo")) for line in others[:-1])


def test_every_link_into_the_repository_exists():
    for name, page in PAGES.items():
        folder = (ROOT / name).parent
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page):
            assert (folder / target).exists(), target
        for target in re.findall(r"`((?:examples|tests|docs)/[\w./]+)`", page):
            assert (ROOT / target).exists(), target


def test_length():
    assert 150 <= len(README.splitlines()) <= 250
