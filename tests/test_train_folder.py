"""The folder of a run: begun again, resumed, full, in use, and what stays in it."""

import json
import os
import resource
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest

from mlx_lfm2vl.cli.train import main
from mlx_lfm2vl.training import run as run_module
from mlx_lfm2vl.training.run import LOG, is_log
from mlx_lfm2vl.training.trainer import Trainer, checkpoints

from .helpers import FLAGS, log_of, make_data, result_of, same

MEASURED = ("step", "loss", "learning_rate", "grad_norm", "validation_loss", "metric")
# reports fall on steps 3, 4 and 6, checkpoints on 2, 4 and 6
UNEVEN = ("--steps-per-report", 3, "--steps-per-eval", 4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def run(capsys, data):
    """Runs the command line in this process; returns (exit code, stderr)."""

    def call(*arguments):
        with pytest.raises(SystemExit) as exit_info:
            main([str(part) for part in ("--data", data, *FLAGS, *arguments)])
        return exit_info.value.code, capsys.readouterr().err

    return call


def measured(output):
    return [tuple(row[name] for name in MEASURED) for row in log_of(output)]


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("unbroken") / "out"
    with pytest.raises(SystemExit, match="0"):
        main([str(part) for part in ("--data", data, *FLAGS, *UNEVEN, "--output", output)])
    assert [row[0] for row in measured(output)] == ["3", "4", "6"]
    return output


class PowerFailure(BaseException):
    pass


@contextmanager
def failing(owner, name, when):
    """Power fails on a call of a method, before it does anything."""
    real = getattr(owner, name)

    def call(self, *args, **kwargs):
        if when(self):
            raise PowerFailure
        return real(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, call)
        with pytest.raises(PowerFailure):
            yield


def assert_unbroken(output, unbroken, *mine):
    assert measured(output) == measured(unbroken)
    assert same(result_of(output), result_of(unbroken))
    names = {path.name for path in output.iterdir()} - {*mine}
    assert names == {path.name for path in unbroken.iterdir()}


@pytest.mark.parametrize("flags", [(), ("--resume",)])
def test_stopped_after_a_report_and_before_a_checkpoint(flags, run, unbroken, tmp_path):
    output = tmp_path / "out"
    with failing(Trainer, "save", lambda trainer: trainer.steps_done == 4):
        run("--output", output, *UNEVEN, "--save-every", 4)
    assert [row["step"] for row in log_of(output)] == ["3"]
    assert checkpoints(output) == []
    (output / "notes.txt").write_text("mine")
    if flags:  # the log is enough
        (output / ".checkpoint-000004.abc").mkdir()
    code, said = run("--output", output, *UNEVEN, *flags)
    assert code == 0, said
    assert "steps 1 to 6" in said
    assert (output / "notes.txt").read_text() == "mine"
    assert_unbroken(output, unbroken, "notes.txt")


@pytest.mark.parametrize("flags", [(), ("--resume",)])
def test_stopped_before_a_report(flags, run, unbroken, tmp_path):
    output = tmp_path / "out"
    with failing(Trainer, "save", lambda trainer: True):
        run("--output", output, *UNEVEN)
    assert list(output.iterdir()) == []
    (output / ".log.csv").write_text("step,lo")  # half of the first report
    assert run("--output", output, *UNEVEN, *flags)[0] == 0
    assert_unbroken(output, unbroken)


@pytest.mark.parametrize(
    "files",
    [
        {"notes.txt": "mine"},
        {"log.csv": "epoch,loss\n1,2\n"},
        {"log.csv": None, "adapter_config.json": "{}"},  # a result without its checkpoints
        {"log.csv": None, "config.json": "{}"},
    ],
)
@pytest.mark.parametrize("flags", [(), ("--resume",)])
def test_folders_of_others_are_left_alone(files, flags, run, unbroken, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    for name, text in files.items():
        (output / name).write_text((unbroken / name).read_text() if text is None else text)
    before = {path.name: path.read_text() for path in output.iterdir()}
    code, said = run("--output", output, *flags)
    assert (code, said.count("\n")) == (2, 1)
    assert ("has no checkpoint" if flags else "is there already; choose another") in said
    assert {path.name: path.read_text() for path in output.iterdir()} == before


def test_a_report_covers_the_same_steps_after_a_resume(run, unbroken, tmp_path):
    output = tmp_path / "out"
    # between checkpoint 2 and the report of step 3, which is a mean over three steps
    with failing(run_module.Run, "report", lambda run: run.trainer.steps_done == 3):
        run("--output", output, *UNEVEN)
    assert [path.name for path in checkpoints(output)] == ["checkpoint-000002"]
    assert not (output / LOG).exists()
    code, said = run("--output", output, *UNEVEN, "--resume")
    assert code == 0, said
    assert "steps 3 to 6" in said
    assert_unbroken(output, unbroken)


@pytest.mark.parametrize("step", [4, 6])
def test_a_report_that_its_checkpoint_outlived_is_made_up_for(step, run, unbroken, tmp_path):
    output = tmp_path / "out"
    with failing(run_module.Run, "evaluate", lambda run: run.trainer.steps_done == step):
        run("--output", output, *UNEVEN)
    assert checkpoints(output)[-1].name == f"checkpoint-{step:06}"
    assert str(step) not in [row["step"] for row in log_of(output)]
    assert run("--output", output, *UNEVEN, "--resume")[0] == 0
    assert_unbroken(output, unbroken)


def test_interrupted_between_reports(run, unbroken, tmp_path, monkeypatch):
    output, real = tmp_path / "out", Trainer.run

    def interrupted(self):
        for report in real(self):
            if report.step == 5:
                os.kill(os.getpid(), signal.SIGINT)
            yield report

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run", interrupted)
        code, said = run("--output", output, *UNEVEN)
    assert code == 130
    assert "stopped after step 5; --resume continues from here" in said
    assert [row["step"] for row in log_of(output)] == ["3", "4"]
    assert run("--output", output, *UNEVEN, "--resume")[0] == 0
    assert measured(output) == measured(unbroken)
    assert same(result_of(output), result_of(unbroken))


@contextmanager
def small_files(nbytes):
    """No file may grow longer, as on a disk that is full; signals are ignored by Python."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("after", [0, 2], ids=["first checkpoint", "later"])
def test_a_full_disk(after, run, unbroken, tmp_path, monkeypatch):
    output, real = tmp_path / "out", Trainer.save

    def save(self, *args):
        if self.steps_done <= after:
            return real(self, *args)
        with small_files(20_000):  # the optimizer's state fits, the model does not
            return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", save)
        code, said = run("--output", output, *UNEVEN)
    assert code == 2
    assert "could not be written" in said.splitlines()[-1]
    assert "Traceback" not in said
    assert [path.name for path in checkpoints(output)] == ["checkpoint-000002"] * (after > 0)
    assert not any(path.name.startswith(".") for path in output.iterdir())
    assert run("--output", output, *UNEVEN, "--resume")[0] == 0
    assert_unbroken(output, unbroken)


@pytest.mark.parametrize("name", ["write_log", "publish"])
def test_a_full_disk_for_the_log_or_the_result(name, run, unbroken, tmp_path, monkeypatch):
    output, real = tmp_path / "out", getattr(run_module, name)

    def full(*args):
        with small_files(100):
            return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, name, full)
        code, said = run("--output", output, *UNEVEN, "--steps-per-report", 4)
    assert code == 2
    assert "could not be written" in said.splitlines()[-1]
    assert "Traceback" not in said
    assert not any(path.name.startswith(".") for path in output.iterdir())
    assert not (output / "model.safetensors").exists()
    assert run("--output", output, *UNEVEN, "--resume")[0] == 0
    assert same(result_of(output), result_of(unbroken))


def test_checkpoints_are_ordered_by_number_and_copies_of_the_user_stay(tmp_path):
    for name in ("1000000", "999999", "best", "000002-copy"):
        (tmp_path / f"checkpoint-{name}").mkdir()
        (tmp_path / f"checkpoint-{name}" / "training_state.json").write_text("{}")
    names = [path.name for path in checkpoints(tmp_path)]
    assert names == ["checkpoint-999999", "checkpoint-1000000"]


def test_is_log(unbroken, tmp_path):
    assert is_log(unbroken / LOG)
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe")
    for path in (tmp_path / "binary.csv", tmp_path / "none.csv", tmp_path):
        assert not is_log(path)


# what the adapters say about their base model


@pytest.mark.parametrize("given", ["absolute", "relative", "home", "demo"])
def test_adapters_name_their_base_model(given, run, tmp_path, monkeypatch):
    source = Path(FLAGS[1])
    monkeypatch.chdir(source.parent)
    monkeypatch.setenv("HOME", str(source.parent))
    model = {"absolute": source, "relative": "v5", "home": "~/v5", "demo": "demo"}[given]
    flags = ("--fine-tune-type", "lora", "--train-parts", "projector", "--iters", 1)
    code, said = run("--output", tmp_path / "out", "--model", model, *flags)
    assert code == 0, said
    found = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["model"]
    assert found == ("demo" if given == "demo" else str(source))


def test_adapters_name_a_repository_as_it_was_given(run, tmp_path, monkeypatch):
    from mlx_lfm2vl.checkpoints import hub

    monkeypatch.setattr(hub, "_download", lambda repository, revision: Path(FLAGS[1]))
    monkeypatch.chdir(tmp_path)
    flags = ("--fine-tune-type", "lora", "--train-parts", "projector", "--iters", 1)
    flags = (*flags, "--model", "someone/tuned", "--revision", "v2")
    code, said = run("--output", tmp_path / "out", *flags)
    assert code == 0, said
    found = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (found["model"], found["revision"]) == ("someone/tuned", "v2")
