"""The conversation at the terminal, talked to through a pipe and through a pseudo-terminal."""

import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from mlx_lfm2vl import Sampling, Session

from .checkpoints.pictures import picture


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "my photo.png"
    Image.fromarray(picture(60, 40)).save(path)
    return path


def command(fixtures, *more):
    base = [sys.executable, "-m", "mlx_lfm2vl.generate", "--chat", "--model", fixtures / "v5"]
    return [str(part) for part in (*base, "--temp", 0, "--max-tokens", 6, *more)]


def talk(fixtures, *lines, more=()):
    run = subprocess.run(
        command(fixtures, *more), input="\n".join(lines), capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    return run.stdout


def test_a_conversation(fixtures, photo, loaded, tmp_path):
    saved = tmp_path / "talk.safetensors"
    out = talk(
        fixtures,
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


def test_images_and_prompt_of_the_command_line_come_first(fixtures, photo, loaded):
    out = talk(fixtures, "/quit", more=("--image", photo, "--prompt", "What is it?"))
    session = Session(*loaded())
    session.see(photo)
    assert session.send("What is it?", sampling=Sampling(temperature=0), max_tokens=6) in out


def test_mistakes_do_not_end_it(fixtures, tmp_path):
    out = talk(
        fixtures,
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


def test_chat_and_json_exclude_each_other(fixtures):
    run = subprocess.run(command(fixtures, "--json"), capture_output=True, text=True)
    assert run.returncode == 2
    assert "--chat reads standard input itself" in run.stderr


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
        self.text = self.text.partition(wanted)[2]


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
