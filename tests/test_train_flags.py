"""The arguments of training: mlx-lm's names, settings in files, odd values, odd paths."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_lfm2vl import TrainingOptions, load, read_dataset
from mlx_lfm2vl._version import __version__
from mlx_lfm2vl.cli import train as train_cli
from mlx_lfm2vl.cli.train import build_parser, main, parse
from mlx_lfm2vl.training import metrics
from mlx_lfm2vl.training.metrics import load_metric
from mlx_lfm2vl.training.options import RunOptions
from mlx_lfm2vl.training.trainer import Trainer, checkpoints

from .helpers import (
    FLAGS,
    SOURCE,
    answer,
    log_of,
    make_data,
    result_of,
    same,
    user,
    write_lines,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def run(capsys, data):
    """Runs the command line in this process; returns (exit code, stderr)."""

    def call(*arguments, flags=FLAGS):
        with pytest.raises(SystemExit) as exit_info:
            main([str(part) for part in ("--data", data, *flags, *arguments)])
        return exit_info.value.code, capsys.readouterr().err

    return call


@pytest.fixture
def refused(run, tmp_path):
    """Arguments that end in one line on stderr; returns it."""

    def call(*arguments, **options):
        code, said = run("--output", tmp_path / "out", *arguments, **options)
        assert code == 2, said
        assert said.startswith("mlx-lfm2vl-train: error: ")
        assert said.count("\n") == 1, said
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
        return said

    return call


def values(*arguments):
    return vars(parse(["--data", "d", *map(str, arguments)]))


# names


def test_names_of_mlx_lm():
    given = values("--max-seq-length", 99, "--adapter-path", "there", "--train")
    assert (given["max_length"], given["output"], given["train"]) == (99, "there", None)
    assert values("--save-path", "there")["output"] == "there"
    for flag in ("--train", "--train-parts"):
        assert values(flag, "vision, projector")["train"] == ("vision", "projector")


def test_a_bare_train_trains_the_default_parts(run, tmp_path):
    flags = ("--model", SOURCE, "--train", "--iters", 1, "--adapter-path", tmp_path / "out")
    code, said = run(*flags, flags=())
    assert code == 0, said
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert tuple(config["train"]) == TrainingOptions.train


def test_every_default_is_shown_and_none_is_set():
    text = build_parser().format_help().partition("examples:")[0]
    shown = " ".join(text.partition("\noptions:")[2].split())
    flags = {name for name, value in values().items() if value is None}
    for field in (*fields(TrainingOptions), *fields(RunOptions)):
        if field.name == "image_options":
            continue
        assert field.name in flags, "a default of its own"
        flag = "--" + field.name.replace("_", "-")
        if field.default is not False and field.name != "train":
            # some Pythons write a comma behind a flag that has another name
            help_of_flag = re.split(r" -(?!1)", re.split(f" {flag}[ ,]", shown, maxsplit=1)[1])
            assert any(f"(default: {field.default})" in part for part in help_of_flag[:3]), flag
    assert "(default: language)" in shown


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.strip() == __version__


# files of settings


YAML = """
model: some/where
train: true
fine_tune_type: dora
iters: 100
learning_rate: 1e-5
num_layers: -1
train_parts: [language, vision]
max_seq_length: 77
adapter_path: there
grad_checkpoint: true
image_splitting: false
skip-bad: false
test: false
resume_adapter_file: null
hf_dataset: {}
lora_parameters: {rank: 4, scale: 10.0, dropout: 0.1}
"""


def test_settings_of_mlx_lm_in_a_file(tmp_path):
    (tmp_path / "lora.yaml").write_text(YAML)
    given = values("-c", tmp_path / "lora.yaml", "--iters", 7)
    expected = {
        **{"model": "some/where", "fine_tune_type": "dora", "iters": 7, "learning_rate": 1e-5},
        **{"num_layers": -1, "train": ("language", "vision"), "max_length": 77, "data": "d"},
        **{"output": "there", "grad_checkpoint": True, "do_image_splitting": False},
        **{"skip_bad": None, "resume_adapter_file": None, "rank": 4, "scale": 10, "dropout": 0.1},
    }
    assert {name: given[name] for name in expected} == expected
    (tmp_path / "lora.json").write_text('{"data": "here", "iters": 3, "learning_rate": 0.5}')
    args = parse(["--config", str(tmp_path / "lora.json")])
    assert (args.data, args.iters, args.learning_rate) == ("here", 3, 0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("iters: many", "argument --iters: invalid int value: 'many'"),
        ("iters: true", "argument --iters: expected one argument"),
        ("resume: sometimes", "argument --resume: ignored explicit argument"),
        ("model: true", "argument --model: expected one argument"),
        ("dtype: int8", "argument --dtype: invalid choice"),
        ("iters: {a: 1}", "iters means nothing here"),
        ("val_batches: 25\nlr_schedule: {name: x}", "val_batches, lr_schedule means nothing"),
        ("iter: 5", "iter means nothing here"),  # no abbreviations
        ("help: true", "help means nothing here"),
        ("config: other.yaml", "config means nothing here"),
        ("lora_parameters: [1]", "lora_parameters means nothing here"),
        ("1: 2", "1 means nothing here"),
        ("", "holds no settings"),
        ("- a", "holds no settings"),
        ("a: [", "cannot be read"),
        ("[" * 10**5, "cannot be read"),
        ("iters: 0", "iters is 0"),
    ],
)
def test_settings_that_make_no_sense(text, message, refused, tmp_path):
    (tmp_path / "lora.yaml").write_text(text)
    said = refused("--config", tmp_path / "lora.yaml", flags=("--model", SOURCE))
    assert message in said
    assert "lora.yaml" in said or "iters is 0" in said


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 10**5, '{"iters": ' + "9" * 5000 + "}", "\0"])
def test_json_settings_that_make_no_sense(text, refused, tmp_path):
    (tmp_path / "lora.json").write_text(text)
    assert "lora.json" in refused("--config", tmp_path / "lora.json")


def test_settings_without_pyyaml(refused, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    (tmp_path / "lora.yaml").write_text("iters: 5")
    assert "needs pyyaml" in refused("--config", tmp_path / "lora.yaml")


# beginning with adapters


def test_begin_with_adapters(run, refused, tmp_path):
    flags = ("--model", SOURCE, "--iters", 1, "--batch-size", 2, "--train-parts", "projector")
    first, second = tmp_path / "first", tmp_path / "second"
    assert run("--output", first, *flags, "--learning-rate", 0.1, flags=())[0] == 0
    file = first / "adapters.safetensors"
    begin = (*flags, "--resume-adapter-file", file)
    code, said = run("--output", second, *begin, "--learning-rate", 1e-30, flags=())
    assert code == 0, said
    assert same(result_of(second), result_of(first))
    assert np.abs(next(a for n, a in result_of(first).items() if n.endswith("lora_b"))).max() > 0
    # a resumed run keeps what it has learnt since
    code, said = run("--output", second, *begin, "--learning-rate", 1e-30, "--resume", flags=())
    assert code == 0, said
    for more in (("--rank", 4), ("--train-parts", "vision"), ("--fine-tune-type", "full")):
        assert "fits nothing that learns" in refused(*begin, *more, flags=())
    for name in ("none", tmp_path, SOURCE / "config.json"):
        said = refused(*flags, "--resume-adapter-file", name, flags=())
        assert str(name) in said


# odd values and paths


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *(("--learning-rate", text) for text in ("inf", "-inf", "nan", "1e39", "1e-46", "-1")),
        *((flag, "inf") for flag in ("--weight-decay", "--max-grad-norm", "--scale", "--dropout")),
        *((flag, "nan") for flag in ("--weight-decay", "--max-grad-norm", "--scale", "--dropout")),
        *((flag, "-1") for flag in ("--weight-decay", "--max-grad-norm", "--scale", "--seed")),
        *((flag, "0") for flag in ("--scale", "--save-every", "--keep-checkpoints")),
        *((flag, "0") for flag in ("--steps-per-report", "--steps-per-eval", "--metric-samples")),
        ("--seed", 2**64),
        ("--iters", 10**30),
        ("--rank", 2**31),
        ("--num-layers", -2),
        ("--warmup", -1),
        ("--train", "language,language"),
        ("--train", "language,"),
        ("--train", ""),
    ],
)
def test_values_out_of_range(flag, value, refused):
    name = flag.removeprefix("--").replace("-", "_")
    assert f"{name} is" in refused(f"{flag}={value}", flags=("--model", SOURCE))


def test_the_largest_seed_is_one(run, tmp_path):
    code, said = run("--output", tmp_path / "out", "--seed", 2**64 - 1, "--iters", 1)
    assert code == 0, said


@pytest.fixture
def odd(tmp_path, monkeypatch):
    """Paths that no file can have, or that are something else."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    return ("~nosuch/x", "a" * 300, "\0", "file/x", "/dev/null/x", "")


@pytest.mark.parametrize(
    "flag", ["--data", "--validation", "--metric", "--config", "--resume-adapter-file"]
)
def test_odd_paths_to_read(flag, odd, refused, tmp_path):
    suffix = {"--metric": ".py:f", "--config": ".json"}.get(flag, "")
    for path in (*odd, tmp_path):
        refused(flag, f"{path}{suffix}")


def test_odd_paths_to_write(odd, run):
    for path in odd:
        code, said = run("--output", path)
        if path == "~nosuch/x":  # a folder whose name begins so
            assert code == 0, said
            continue
        assert (code, said.count("\n")) == (2, 1), path
    assert sorted(os.listdir()) == ["file", "~nosuch"]


def test_names_that_begin_with_a_tilde(run, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "~x.jsonl", [{"messages": [user("Hi"), answer()]}])
    (tmp_path / "~m.py").write_text("def one(answer, reference):\n    return 1\n")
    more = ("--data", "~x.jsonl", "--validation", "~x.jsonl", "--metric", "~m.py:one")
    assert run("--output", "~out", *more, "--iters", 1)[0] == 0
    assert (tmp_path / "~out" / "config.json").exists()


# lines of data


ODD_LINES = {
    "deep": b'{"messages": ' + b"[" * 10**5,
    "deep inside": b'{"messages": [{"role": ' + b"[" * 900 + b"]" * 900 + b"}]}",
    "a huge integer": b'{"messages": ' + b"9" * 5000 + b"}",
    "no UTF-8": b'{"messages": "\xff"}',
    "a long name": b'{"messages": [{"role": "user", "content": [{"type": "image", "image": "'
    + b"a" * 300
    + b'"}]}, {"role": "assistant", "content": "x"}]}',
    "no user": b'{"messages": [{"role": "user", "content": [{"type": "image", "image": "~no/x"}]},'
    b' {"role": "assistant", "content": "x"}]}',
}


@pytest.mark.parametrize("name", ODD_LINES)
def test_odd_lines_are_bad_lines(name, run, refused, tmp_path):
    good = json.dumps({"messages": [user("Hi"), answer()]}).encode()
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join([good, ODD_LINES[name], b"\xef\xbb\xbf" + good]))
    assert "data.jsonl line 2: " in refused("--data", path)
    code, said = run("--output", tmp_path / "out", "--data", path, "--skip-bad", "--iters", 1)
    assert code == 0, said
    assert "skipped 1 bad lines, first 2" in said
    assert "2 samples, " in said


# metrics that fail


METRICS = {
    "raises": ("def f(a, b):\n    return a.nothing", "AttributeError: 'str' object"),
    "exits": ("import sys\ndef f(a, b):\n    sys.exit(3)", "SystemExit: 3"),
    "text": ("def f(a, b):\n    return 'much'", "ValueError: could not convert"),
    "nothing": ("def f(a, b):\n    pass", "TypeError: float() argument"),
    "nan": ("def f(a, b):\n    return float('nan')", "is nan"),
}


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_that_fails(name, run, data, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "ANSWER", 2)
    body, message = METRICS[name]
    file, output = tmp_path / "mine.py", tmp_path / "out"
    file.write_text(body)
    flags = ("--output", output, "--metric", f"{file}:f", "--save-every", 5, "--metric-samples", 1)
    code, said = run(*flags)
    assert code == 2
    last = said.splitlines()[-1]
    assert "Traceback" not in said
    assert f"metric f {'is' if name == 'nan' else 'fails'}" in last
    assert f"{data / 'valid.jsonl'} line 1" in last
    assert message in last
    # the steps until then are kept, and the metric is asked again
    assert [path.name for path in checkpoints(output)] == ["checkpoint-000003"]
    file.write_text("def f(a, b):\n    return 0.5")
    assert run(*flags, "--resume")[0] == 0
    assert [row["metric"] for row in log_of(output)] == ["", "", "0.5", "", "", "0.5"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def f(:", "SyntaxError"),
        ("import nothing_like_it", "ModuleNotFoundError"),
        ("raise SystemExit(4)", "SystemExit: 4"),
        ("f = 5", "has no function f"),
        ("\0", "fails: "),
    ],
)
def test_a_metric_that_cannot_be_loaded(body, message, refused, tmp_path):
    (tmp_path / "mine.py").write_text(body)
    assert message in refused("--metric", f"{tmp_path / 'mine.py'}:f")


def test_a_metric_may_hold_what_a_module_may(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass A:\n    x: int\n"
        "def f(a, b):\n    return A(len(a)).x\n"
    )
    assert load_metric(f"{tmp_path / 'mine.py'}:f")("abc", "") == 3


# where messages go


def test_nobody_reads_stderr(data, tmp_path):
    command = [sys.executable, "-m", "mlx_lfm2vl.train", "--data", data, *FLAGS, "--output"]
    for number, redirection in enumerate(("2> /dev/full", "2>&-", "> /dev/full < /dev/null")):
        words = " ".join(f"'{part}'" for part in (*command, tmp_path / str(number)))
        done = subprocess.run(f"{words} {redirection}", shell=True, capture_output=True, text=True)
        assert done.returncode == 0, (redirection, done.stderr)
        assert len(log_of(tmp_path / str(number))) == 6
    assert same(*(result_of(tmp_path / str(number)) for number in (0, 1)))


class Terminal:
    """A stderr that is a terminal."""

    def __init__(self):
        self.text = ""

    def isatty(self):
        return True

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def test_a_terminal_shows_the_time_left(run, tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(train_cli.sys, "stderr", terminal)
    assert run("--output", tmp_path / "out")[0] == 0
    assert "/9 [" in terminal.text  # lines
    assert "/3 [" in terminal.text
    assert "/6 [" in terminal.text  # steps
    assert "<" in terminal.text  # passed < left
    assert "step 6: loss" in terminal.text


def test_weights_of_another_type_are_taken_as_those_that_learn(data, loaded, tmp_path):
    options = TrainingOptions(train=("projector",))
    dataset = read_dataset(data / "valid.jsonl", loaded()[1], max_length=4096)
    trainer = Trainer(load(SOURCE, dtype="float32")[0], loaded()[1], dataset, options)
    half = {
        name: mx.ones(value.shape, mx.float16)
        for name, value in tree_flatten(trainer.model.trainable_parameters())
    }
    mx.save_safetensors(str(tmp_path / "half.safetensors"), half)
    trainer.begin_with(tmp_path / "half.safetensors")
    learning = dict(tree_flatten(trainer.model.trainable_parameters()))
    assert learning.keys() == half.keys()
    for value in learning.values():
        assert value.dtype == mx.float32
        assert (value == 1).all()
