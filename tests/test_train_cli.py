"""Runs of training: resumed, killed, interrupted, shared, and told what is wrong."""

import copy
import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

from mlx_lfm2vl import DataError, Lfm2VlError, TrainError, convert, generate, load
from mlx_lfm2vl.checkpoints.adapters import PARTS
from mlx_lfm2vl.cli.train import main
from mlx_lfm2vl.models.layers import random_seed
from mlx_lfm2vl.training import metrics
from mlx_lfm2vl.training import run as run_module
from mlx_lfm2vl.training import trainer as trainer_module
from mlx_lfm2vl.training.data import batch_order, collate, read_dataset
from mlx_lfm2vl.training.metrics import answer_metric, exact_match, validation_loss
from mlx_lfm2vl.training.options import TrainingOptions
from mlx_lfm2vl.training.run import COLUMNS, LOG, PLOT, read_log
from mlx_lfm2vl.training.trainer import StepReport, Trainer, checkpoints, loss_sum

from .checkpoints import pictures
from .helpers import (
    FLAGS,
    SOURCE,
    VALUES,
    answer,
    cut,
    log_of,
    make_data,
    places,
    result_of,
    same,
    save_picture,
    user,
    write_lines,
)

LAUNCH = Path(sys.executable).with_name("mlx.launch")
EVERYTHING = tuple(PARTS)
LORA = TrainingOptions(
    train=EVERYTHING,
    iters=6,
    batch_size=2,
    grad_accumulation_steps=2,
    learning_rate=1e-3,
    warmup=2,
    weight_decay=0.1,
    rank=4,
    dropout=0.3,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def samples(data, loaded):
    return read_dataset(data / "train.jsonl", loaded()[1], max_length=4096)


@pytest.fixture
def trainer(samples, loaded):
    def make(options, dataset=samples):
        return Trainer(load(SOURCE, dtype="float32")[0], loaded()[1], dataset, options)

    return make


def learned(trainer) -> dict[str, np.ndarray]:
    return {
        name: np.array(array) for name, array in tree_flatten(trainer.model.trainable_parameters())
    }


def take(trainer, steps):
    """The reports of so many steps, without their timings."""
    run = trainer.run()
    reports = [next(run) for _ in range(steps)]
    run.close()
    return [
        (report.step, report.loss, report.learning_rate, report.grad_norm) for report in reports
    ]


# resuming


SMALL = replace(LORA, train=("projector",), grad_accumulation_steps=1)
RUNS = {
    "lora": LORA,
    "dora": replace(SMALL, fine_tune_type="dora"),
    "full": replace(SMALL, fine_tune_type="full", train=("language",)),
    "checkpointed": replace(SMALL, train=("language", "vision"), grad_checkpoint=True),
    "last layers": replace(SMALL, train=("vision",), num_layers=1),
    "muon": replace(SMALL, fine_tune_type="full", optimizer="muon"),
    "sgd": replace(SMALL, optimizer="sgd", schedule="constant"),
    "lion": replace(SMALL, optimizer="lion", schedule="linear"),
    "adafactor": replace(SMALL, optimizer="adafactor", warmup=0, schedule="constant"),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_the_same_bit_by_bit(name, trainer, tmp_path):
    whole = trainer(RUNS[name])
    take(whole, 2)
    before, seed = learned(whole), random_seed()
    checkpoint = whole.save(tmp_path, SOURCE)
    expected = take(whole, 2)
    mx.random.seed(99)
    second = trainer(RUNS[name])
    second.resume(checkpoint)
    assert second.steps_done == 2
    assert random_seed() == seed
    assert take(second, 2) == expected
    ours, theirs = learned(second), learned(whole)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert (ours[key] == value).all(), key
        assert ours[key].dtype == value.dtype
    assert any((value != before[key]).any() for key, value in theirs.items())


def test_chance_continues_where_it_was(trainer, tmp_path):
    whole = trainer(SMALL)
    take(whole, 2)
    seed = random_seed()
    checkpoint = whole.save(tmp_path, SOURCE)
    expected = take(whole, 1)
    assert seed not in (0, SMALL.seed)
    # without its random state a resumed run is another one
    state = checkpoint / "training_state.json"
    state.write_text(state.read_text().replace(str(seed), "1"))
    second = trainer(SMALL)
    second.resume(checkpoint)
    assert take(second, 1) != expected


def test_a_run_from_a_checkpoint_of_another_keeps_its_own_state(trainer, tmp_path):
    full = replace(LORA, fine_tune_type="full")
    first = trainer(full).save(tmp_path / "first", SOURCE)
    second = trainer(replace(full, seed=1))
    take(second, 1)
    checkpoint = second.save(tmp_path / "second", first)
    assert json.loads((checkpoint / "training_state.json").read_text())["step"] == 1
    trainer(replace(full, seed=1)).resume(checkpoint)
    converted = convert(checkpoint, tmp_path / "converted")
    assert not (converted / "training_state.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 2e-3}, r"made with learning_rate 0\.001, not 0\.002"),
        ({"iters": 7}, "made with iters 6, not 7"),
        ({"train": ("language",)}, "made with train"),
        ({"seed": 1}, "made with seed 0, not 1"),
    ],
)
def test_other_settings_are_refused(changes, message, trainer, tmp_path):
    checkpoint = trainer(LORA).save(tmp_path, SOURCE)
    with pytest.raises(TrainError, match=message) as info:
        trainer(replace(LORA, **changes)).resume(checkpoint)
    assert "\n" not in str(info.value)


def test_damaged_checkpoints_are_told(trainer, tmp_path):
    """Any value of the state replaced, an array that lacks or has another shape: one line."""
    checkpoint = trainer(LORA).save(tmp_path, SOURCE, reports=[StepReport(1, 2.0, 0.1, 1.0, 9, 1)])
    file, arrays = checkpoint / "training_state.json", checkpoint / "training_state.safetensors"
    before, chance, again = json.loads(file.read_text()), random.Random(5), 0
    for _ in range(60):
        data = copy.deepcopy(before)
        *way, last = chance.choice([place for place in places(data) if place])
        owner = data
        for key in way:
            owner = owner[key]
        owner[last] = copy.deepcopy(chance.choice(VALUES))
        if isinstance(owner, dict) and chance.random() < 0.3:
            del owner[last]
        file.write_text(json.dumps(data))
        said = "checkpoint-000000"
        try:
            trainer(LORA).resume(checkpoint)
            again += 1
        except Lfm2VlError as error:
            said = str(error)
        assert said.partition("\n")[1] == ""
        assert "checkpoint-000000" in said
    assert again < 30
    file.write_text(json.dumps(before))
    for path in (arrays, checkpoint / "adapters.safetensors"):
        whole = path.read_bytes()
        tensors = mx.load(str(path))
        name = next(n for n, array in tensors.items() if array.ndim == 2)
        shape = tensors[name].shape
        for change, message in ((None, "lacks"), (mx.zeros((3, 3)), r"has .* of shape \(3, 3\)")):
            spoilt = {n: array for n, array in tensors.items() if n != name}
            mx.save_safetensors(str(path), spoilt if change is None else {**spoilt, name: change})
            with pytest.raises(TrainError, match=rf"{message}.*must have shape \({shape[0]}, "):
                trainer(LORA).resume(checkpoint)
        path.write_bytes(whole)
    trainer(LORA).resume(checkpoint)


def test_damaged_logs_are_told(tmp_path):
    header, row = ",".join(COLUMNS), "1,2.0,0.001,1.0,9,1,,"
    log = tmp_path / LOG
    for text in ("2,x,,,,,,", "two,2.0,,,,,,", "2,2.0", "2" + ",1" * 9, ",2.0,,,,,,", "2\0,,,,,,,"):
        log.write_text(f"{header}\n{row}\n{text}\n")
        with pytest.raises(TrainError, match=r"log\.csv:3 is no row of a log"):
            read_log(log, 9)
    log.write_text(f"{header}\n{row}\n3{row[1:]}\n")
    assert [row["step"] for row in read_log(log, 2)] == ["1"]


def test_other_data_is_refused(trainer, samples, tmp_path):
    checkpoint = trainer(LORA).save(tmp_path, SOURCE)
    fewer = replace(samples, samples=samples.samples[1:])
    with pytest.raises(TrainError, match="had 9 samples, not 8"):
        trainer(LORA, fewer).resume(checkpoint)
    other = replace(samples, samples=samples.samples[::-1])
    with pytest.raises(TrainError, match="made with other samples"):
        trainer(LORA, other).resume(checkpoint)


def test_batches_follow_the_order_of_each_epoch(trainer, samples):
    one = trainer(LORA)
    orders = [batch_order(samples.samples, 2, LORA.seed, epoch) for epoch in range(3)]
    assert orders[0] != orders[1]
    chosen = [batch for order in orders for batch in order]
    for steps_done in (0, 3):
        one.steps_done = steps_done
        batches = one._batches()
        for expected, batch in zip(chosen[2 * steps_done :], batches, strict=False):
            rows = {tuple(samples.samples[i].token_ids) for i in expected}
            assert {tuple(row[: len(ids)]) for row, ids in pair_up(batch, rows)} == rows
        batches.close()


def pair_up(batch, rows):
    """Each row of a batch with the sample that it begins with."""
    return [(row, ids) for row in batch.token_ids for ids in rows if tuple(row[: len(ids)]) == ids]


def test_a_batch_is_shared_out(trainer):
    alone = trainer(replace(LORA, batch_size=4, grad_accumulation_steps=1))
    batches = alone._batches()
    halves = []
    for number in range(2):
        part = trainer(LORA)
        part.group = SimpleNamespace(size=lambda: 2, rank=lambda number=number: number)
        halves.append(part._batches())
    for _, batch, *pair in zip(range(6), batches, *halves, strict=False):
        rows = sorted(row.tobytes().rstrip(b"\0") for row in batch.token_ids)
        shares = [sorted(r.tobytes().rstrip(b"\0") for r in half.token_ids) for half in pair]
        assert list(map(len, shares)) == [2, 2]
        assert sorted(shares[0] + shares[1]) == rows


# validation


def test_validation_counts_every_sample(samples, loaded):
    model, processor = loaded()
    alone = [collate([sample], processor.image_processor) for sample in samples.samples]
    expected = sum(loss_sum(model, batch).item() for batch in alone)
    expected /= sum(len(batch.targets) for batch in alone)
    for batch_size in (2, 100):
        options = replace(LORA, batch_size=batch_size)
        found = validation_loss(model, processor, samples, options)
        assert found == pytest.approx(expected, rel=1e-5)


def test_metric_of_greedy_answers(data, loaded, monkeypatch):
    monkeypatch.setattr(metrics, "ANSWER", 12)
    model, processor = loaded()
    dataset = read_dataset(data / "valid.jsonl", processor, max_length=4096)
    asked = []

    def metric(text, reference):
        asked.append((text, reference))
        return 0.25 * len(asked)

    mean = answer_metric(model, processor, dataset, metric, 2, LORA)
    assert mean == pytest.approx(0.375)
    assert [reference for _, reference in asked] == ["9 cats.", "10 cats."]
    prompt = processor([user("How many? " * 2)])
    assert asked[0][0] == generate(model, processor, prompt, max_tokens=12, temperature=0.0)
    assert exact_match(" a\n", "a") == 1
    assert exact_match("A", "a") == 0


def test_validation_pictures_that_cannot_be_read(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "ANSWER", 4)
    model, processor = loaded()
    entries = []
    for name in ("a.jpg", "b.jpg"):
        save_picture(tmp_path / name)
        item = {"type": "image", "image": name}
        entries.append({"messages": [user([item]), answer("Ten.")]})
    dataset = read_dataset(write_lines(tmp_path / "v.jsonl", entries), processor, max_length=99)
    cut(tmp_path / "b.jpg")
    first = replace(dataset, samples=dataset.samples[:1])
    for batch_size in (1, 2):
        options = replace(LORA, batch_size=batch_size)
        with pytest.raises(DataError, match=r"line 2: .*b\.jpg is damaged"):
            validation_loss(model, processor, dataset, options)
        found = validation_loss(model, processor, dataset, options, skip_bad=True)
        assert found == validation_loss(model, processor, first, options)
    with pytest.raises(DataError, match=r"line 2: .*b\.jpg is damaged"):
        answer_metric(model, processor, dataset, exact_match, 2, LORA)
    constant = lambda text, reference: 1.0  # noqa: E731
    assert answer_metric(model, processor, dataset, constant, 2, LORA, skip_bad=True) == 1


# the command line


@pytest.fixture
def run(capsys, data, monkeypatch):
    """Runs the command line in this process; returns (exit code, stderr)."""

    def call(*arguments, flags=FLAGS):
        with pytest.raises(SystemExit) as exit_info:
            main([str(part) for part in ("--data", data, *flags, *arguments)])
        captured = capsys.readouterr()
        assert captured.out == ""
        return exit_info.value.code, captured.err

    return call


def command(*arguments):
    return [sys.executable, "-m", "mlx_lfm2vl.train", *map(str, (*FLAGS, *arguments))]


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """The folder of a run that nobody stops."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    with pytest.raises(SystemExit) as exit_info:
        main([str(part) for part in ("--data", data, *FLAGS, "--output", output)])
    assert exit_info.value.code == 0
    return output


def test_a_run_from_end_to_end(run, data, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "ANSWER", 4)
    metric = tmp_path / "mine.py"
    metric.write_text("def third(answer, reference):\n    return 1 / 3\n")
    output = tmp_path / "out"
    lora = ("--fine-tune-type", "lora", "--train", "language,vision", "--seed", 3)
    arguments = ("--output", output, *lora, "--metric", f"{metric}:third", "--plot")
    arguments = (*arguments, "--metric-samples", 1)
    code, said = run(*arguments)
    assert code == 0, said
    rows = log_of(output)
    assert tuple(rows[0]) == COLUMNS
    assert [row["step"] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    assert [bool(row["validation_loss"]) for row in rows] == [False, False, True] * 2
    assert [row["metric"] for row in rows] == ["", "", "0.3333"] * 2
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert all(float(row["tokens_per_second"]) > 0 for row in rows)
    assert float(rows[0]["learning_rate"]) == 1e-3
    assert f"step 6: loss {float(rows[-1]['loss']):.4f}" in said
    assert "9 samples, " in said
    assert "steps 1 to 6" in said
    # only the last two checkpoints stay, and nothing hidden
    assert sorted(path.name for path in output.iterdir()) == [
        "adapter_config.json",
        "adapters.safetensors",
        "checkpoint-000004",
        "checkpoint-000006",
        LOG,
        PLOT,
    ]
    with Image.open(output / PLOT) as plot:
        assert plot.format == "PNG"
        assert plot.size > (500, 300)
    assert same(result_of(output), result_of(output / "checkpoint-000006"))
    # the result is there to be used
    model, processor = load(SOURCE, dtype="float32", adapter_path=output)
    dataset = read_dataset(data / "valid.jsonl", processor, max_length=4096)
    found = validation_loss(model, processor, dataset, LORA)
    assert found == pytest.approx(float(rows[-1]["validation_loss"]), abs=2e-5)
    # another run does not overwrite it
    code, said = run(*arguments)
    assert (code, said.count("\n")) == (2, 1)
    assert "is there already; choose another --output, or --resume" in said


def test_reports_are_means(run, undisturbed, tmp_path):
    output = tmp_path / "out"
    assert run("--output", output, "--steps-per-report", 2, "--steps-per-eval", 6)[0] == 0
    single, rows = log_of(undisturbed), log_of(output)
    assert [row["step"] for row in rows] == ["2", "4", "6"]
    for number, row in enumerate(rows):
        pair = single[2 * number : 2 * number + 2]
        assert float(row["loss"]) == pytest.approx(
            sum(float(one["loss"]) for one in pair) / 2, abs=2e-5
        )


def test_full_fine_tuning_gives_a_model_folder(undisturbed, loaded):
    model, _ = load(undisturbed, dtype="float32")
    before = dict(tree_flatten(loaded()[0].parameters()))
    changed = {
        name
        for name, array in tree_flatten(model.parameters())
        if (array != before[name]).any().item()
    }
    assert changed == {name for name in before if name.startswith("multi_modal_projector.")}


def test_the_log_goes_on_without_double_rows(run, undisturbed, data, tmp_path):
    output = tmp_path / "out"
    arguments = ("--output", output, "--save-every", 4)
    expected = log_of(undisturbed)

    def stopped():
        with pytest.raises(LookupError, match="power failure"):
            main([str(part) for part in ("--data", data, *FLAGS, *arguments)])

    with pytest.MonkeyPatch.context() as patch:
        real = Trainer.save

        def save(self, *args):
            if self.steps_done == 6:
                raise LookupError("power failure")
            return real(self, *args)

        patch.setattr(Trainer, "save", save)
        stopped()
    assert [row["step"] for row in log_of(output)] == ["1", "2", "3", "4", "5"]
    assert [path.name for path in checkpoints(output)] == ["checkpoint-000004"]
    code, said = run(*arguments, "--resume")
    assert code == 0, said
    assert "steps 5 to 6" in said
    for row, other in zip(log_of(output), expected, strict=True):
        for column in ("step", "loss", "learning_rate", "grad_norm", "validation_loss"):
            assert row[column] == other[column]
    assert same(result_of(output), result_of(undisturbed))
    # a finished run has nothing left to do
    code, said = run(*arguments, "--resume")
    assert code == 0, said
    assert len(log_of(output)) == 6
    code, said = run(*arguments, "--resume", "--batch-size", 3)
    assert (code, said.count("\n")) == (2, 1)
    assert "was made with batch_size 2, not 3; resume with the same settings" in said


def test_interrupted_and_resumed(run, undisturbed, tmp_path, monkeypatch):
    output, real = tmp_path / "out", trainer_module.step

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "step", interrupted)
        code, said = run("--output", output, "--save-every", 100)
    assert code == 130
    assert "stopped after step 1; --resume continues from here" in said
    assert [path.name for path in checkpoints(output)] == ["checkpoint-000001"]
    code, said = run("--output", output, "--save-every", 100, "--resume")
    assert code == 0, said
    assert same(result_of(output), result_of(undisturbed))
    assert [row["loss"] for row in log_of(output)] == [row["loss"] for row in log_of(undisturbed)]


def test_interrupted_while_validating(run, undisturbed, tmp_path, monkeypatch):
    """What comes between a step and its report is not lost, either."""
    real = metrics.validation_loss

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    output = tmp_path / "out"
    arguments = ("--output", output, "--save-every", 100)
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "validation_loss", interrupted)
        code, said = run(*arguments)
    assert code == 130
    assert "stopped after step 4; --resume continues from here" in said
    assert [path.name for path in checkpoints(output)] == ["checkpoint-000004"]
    assert run(*arguments, "--resume")[0] == 0
    assert same(result_of(output), result_of(undisturbed))


def test_two_processes_are_one_with_twice_the_batch(run, data, tmp_path):
    # gradients go into SGD as they are, so that rounding stays rounding
    flags = ("--optimizer", "sgd", "--learning-rate", 0.1, "--data", data)
    flags = (*flags, "--train", "language,projector,vision", "--iters", 1)
    flags = (*flags, "--save-every", 1, "--batch-size")
    one, two = tmp_path / "one", tmp_path / "two"
    launcher = [LAUNCH, "-n", "2", "--backend", "ring", "--"]
    launched = subprocess.run(
        [*launcher, *command(*flags, 2, "--output", two)], capture_output=True, text=True
    )
    assert launched.returncode == 0, launched.stderr
    assert "Traceback" not in launched.stderr
    assert run(*flags, 4, "--output", one)[0] == 0
    assert launched.stderr.count("step 1: loss") == 1  # one process reports
    rows, expected = log_of(two), log_of(one)
    for row, other in zip(rows, expected, strict=True):
        # rounded to five places; float32 sums in another order
        for column in ("loss", "grad_norm", "validation_loss"):
            if other[column]:
                assert float(row[column]) == pytest.approx(float(other[column]), rel=1e-4)
    ours, theirs = result_of(two), result_of(one)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        # float32 sums in another order
        assert np.abs(ours[name] - value).max() < 1e-5 * np.abs(value).max(), name
    start = {n: np.array(a) for n, a in mx.load(str(SOURCE / "model.safetensors")).items()}
    name = "multi_modal_projector.linear_2.weight"
    assert np.abs(theirs[name] - start[f"model.{name}"]).max() > 1e-3
    assert [path.name for path in checkpoints(two)] == ["checkpoint-000001"]
    # the checkpoint of two is not for one
    code, said = run(*flags, 2, "--output", two, "--resume")
    assert code == 2
    assert "had 2 machines, not 1" in said


def test_skipped_lines_and_pictures_are_counted(run, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    entries = [{"messages": [user("Hi"), answer("Hello.")]}] * 3
    for name in ("a.jpg", "b.jpg"):
        save_picture(folder / name)
        item = {"type": "image", "image": name}
        entries.append({"messages": [user([item]), answer("Ten.")]})
    cut(folder / "b.jpg")
    write_lines(folder / "train.jsonl", [*entries, "{", {"messages": [user("Hi")]}])
    flags = ("--model", SOURCE, "--data", folder, "--fine-tune-type", "full")
    flags = (*flags, "--batch-size", 1, "--iters", 5)
    output = tmp_path / "out"
    code, said = run("--output", output, flags=flags)
    assert (code, said.count("\n")) == (2, 1)
    assert "train.jsonl line 6: no JSON" in said
    assert "and 1 more bad lines; --skip-bad leaves them out" in said
    code, said = run("--output", output, "--skip-bad", flags=flags)
    assert code == 0, said
    assert "training: skipped 2 bad lines, first 6: no JSON" in said
    assert "skipped 1 samples whose images could not be read" in said
    assert len(log_of(output)) == 1
    write_lines(folder / "train.jsonl", entries)
    code, said = run("--output", tmp_path / "other", flags=flags)
    assert code == 2
    assert "b.jpg is damaged" in said.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "none.jsonl"), "none.jsonl does not exist; pass a file of JSON lines"),
        (("--validation", "none.jsonl"), "none.jsonl cannot be read"),
        (("--train", "language,audio"), "choose among language, projector, vision"),
        (("--optimizer", "none"), "optimizer is 'none'"),
        (("--metric", "rouge"), "--metric rouge: pass exact_match or FILE.py:FUNCTION"),
        (("--metric", "none.py:f"), "pass exact_match or FILE.py:FUNCTION"),
        (("--metric", f"{pictures.__file__}:none"), "has no function none"),
        (("--resume",), "has no checkpoint to resume from"),
        (("--tile-size", 1, "--max-length", 5), "line 1"),
        (("--max-length", 10), "tokens; --max-length is 10"),
        (("--model", "none/"), "none"),
    ],
)
def test_one_line_says_what_is_wrong(arguments, message, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said = run("--output", tmp_path / "out", *arguments)
    assert code == 2
    assert said.startswith("mlx-lfm2vl-train: error: ")
    assert said.count("\n") == 1
    assert message in said
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_metrics_need_samples(run, data, tmp_path):
    arguments = ("--data", data / "train.jsonl", "--metric", "exact_match")
    code, said = run("--output", tmp_path / "out", *arguments)
    assert code == 2
    assert "--metric needs validation samples; pass --validation" in said


def test_exact_match_of_a_model_that_learnt_by_heart(run, tmp_path):
    entries = [{"messages": [user("Count"), answer("Ten cats.")]}]
    data = write_lines(tmp_path / "train.jsonl", entries)
    flags = ("--model", SOURCE, "--data", data, "--validation", data, "--metric", "exact_match")
    flags = (*flags, "--fine-tune-type", "full", "--batch-size", 1, "--iters", 12)
    flags = (*flags, "--learning-rate", 0.03, "--steps-per-eval", 12)
    code, said = run("--output", tmp_path / "out", flags=flags)
    assert code == 0, said
    assert log_of(tmp_path / "out")[-1]["metric"] == "1.0"


def test_rows_after_a_checkpoint_are_forgotten(undisturbed):
    assert read_log(undisturbed / LOG, 0) == []
    assert [row["step"] for row in read_log(undisturbed / LOG, 4)] == ["1", "2", "3", "4"]
    assert read_log(undisturbed / "none.csv", 4) == []


def test_checkpoint_without_its_state_does_not_count(undisturbed, tmp_path):
    (tmp_path / "checkpoint-000009").mkdir()
    assert checkpoints(tmp_path) == []
    state = json.loads((undisturbed / "checkpoint-000006" / "training_state.json").read_text())
    assert state["step"] == 6
    assert state["samples"] == 9
