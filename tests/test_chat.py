"""The conversation at the terminal, talked to through a pipe and through a pseudo-terminal."""

import fcntl
import io
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from PIL import Image

from mlx_lfm2vl import Sampling, Session
from mlx_lfm2vl.cli.chat import HELP, Chat, help_text, image_paths
from mlx_lfm2vl.cli.generate import main

from .checkpoints.pictures import picture

needs_full_disk = pytest.mark.skipif(
    not os.path.exists("/dev/full"), reason="needs /dev/full, which Linux has"
)


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "my photo.png"
    Image.fromarray(picture(60, 40)).save(path)
    return path


def command(fixtures, *more):
    base = [sys.executable, "-m", "mlx_lfm2vl.generate", "--chat", "--model", fixtures / "v5"]
    return [str(part) for part in (*base, "--temp", 0, "--max-tokens", 6, *more)]


@pytest.fixture
def talk(fixtures, monkeypatch, capsys):
    """Says lines to a chat in this process; returns what it wrote."""

    def call(*lines, more=()):
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
        with pytest.raises(SystemExit) as exit_info:
            main(command(fixtures, *more)[3:])
        captured = capsys.readouterr()
        assert exit_info.value.code == 0, captured.err
        assert captured.err == ""
        return captured.out

    return call


def test_a_conversation(talk, photo, loaded, tmp_path):
    saved = tmp_path / "talk.safetensors"
    out = talk(
        f"/image '{photo}'",
        "What is it?",
        "And where?",
        "/undo",
        "How many?",
        "/stats",
        "Why?",
        f"/save {saved}",
        "/reset",
        "Hello",
        more=("--system", "Be brief."),
    )
    session = Session(*loaded(), system="Be brief.")
    session.see(photo)
    for text in ("What is it?", "And where?"):
        assert session.send(text, sampling=Sampling(temperature=0), max_tokens=6) in out
    session.undo()
    assert session.send("How many?", sampling=Sampling(temperature=0), max_tokens=6) in out
    assert session.send("Why?", sampling=Sampling(temperature=0), max_tokens=6) in out
    assert "(statistics on)" in out
    assert "of them known; first token after" in out
    again = Session(*loaded())
    again.load(saved)
    assert [m["role"] for m in again.messages] == [m["role"] for m in session.messages]
    assert again.messages[-1] == session.messages[-1]


def test_images_and_prompt_of_the_command_line_come_first(talk, photo, loaded):
    out = talk("/quit", more=("--image", photo, "--prompt", "What is it?"))
    session = Session(*loaded())
    session.see(photo)
    assert session.send("What is it?", sampling=Sampling(temperature=0), max_tokens=6) in out


def test_mistakes_do_not_end_it(talk, tmp_path):
    out = talk(
        "/image",
        "/image missing.png",
        "/dance",
        "/undo",
        f"/load {tmp_path / 'nothing'}",
        f"/save {tmp_path / 'no' / 'folder'}",
        "",
        "/help",
    )
    for part in (
        "usage: /image PATH",
        "missing.png does not exist",
        "/dance is no command",
        "no turn to undo",
        "cannot be read as a session",
        "No such file or directory",
        "/reset        begin again",
    ):
        assert part in out


def test_chat_and_json_exclude_each_other(fixtures, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(command(fixtures, "--json")[3:])
    assert "--chat reads standard input itself" in capsys.readouterr().err


class Screen:
    """What a program writes to its terminal, read in order; nothing that was read is lost."""

    def __init__(self, descriptor):
        self.descriptor = descriptor
        self.text = ""

    def wait_for(self, wanted, seconds=60):
        end = time.monotonic() + seconds
        while wanted not in self.text:
            ready, _, _ = select.select([self.descriptor], [], [], max(0, end - time.monotonic()))
            assert ready, f"{wanted!r} did not come; so far: {self.text!r}"
            self.text += os.read(self.descriptor, 4096).decode(errors="replace")
        before, _, self.text = self.text.partition(wanted)
        return before


def test_ctrl_c_stops_the_answer_and_not_the_program(fixtures, copied):
    endless = copied()
    # no token has this id, so nothing but Ctrl-C ends an answer
    (endless / "generation_config.json").write_text('{"eos_token_id": 9999}')
    reader, writer = pty.openpty()
    process = subprocess.Popen(
        command(fixtures, "--model", endless, "--max-tokens", 1_000_000),
        stdin=writer,
        stdout=writer,
        start_new_session=True,
    )
    os.close(writer)
    screen = Screen(reader)
    try:
        screen.wait_for("> ")
        os.write(reader, b"Count\n")
        screen.wait_for("Count\r\n")
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        screen.wait_for("(stopped;")
        screen.wait_for("> ")
        time.sleep(0.5)  # input() does not notice a signal between its prompt and its waiting
        process.send_signal(signal.SIGINT)
        screen.wait_for("(/quit or Ctrl-D leaves)")
        os.write(reader, b"/quit\n")
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(reader)


@pytest.fixture
def chat(capsys, fixtures, monkeypatch, tmp_path):
    """Talks in this process and in an empty folder; returns what each line was answered."""
    monkeypatch.chdir(tmp_path)

    def call(*lines, more=(), code=0):
        data = b"".join((x if isinstance(x, bytes) else x.encode()) + b"\n" for x in lines)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), "utf-8"))
        base = ["--chat", "--model", str(fixtures / "v5"), "--temp", "0", "--max-tokens", "6"]
        with pytest.raises(SystemExit) as exit_info:
            main([*base, *map(str, more)])
        captured = capsys.readouterr()
        assert (exit_info.value.code, captured.err) == (code, "")
        return [answer.strip("\n") for answer in captured.out.split("> ")[1:]]

    return call


@pytest.fixture
def here(tmp_path, photo):
    """Images with names that a shell would take apart, in the folder of the chat."""
    for name in ("it's.png", "a.png", 'say "hi".png', "~x.png"):
        shutil.copy(photo, tmp_path / name)


@pytest.mark.parametrize(
    ("typed", "names"),
    [
        ("my photo.png", ["my photo.png"]),
        ("'my photo.png'", ["my photo.png"]),
        (r"my\ photo.png", ["my photo.png"]),
        ("  it's.png ", ["it's.png"]),
        (r"it\'s.png", ["it's.png"]),
        ('say "hi".png', ['say "hi".png']),
        ("a.png 'my photo.png'", ["a.png", "my photo.png"]),
        ("a.png it's.png", ["a.png it's.png"]),
        ("my phota.png", ["my phota.png"]),
        ("https://example.org/a.png", ["https://example.org/a.png"]),
    ],
)
def test_paths_are_the_rest_of_the_line(typed, names, here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert image_paths(typed.strip()) == names


def test_images_with_odd_names_are_seen(chat, here):
    answers = chat("/image my photo.png", "/image it's.png", "/image ~x.png a.png", "/image zzz")
    assert re.fullmatch(r"\(my photo\.png: \d+ positions, .* s\)", answers[0])
    assert answers[1].startswith("(it's.png: ")
    assert answers[2].count("positions") == 2
    assert answers[3] == "zzz does not exist"


def test_nothing_ends_the_conversation(chat, tmp_path):
    (tmp_path / "file").write_text("x")
    bad = (
        *("/image ~nosuchuser/x", "/image it's", "/image file", "/image file/x", b"/image caf\xe9"),
        *(b"caf\xe9", "/save a\0b", "/load a\0b", "/image a\0b", f"/save {'x' * 300}"),
        *("/save file/talk", "/save no/talk", "/load nothing", "/load file", "/load ."),
        *("/set foo 1", "/set temperature hot", "/set top_p 7", "/set seed -1", "/dance"),
    )
    answers = chat("What?", *bad, "/save talk", "exit")
    assert len(answers) == len(bad) + 3
    assert all(len(answer.splitlines()) == 1 for answer in answers[1:-2]), answers
    assert not any("Traceback" in answer for answer in answers)
    assert answers[-2] == "(saved talk.safetensors: 1 turn, 0 images)"


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("unable\nto write"), MemoryError]
)
def test_a_failed_save_loses_nothing(error, chat, monkeypatch):
    save, failures = Session.save, [error]

    def fail_once(self, path):
        if failures:
            raise failures.pop()
        save(self, path)

    monkeypatch.setattr(Session, "save", fail_once)
    answers = chat("What?", "/save talk", "/save talk", "/quit")
    assert len(answers[1].splitlines()) == 1
    assert answers[2] == "(saved talk.safetensors: 1 turn, 0 images)"


def test_commands_say_what_they_did(chat, photo):
    answers = chat(
        *(f"/image {photo}", "What?", "/undo", "What?", "Why?", "/save talk", "So?", "/reset"),
        *("/load talk", "/reset", "/system", "/system Be brief.", "/system", "Hi", "/system No."),
        "/quit",
    )
    assert answers[2] == "(taken back: the last question and its answer; 1 image waiting again)"
    assert answers[5] == "(saved talk.safetensors: 2 turns, 1 image)"
    assert answers[7] == "(begun again; 1 image forgotten; 1 turn before it not saved)"
    assert answers[8] == "(loaded talk.safetensors: 2 turns, 1 image)"
    assert answers[9] == "(begun again; 1 image forgotten)"
    assert answers[10] == "(there is no system message)"
    assert answers[11] == "(system message set)"
    assert answers[12] == "Be brief."
    assert "/reset first" in answers[14]
    assert answers[15] == "(1 turn not saved)"


def test_the_system_message_is_heard(chat, loaded):
    answers = chat("/system Be brief.", "What?")
    session = Session(*loaded(), system="Be brief.")
    assert answers[1] == session.send(
        "What?", sampling=Sampling(temperature=0), max_tokens=6
    ).strip("\n")


def test_a_saved_conversation_continues(chat):
    first = chat("What?", "/save talk", "Why?")
    second = chat("/load talk", "Why?", "/save talk")
    assert second[1] == first[2]
    assert second[2].startswith("(saved talk.safetensors: 2 turns")


def test_save_replaces_only_its_own_file(chat, tmp_path):
    (tmp_path / "model.safetensors").write_text("weights")
    answers = chat("What?", "/save model", "/save! model", "/save model")
    assert answers[1] == "model.safetensors is there already; /save! model.safetensors replaces it"
    assert answers[2].startswith("(saved model.safetensors")
    assert answers[3].startswith("(saved model.safetensors")


def test_settings(chat, loaded):
    answers = chat(
        *("/set", "/set max_tokens 3", "Count", "/set stop a 'b c'", "/set stop default"),
        *("/set temp 0.7", "/set seed 5", "/set max-tokens 9", "/reset", "Count", "/set seed"),
        "/set temperature default",
    )
    shown = dict(line.strip("()").split(" ", 1) for line in answers[0].splitlines())
    assert shown["temperature"] == "0.0"
    assert shown["max_tokens"] == "6"
    assert shown["stop"] == shown["seed"] == "none"
    assert answers[3:5] == ["(stop a 'b c')", "(stop none)"]
    assert answers[10] == "(seed 5)"
    assert answers[11] == "(temperature 0.1)"  # what the checkpoint recommends
    session = Session(*loaded())
    sampling = Sampling(temperature=0.7)
    expected = session.send("Count", sampling=sampling, seed=5, max_tokens=9)
    assert answers[9] == expected.strip("\n")
    assert answers[2] == Session(*loaded()).send(
        "Count", sampling=Sampling(temperature=0), max_tokens=3
    ).strip("\n")


@pytest.mark.parametrize(
    "lines", [('"""', "one", "/two", '"""'), ('"""one', '/two"""'), ("one\\", "/two")]
)
def test_messages_of_several_lines(lines, chat, loaded):
    answers = chat(*lines, "exit")
    expected = Session(*loaded()).send("one\n/two", sampling=Sampling(temperature=0), max_tokens=6)
    assert answers[0].lstrip(". ") == expected.strip("\n").lstrip(". ")
    assert answers[1] == "(1 turn not saved)"


@pytest.mark.parametrize("word", ["exit", "quit", ":q", "/quit", " exit "])
def test_words_that_leave(word, chat):
    assert chat(word, "What?") == [""]


@needs_full_disk
def test_a_full_disk_ends_it_in_one_line(fixtures):
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            command(fixtures), input="Hi\n", stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert "No space left on device" in run.stderr


def test_completion(here, tmp_path, monkeypatch, loaded):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my folder").mkdir()
    complete = Chat(Session(*loaded()), {}, False).complete
    assert complete("/sa") == ["/save", "/save!"]
    assert complete("/image my") == ["/image my folder/", "/image my photo.png"]
    assert complete('/image "my p') == ["/image my photo.png"]
    assert complete("/load [") == []
    assert complete("/set top_") == ["/set top_p ", "/set top_k "]
    assert complete("hello ") == complete("") == []


@pytest.mark.parametrize("columns", [20, 40, 80, 200])
def test_help_fits_the_terminal(columns):
    text = help_text(columns)
    assert max(map(len, text.splitlines())) < max(columns, 31)
    for usage, _ in HELP:
        assert f"{usage:<14}" in text


def test_a_narrow_terminal(fixtures, copied, tmp_path, photo):
    """Forty columns, Tab completes a name, and Ctrl-C is typed, not sent."""
    endless = copied()
    (endless / "generation_config.json").write_text('{"eos_token_id": 9999}')
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    # the first terminal that the leader of a session opens is its own, and sends it signals
    opened = f'exec "$@" <>{os.ttyname(writer)} >&0'
    environment = {**os.environ, "TERM": "dumb"}
    environment.pop("COLUMNS", None)
    arguments = command(fixtures, "--model", endless, "--max-tokens", 1_000_000)
    process = subprocess.Popen(
        ["sh", "-c", opened, "sh", *arguments],
        start_new_session=True,
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    screen = Screen(reader)
    try:
        screen.wait_for("> ")
        os.write(reader, b"/help\n")
        screen.wait_for("/help\r\n")
        shown = screen.wait_for("> ")
        assert "/reset" in shown
        assert max(map(len, shown.splitlines())) < 40
        os.write(reader, b"/image my\t\n")
        screen.wait_for("(my photo.png: ")
        screen.wait_for("> ")
        os.write(reader, b"Count\n")
        screen.wait_for("Count\r\n")
        time.sleep(0.5)
        os.write(reader, b"\x03")
        screen.wait_for("(stopped;")
        screen.wait_for("> ")
        os.write(reader, b"/save talk\n")
        screen.wait_for("0 turns, 1 image)")
        screen.wait_for("> ")
        os.write(reader, b"\x04")
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(writer)
        os.close(reader)
