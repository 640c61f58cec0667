"""A run that is killed at any moment: nothing is lost, and nothing is left behind."""

import csv
import json
import random
import signal
import subprocess
import sys
import time

import mlx.core as mx
import numpy as np
import pytest

from mlx_lfm2vl import load
from mlx_lfm2vl.cli.train import main
from mlx_lfm2vl.training.run import LOG
from mlx_lfm2vl.training.trainer import STATE_ARRAYS, checkpoints

from .helpers import FIXTURES, FLAGS, answer, make_data, user, write_lines

STEPS = 31
NOTES = ".notes"  # hidden, but the user's
MEASURED = ("step", "loss", "learning_rate", "grad_norm", "validation_loss")


def start(data, output, *arguments):
    flags = ("--model", FIXTURES / "v5", "--fine-tune-type", "full", "--train-parts", "projector")
    flags = (*flags, "--data", data, "--validation", data, "--batch-size", 1, "--iters", STEPS)
    flags = (*flags, "--save-every", 3, "--steps-per-report", 2, "--steps-per-eval", 5)
    flags = (*flags, "--output", output, *arguments)
    command = [sys.executable, "-m", "mlx_lfm2vl.train", *map(str, flags)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def rows_of(output):
    with (output / LOG).open(newline="") as file:
        return [tuple(row[name] for name in MEASURED) for row in csv.DictReader(file)]


def check(output, expected):
    """What a killed run leaves is whole: log, checkpoints, result."""
    rows = rows_of(output) if (output / LOG).exists() else []
    assert rows == expected[: len(rows)]
    done = checkpoints(output)
    for folder in done:
        state = json.loads((folder / "training_state.json").read_text())
        assert folder.name == f"checkpoint-{state['step']:06}"
        for name in (STATE_ARRAYS, "model.safetensors"):
            mx.eval(mx.load(str(folder / name)))
    return int(done[-1].name.removeprefix("checkpoint-")) if done else 0


def check_end(output, whole):
    """The result and the log are those of a run that nobody killed, and nothing else is left."""
    assert rows_of(output) == rows_of(whole)
    ours, theirs = ({path.name for path in folder.iterdir()} for folder in (output, whole))
    assert ours - {NOTES} == theirs
    first, second = (mx.load(str(folder / "model.safetensors")) for folder in (output, whole))
    assert all((np.array(first[name]) == np.array(second[name])).all() for name in second)


@pytest.mark.parametrize("kills", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_again_and_again(kills, tmp_path):
    entries = [{"messages": [user("How many?"), answer(f"{i} cats.")]} for i in range(5)]
    data, whole = write_lines(tmp_path / "data.jsonl", entries), tmp_path / "whole"
    with start(data, whole) as process:
        said = process.stderr.read()
    assert process.returncode == 0, said
    expected = rows_of(whole)
    due = {n for n in range(1, STEPS + 1) if n % 2 == 0 or n % 5 == 0 or n == STEPS}
    assert [int(row[0]) for row in expected] == sorted(due)

    chance, killed, moved, runs = random.Random(0), 0, 0, 0
    while killed < kills:
        # a run that ends too soon makes room for another
        output, before = tmp_path / f"out-{runs}", 0
        output.mkdir()
        runs += 1
        returned = None
        while returned != 0:
            with start(data, output, "--resume") as process:
                if killed < kills:
                    time.sleep(chance.uniform(0.25, 0.75))
                    process.send_signal(signal.SIGKILL)
                said = process.stderr.read()
            returned = process.returncode
            assert returned in (0, -signal.SIGKILL), said
            killed += returned != 0
            after = check(output, expected)
            assert after >= before
            moved += after > before
            before = after
            if (output / LOG).exists():
                (output / NOTES).write_text("mine")
        check_end(output, whole)
        assert (output / NOTES).read_text() == "mine"
    assert moved > 0, "all were killed before they did anything"


def wait_for(path, process):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "it never comes"
        time.sleep(0.01)


BLOCKED = """
import sys, time
from pathlib import Path
from mlx_lfm2vl.cli import train as train_cli
from mlx_lfm2vl.training import metrics
from mlx_lfm2vl.training import run as run_module
from mlx_lfm2vl.training import trainer as trainer_module
from mlx_lfm2vl.training import trainer as train

write = train.write_result

def blocked(model, adapter_config, folder, source):
    write(model, adapter_config, folder, source)
    if "checkpoint-000004" in folder.name:
        Path(sys.argv[1]).touch()
        time.sleep(600)

train.write_result = blocked
train_cli.main(sys.argv[2:])
"""


def test_killed_while_saving(tmp_path):
    data, whole = make_data(tmp_path), tmp_path / "whole"
    output, mark = tmp_path / "out", tmp_path / "mark"
    arguments = [str(part) for part in (mark, "--data", data, *FLAGS, "--output", output)]
    with subprocess.Popen(
        [sys.executable, "-c", BLOCKED, *arguments], stderr=subprocess.PIPE, text=True
    ) as process:
        wait_for(mark, process)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    hidden = [path for path in output.iterdir() if path.name.startswith(".checkpoint-000004.")]
    assert len(hidden) == 1
    assert [path.name for path in checkpoints(output)] == ["checkpoint-000002"]
    load(output / "checkpoint-000002", dtype="float32", lazy=False)
    for arguments in (("--output", whole), ("--output", output, "--resume")):
        with pytest.raises(SystemExit, match="0"):
            main([str(part) for part in ("--data", data, *FLAGS, *arguments)])
    check_end(output, whole)
