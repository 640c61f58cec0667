"""Each example runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from mlx_lfm2vl import Frames, PendingAnswer
from mlx_lfm2vl.serving.frames import Frame

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_show_views(tmp_path):
    out = tmp_path / "views.png"
    photo = EXAMPLES / "photos" / "rocket.jpg"
    command = [sys.executable, EXAMPLES / "show_views.py", photo, out, "--enlarge", "2"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout == "1280x854 pixels take 1792 positions of the prompt\n"
    with Image.open(out) as sheet:
        assert sheet.width > 3 * 512
        assert len(sheet.getcolors(1 << 24)) > 1000


def test_many_questions(fixtures):
    command = [sys.executable, EXAMPLES / "many_questions.py", "--model", fixtures / "v5"]
    command += ["--image", EXAMPLES / "photos" / "coffee.png", "--max-tokens", "3"]
    run = subprocess.run(
        [*command, "What is it?", "Which colour?"], capture_output=True, text=True, check=True
    )
    assert run.stdout.startswith("Q: What is it?\nA: ")
    assert "\n\nQ: Which colour?\nA: " in run.stdout


def test_window_with_a_source(display, fixtures):
    out = run_window(fixtures, "--source", "lavfi:testsrc=size=320x240")
    assert re.fullmatch(r"3 tokens, \d+/s\n", out)


@pytest.fixture
def window(display):
    """A window about a source that the test feeds, and a worker that it holds."""
    sys.path.insert(0, str(EXAMPLES))
    import tkinter

    from window import Window

    class Worker:
        def __init__(self):
            self.asked = []

        def submit(self, question, image, **settings):
            self.asked.append((question, image.getpixel((0, 0))[0]))
            self.answer = PendingAnswer(lambda answer: None)
            return self.answer

    class Source(Frames):
        def __init__(self):
            self.left = []

        def poll(self, seconds):
            return self.left.pop(0) if self.left else None

    window = Window(tkinter.Tk(), Worker(), Source(), 9, False)
    window.question.insert(0, "What?")
    yield window
    window.root.destroy()
    sys.path.remove(str(EXAMPLES))


def test_window_watches_pauses_and_stops(window):
    asked = window.worker.asked

    def play(*shades):
        """A picture each second, and what is asked about meanwhile."""
        before = len(asked)
        window.source.left += [
            Frame(Image.new("RGB", (32, 32), (shade,) * 3), window.seconds + i, 0)
            for i, shade in enumerate(shades)
        ]
        window.seconds += len(shades)
        while window.source.left:
            window.root.update()
        window.poll()
        return [shade for _, shade in asked[before:]]

    window.seconds = 0
    assert play(1, 1, 1) == [], "nobody has asked yet"
    window.ask()
    assert play(2) == [2]
    assert play(90, 90, 90) == [], "one question at a time"
    window.worker.answer._finish()
    assert play(90, 90, 90) == [90]
    window.worker.answer._finish()
    assert play(90, 90, 90) == [], "nothing has changed"
    window.pause()
    assert play(200, 200, 200) == []
    assert window.image.getpixel((0, 0)) == (90, 90, 90), "it stands still"
    window.ask()
    window.root.update()
    window.poll()
    assert asked[-1] == ("What?", 90), "and can be asked about"
    window.pause()
    window.stop()
    assert window.worker.answer.done
    assert play(7, 7, 7) == []
    assert str(window.status["text"]) == "Stopped"


def run_window(fixtures, *arguments):
    command = [sys.executable, EXAMPLES / "window.py", "--model", fixtures / "v5", *arguments]
    command += ["--prompt", "What is it?", "--max-tokens", "3", "--close-after-answer"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (0, "")
    return run.stdout


def test_window(display, fixtures):
    out = run_window(fixtures, "--image", EXAMPLES / "photos" / "coffee.png")
    assert re.fullmatch(r"3 tokens, \d+/s\n", out)


def test_window_shows_what_went_wrong(display, fixtures):
    out = run_window(
        fixtures, "--image", EXAMPLES / "photos" / "coffee.png", "--model", "no/such/folder"
    )
    assert out.startswith("ModelNotFoundError: ")
    out = run_window(fixtures, "--source", "lavfi:nonsense")
    assert out.startswith("SourceError: lavfi:nonsense cannot be opened")
