"""How every command parses, writes, fails and exits."""

import importlib
import logging
import os
import subprocess
import sys
import warnings
from argparse import Namespace
from pathlib import Path

import pytest

from mlx_lfm2vl import ImageError
from mlx_lfm2vl.cli.commands import COMMANDS
from mlx_lfm2vl.cli.commands import main as list_commands
from mlx_lfm2vl.cli.options import DEFAULT_MODEL, model_from, path
from mlx_lfm2vl.cli.terminal import run_command


@pytest.fixture
def outcome(capsys):
    """Calls something that exits; returns (exit code, stdout, lines on stderr)."""

    def call(function, *arguments):
        with pytest.raises(SystemExit) as exit_info:
            function(*arguments)
        captured = capsys.readouterr()
        return exit_info.value.code, captured.out, captured.err.splitlines()

    return call


def main_of(command):
    return importlib.import_module(f"mlx_lfm2vl.cli.{command}").main


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--dtype"], "--dtype"),
        (["--versoin"], "did you mean --version?"),
        (["--model", "a\0b"], "NUL"),
        (["--model", "x", "--no-such\nflag"], "--no-such flag"),
    ],
)
def test_mistaken_flags_are_told_in_one_line(command, arguments, told, outcome):
    code, out, lines = outcome(main_of(command), arguments)
    assert (code, out, len(lines)) == (2, "", 1)
    assert lines[0].startswith(f"mlx-lfm2vl-{command}: error: ")
    if "required" not in lines[0]:
        assert told in lines[0]
    assert "--help" in lines[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_version_of_every_command(command, outcome):
    from mlx_lfm2vl import __version__

    assert outcome(main_of(command), ["--version"]) == (0, f"{__version__}\n", [])


def test_all_commands_are_listed_with_one_line_each(outcome):
    code, out, lines = outcome(list_commands, [])
    assert (code, lines) == (0, [])
    for command, meaning in COMMANDS.items():
        assert f"  {command:<11}{meaning}\n" in out
    code, help_out, _ = outcome(list_commands, ["generate", "--help"])
    assert code == 0
    assert "--image-splitting" in help_out
    code, out, lines = outcome(list_commands, ["dance"])
    assert (code, out, len(lines)) == (2, "", 1)


FAILURES = [
    (ImageError("photo.jpg is\n  damaged:\r\n\r\nbad"), "photo.jpg is damaged: bad"),
    (OSError(28, "No space left on device"), "No space left on device"),
    (OSError(36, "File name too long", "x" * 300), f"{'x' * 300}: File name too long"),
    (NotADirectoryError(20, "Not a directory", b"a/b"), "b'a/b': Not a directory"),
    (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "invalid start byte"),
    (MemoryError(), "there is not enough memory"),
    (RuntimeError("[write] Unable to write 434 bytes to file."), "434 bytes to file."),
    (ImageError("\x1b[2Jgone\udcff\u2028and"), r"\x1b[2Jgone\udcff and"),
    (ImageError("long " * 5000), "long long"),
]


@pytest.mark.parametrize(("error", "told"), FAILURES)
def test_failures_end_in_one_line(error, told, outcome):
    def fail():
        warnings.warn("Pillow says something", UserWarning, stacklevel=1)
        logging.getLogger("PIL.TiffImagePlugin").warning("and something else")
        raise error

    code, out, lines = outcome(run_command, "tool", fail)
    assert (code, out, len(lines)) == (2, "", 1)
    assert lines[0].startswith("tool: error: ")
    assert told in lines[0]


def test_bugs_are_not_hidden():
    def fail():
        raise KeyError("name")

    with pytest.raises(KeyError):
        run_command("tool", fail)


def test_interrupted_and_unread(outcome):
    def interrupt():
        raise KeyboardInterrupt

    def unread():
        raise BrokenPipeError

    assert outcome(run_command, "tool", interrupt) == (130, "", [""])
    assert outcome(run_command, "tool", unread) == (1, "", [])


def shell(redirection, *arguments, buffered=True):
    """Runs `generate` with redirected streams."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"}
    command = ["sh", "-c", f'"$@" {redirection}', "sh", sys.executable, "-m"]
    run = subprocess.run(
        [*command, "mlx_lfm2vl.generate", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
    )
    return run.returncode, run.stdout, run.stderr.splitlines()


needs_full_disk = pytest.mark.skipif(
    not os.path.exists("/dev/full"), reason="needs /dev/full, which Linux has"
)


@needs_full_disk
@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("-p", "Hi", "-m", 3)])
def test_full_disk(arguments, buffered, fixtures):
    code, _, lines = shell(">/dev/full", "--model", fixtures / "v5", *arguments, buffered=buffered)
    assert code == 2
    told = "standard output cannot be written: No space left on device"
    assert lines == [f"mlx-lfm2vl-generate: error: {told}"]


@needs_full_disk
def test_standard_error_on_a_full_disk(fixtures):
    arguments = ("--model", fixtures / "v5", "-m", 3, "-p", "Hi", "-v")
    code, out, lines = shell("2>/dev/full", *arguments)
    assert (code, lines) == (0, [])
    assert out


def test_closed_streams(fixtures):
    arguments = ("--model", fixtures / "v5", "-m", 3)
    code, _, lines = shell(">&-", *arguments, "-p", "Hi")
    assert (code, lines) == (2, ["mlx-lfm2vl-generate: error: standard output is closed"])
    code, _, lines = shell("<&-", *arguments, "-p", "-")
    assert (code, len(lines)) == (2, 1)
    assert "the prompt is empty" in lines[0]
    code, _, lines = shell("<&-", *arguments, "--image", "-", "-p", "Hi")
    assert (code, len(lines)) == (2, 1)
    assert "it is empty" in lines[0]
    assert shell("2>&-", *arguments, "-p", "Hi", "--temp", "inf") == (2, "", [])


def test_any_text_fits_any_terminal(copied, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    folder = copied().rename(tmp_path / "modèle")
    code, out, lines = shell("", "--model", folder, "-p", "Hi", "-m", 3, "--json")
    assert (code, lines) == (0, [])
    assert r"mod\xe8le" in out


def test_paths_with_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert path("~/a.png") == str(tmp_path / "a.png")
    assert path("~nosuchuser/a.png") == str(tmp_path / "~nosuchuser" / "a.png")
    assert path("~x.png") == str(tmp_path / "~x.png")
    for other in ("a b.png", "-", "https://example.org/~x.png", "LiquidAI/LFM2-VL-1.6B"):
        assert path(other) == other


def test_the_model_of_the_adapters(tmp_path):
    args = Namespace(model=None, adapter_path=None)
    assert model_from(args) == DEFAULT_MODEL
    args.adapter_path = str(tmp_path)
    (tmp_path / "adapters.safetensors").touch()
    (tmp_path / "adapter_config.json").write_text('{"model": "somebody/tuned"}')
    assert model_from(args) == "somebody/tuned"
    args.model = "other"
    assert model_from(args) == "other"
    (tmp_path / "adapter_config.json").write_text("{}")
    assert model_from(Namespace(model=None, adapter_path=str(tmp_path))) == DEFAULT_MODEL


@pytest.mark.parametrize(
    ("content", "told"), [(None, "has no adapter_config.json"), ('{"model": 3}', "model is 3")]
)
def test_adapters_that_name_no_model(content, told, tmp_path, outcome):
    (tmp_path / "adapters.safetensors").touch()
    if content is not None:
        (tmp_path / "adapter_config.json").write_text(content)
    arguments = ["--adapter-path", str(tmp_path), "-p", "Hi"]
    code, _, lines = outcome(main_of("generate"), arguments)
    assert (code, len(lines)) == (2, 1)
    assert told in lines[0]


def test_libraries_add_no_lines():
    """In a process of its own: pytest collects warnings and logs before anybody sees them."""
    code = """
import logging, warnings
from mlx_lfm2vl import ImageError
from mlx_lfm2vl.cli.terminal import run_command

def fail():
    warnings.warn("Corrupt EXIF data")
    logging.getLogger("PIL.TiffImagePlugin").warning("More samples per pixel than can be decoded")
    raise ImageError("photo.tif is damaged")

run_command("tool", fail)
"""
    environment = {**os.environ, "PYTHONWARNINGS": ""}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (run.returncode, run.stderr) == (2, "tool: error: photo.tif is damaged\n")


def test_the_converter_at_the_top():
    command = [sys.executable, Path(__file__).parents[1] / "convert.py", "--help"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert "--quant-predicate" in run.stdout
