"""Every block of the README runs as it stands, with a small checkpoint in place of the large."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from mlx_lfm2vl import Quantization, convert

from .checkpoints.pictures import picture

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
DEFAULT_MODEL = "LiquidAI/LFM2.5-VL-450M"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("photo.jpg", "before.jpg", "after.jpg"):
        Image.fromarray(picture(100, 60, len(name))).save(tmp_path / name)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_python_blocks_run_in_order(folder, fixtures, capsys):
    names = {}
    blocks = [block for kind, block in BLOCKS if kind == "python"]
    assert len(blocks) >= 6
    for block in blocks:
        code = block.replace(DEFAULT_MODEL, str(fixtures / "v5"))
        exec(compile(code, "README.md", "exec"), names)
    out = capsys.readouterr().out
    assert "tok/s" in out


COMMANDS = [
    line
    for kind, block in BLOCKS
    if kind == "sh"
    for line in block.splitlines()
    if line.strip() and not line.startswith("#")
]


# run as they stand in test_demo.py
NEW_WORD = [line for line in COMMANDS if "heart" in line]


@pytest.mark.parametrize(
    "line", [line for line in COMMANDS if "python -m" in line and line not in NEW_WORD]
)
def test_commands_run(line, folder, fixtures):
    """As they stand, but for the model and the length of endless answers."""
    if "convert" in line:
        line = line.replace("LiquidAI/LFM2.5-VL-450M", str(fixtures / "wide"))
        line = line.replace("python -m", f"{sys.executable} -m", 1)
        if "lfm2-hf" in line:
            convert(fixtures / "wide", "lfm2-4bit", Quantization())
    elif "train" in line or "fuse" in line or "adapter" in line:
        line = prepare_training(line, folder, fixtures)
    else:
        line = re.sub(
            r"python -m (\S+)", rf"{sys.executable} -m \1 --model {fixtures / 'v5'} -m 200", line
        )
    (folder / "photos").mkdir()
    (folder / "photos" / "a.jpg").write_bytes((folder / "photo.jpg").read_bytes())
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path}
    run = subprocess.run(
        line, shell=True, capture_output=True, text=True, env=environment, input="/quit\n"
    )
    assert run.returncode == 0, run.stderr
    assert "Traceback" not in run.stderr
    written = [*folder.glob("*.json"), *folder.glob("*.jsonl")]
    assert len(run.stdout) > 1 or any(file.stat().st_size > 1 for file in written)


def prepare_training(line, folder, fixtures):
    """The samples that the README shows, and adapters where a command reads some."""
    sample = next(block for kind, block in BLOCKS if kind == "json")
    (folder / "samples.jsonl").write_text(sample * 4)
    train = next(command for command in COMMANDS if "mlx_lfm2vl.train" in command)

    def with_model(command, *more):
        added = " ".join(["--model", str(fixtures / "v5"), *more])
        return re.sub(r"python -m (\S+)", rf"{sys.executable} -m \1 {added}", command)

    if line == train:
        return with_model(train, "--iters", "2")
    subprocess.run(with_model(train, "--iters", "1"), shell=True, check=True, capture_output=True)
    return with_model(line)


def test_other_commands_are_those_that_ci_runs():
    others = [line for line in COMMANDS if "python -m" not in line and line not in NEW_WORD]
    assert others[-1] == "make test"
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert all(line.startswith(("pip install ", "make demo")) for line in others[:-1])


def test_every_link_into_the_repository_exists():
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    named = re.findall(r"`((?:examples|tests)/[\w./]+)`", README)
    assert targets
    for target in targets + named:
        assert (ROOT / target).exists(), target


def test_length():
    assert 150 <= len(README.splitlines()) <= 250
