"""Each example runs."""

import re
import subprocess
import sys
from pathlib import Path

from PIL import Image

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
